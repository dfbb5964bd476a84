"""The weights a run starts from: read from Hugging Face files, or random.

Random weights depend on the tensor's Hugging Face name and the seed alone: each rank makes a whole tensor and keeps its
slice, so that one seed gives one model under every topology. So do LoRA adapters, which no file holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from launcher.contract.spec import RunSpec
from sft.hf.files import WeightFiles, weights_identity
from sft.hf.importer import fill_parameters, load_hf_weights, needed_tensors
from sft.hf.read_ahead import available_memory, joined, read_ahead
from sft.megatron.core import TransformerConfig, get_transformer_layer_offset
from sft.megatron.layers.lora import reset_adapters
from sft.megatron.parallel.groups import node_ranks, rank_place
from sft.models.architecture import Architecture

INITIAL_STD = 0.02
"""Standard deviation of random matrices, the usual `initializer_range`."""
_KEPT = 4


def load_initial_weights(
    model_chunks: Sequence[nn.Module],
    spec: RunSpec,
    architecture: Architecture,
    config: TransformerConfig,
    model_dir: Path,
    *,
    ranks_per_node: int = 1,
    resumes: bool = False,
) -> None:
    """Fill this rank's model chunks with the weights that the run starts from.

    Where the run `resumes`, only those that are not in its checkpoints are read: all of a run with adapters, and else
    buffers.
    """
    offsets = [
        get_transformer_layer_offset(config, getattr(model_chunk, "vp_stage", None)) for model_chunk in model_chunks
    ]
    place = rank_place()
    only_frozen = resumes and spec.model.lora.rank is None
    if spec.model.init == "random":
        source = RandomWeights.of(architecture, spec.train.seed)
        fill_parameters(model_chunks, architecture, source, place=place, layer_offsets=offsets, only_frozen=only_frozen)
    else:
        if not only_frozen:
            needed = needed_tensors(model_chunks, architecture, place=place, layer_offsets=offsets)
            _read_ahead_together(model_dir, needed, ranks_per_node)
        load_hf_weights(
            model_chunks, architecture, model_dir, place=place, layer_offsets=offsets, only_frozen=only_frozen
        )
    if spec.model.lora.rank is not None:
        base = weights_identity(model_dir)
        for model_chunk in model_chunks:
            model_chunk.base_weights = base  # type: ignore[assignment]
        reset_adapters(model_chunks, spec.train.seed)


def _read_ahead_together(model_dir: Path, needed: set[str], ranks_per_node: int) -> None:
    """Read the tensors that this node's ranks need into its page cache, a share by each, and wait for all of them."""
    with node_ranks(ranks_per_node) as node:
        wanted = set().union(*node.gather(needed))
        ranges = joined(WeightFiles(model_dir).places(wanted))
        if sum(end - begin for _, begin, end in ranges) < available_memory() // 2:  # else the cache would not hold them
            read_ahead(ranges, node.rank, node.size)
        node.barrier()


class RandomWeights:
    """A source of weights like sft.hf.files.WeightFiles: matrices and sinks from a normal distribution, biases 0.

    `norm` is what norms are filled with, but `gated_norms`, which are 1.
    """

    def __init__(self, seed: int, *, norm: float = 1.0, gated_norms: Collection[str] = ()) -> None:
        self._seed = seed
        self._norm = norm
        self._gated_norms = gated_norms
        self._recent: dict[str, Tensor] = {}

    @classmethod
    def of(cls, architecture: Architecture, seed: int) -> RandomWeights:
        """Return the weights that make a model of this architecture, whose norms then change no size."""
        # The norms of linear attention are plain ones, whatever the others are.
        maps = (layer.get("self_attention.norm.weight") for layer in architecture.weights.layers)
        gated = {own.pieces[0].name for own in maps if own is not None}
        return cls(seed, norm=0.0 if architecture.norm == "zero_centered_rms" else 1.0, gated_norms=gated)

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the whole tensor `name`. A parameter's pieces come from up to four in turn, so four are kept."""
        if name not in self._recent:
            while len(self._recent) >= _KEPT:
                del self._recent[next(iter(self._recent))]
            self._recent[name] = self._random(name, shape)
        return self._recent[name]

    def _random(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape, device="cpu")
        if len(shape) == 1 and not name.endswith(".sinks"):
            return torch.full(shape, 1.0 if name in self._gated_norms else self._norm, device="cpu")
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.randn(shape, generator=generator, device="cpu") * INITIAL_STD
