"""Megatron-core's modules as inference needs them, where one token follows the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from sft.megatron.patches.patch import Patch

_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes by which Megatron-core's modules split a sequence over tensor parallel ranks."""


@contextlib.contextmanager
def inference_mode(model_chunks: Sequence[DistributedDataParallel], config: TransformerConfig) -> Iterator[None]:
    """Switch the model chunks to evaluation without sequence parallelism inside a `with` block."""
    changed: list[tuple[object, str, object]] = []

    def change(owner: object, name: str, value: object) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for model_chunk in model_chunks:
            model_chunk.eval()
            for part in model_chunk.modules():
                for name in _SEQUENCE_PARALLEL:
                    if getattr(part, name, None) is True:  # a sequence of one token cannot be split
                        change(part, name, False)
        change(config, "sequence_parallel", False)
        yield
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
        for model_chunk in model_chunks:
            model_chunk.train()


PATCH = Patch(
    name="inference",
    why="sequence parallelism would split a single token",
    targets=("megatron.core.inference.contexts:StaticInferenceContext",),
    test="parity/test_generation.py::test_greedy_answers_equal_transformers",
)
