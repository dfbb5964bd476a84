"""NEFTune: noise on word embeddings in training, the same under every layout (sft.kernels.embedding_noise).

The noise of a token is at most alpha / sqrt(n * hidden size), where n counts the tokens of its own example. On an
unpadded row that is what transformers adds, and in a packed one each example counts by itself: the row's length says
nothing about any of them. In transformers padding counts, too, so that it weakens the noise of its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from sft.kernels.embedding_noise import uniform_noise
from sft.megatron.core import parallel_state
from sft.models.architecture import Architecture


@dataclass(frozen=True, slots=True)
class TokenSeeds:
    """What the noise of each token depends on, each [rows, row length]."""

    seeds: Tensor
    """int64, of the example in this step."""
    positions: Tensor
    lengths: Tensor
    """Tokens of the example, 0 on padding, which gets no noise."""


class NoisyEmbedding:
    """Adds noise to the output of a chunk's word embedding while it is told of which tokens that is."""

    def __init__(self, layer: Module, alpha: float, architecture: Architecture) -> None:
        self._tokens: TokenSeeds | None = None
        # Where transformers multiplies inside the embedding, it adds the noise to the product, which comes later here.
        inside = architecture.embedding_multiplier if architecture.embedding_multiplier_is_rounded else 1.0
        self._alpha = alpha / inside
        layer.register_forward_hook(self._add)

    @contextmanager
    def of(self, tokens: TokenSeeds | None) -> Iterator[None]:
        """Add the noise of these tokens, or none."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def _add(self, layer: Module, inputs: object, output: Tensor) -> Tensor:
        """Return word embeddings [rows, s, h], or this rank's share of them [s / tp, rows, h], with noise."""
        tokens = self._tokens
        if tokens is None or not layer.training:
            return output
        parts = [tokens.seeds, tokens.positions, tokens.lengths]
        if layer.reduce_scatter_embeddings:
            parts = [_own_share(part, output.size(0)) for part in parts]
        seeds, positions, lengths = parts
        bounds = self._alpha * (lengths.clamp(min=1) * output.size(-1)).rsqrt() * (lengths > 0)
        noise = uniform_noise(seeds, positions, output.size(-1)).mul_(bounds[..., None])
        return output + noise.to(output.dtype)


def _own_share(rows: Tensor, length: int) -> Tensor:
    """Return this tensor parallel rank's part of [rows, s], as [s / tp, rows]."""
    first = parallel_state.get_tensor_model_parallel_rank() * length
    return rows.t()[first : first + length]
