"""The weights a run starts from: read from Hugging Face files, or drawn.

Drawn weights depend on the parameter's name and the seed alone. Each rank draws the whole parameter and keeps its
slice, so that the same seed gives the same model under every topology.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from launcher.spec import RunSpec
from sft.architecture import Architecture
from sft.hf_import import load_hf_weights
from sft.mcore import TransformerConfig, get_transformer_layer_offset, parallel_state


def load_initial_weights(
    chunks: Sequence[nn.Module],
    spec: RunSpec,
    architecture: Architecture,
    config: TransformerConfig,
    model_dir: Path,
) -> None:
    """Fill this rank's chunks."""
    offsets = [get_transformer_layer_offset(config, getattr(chunk, "vp_stage", None)) for chunk in chunks]
    load_hf_weights(
        chunks,
        architecture,
        model_dir,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        layer_offsets=offsets,
    )
