"""Names of a base model's tensors in files without the part in front that transformers' whole model has.

GPT-2 is published that way: `wte.weight` and not `transformer.wte.weight`. transformers reads both; an export has the
names of its source.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sft.models.architecture import Architecture
from sft.models.stored_tensors import has_weights, weight_map


def with_stored_names(architecture: Architecture, model_dir: Path, prefix: str) -> Architecture:
    """Return the architecture with the names that the files in `model_dir` have, if these lack `prefix`."""
    if not has_weights(model_dir):
        return architecture
    embedding, stored = architecture.weights.embedding_name, weight_map(model_dir)
    if embedding in stored or embedding.removeprefix(prefix) not in stored:
        return architecture
    return replace(architecture, weights=architecture.weights.renamed(lambda name: name.removeprefix(prefix)))
