"""Multi-head latent attention (arXiv:2405.04434) in a model's config.json: its sizes.

Keys and values of all heads are made of one small vector a token, the latent, and so may queries be of another one. A
further part of each key, which is the same for all heads, is rotated by the token's position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.divisors import rounded_up
from launcher.contract.errors import ModelError

_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Keys of whole numbers. What transformers takes where they are absent differs between families."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """The sizes of latent attention."""

    query_rank: int | None
    """Size of the latent of queries; None where they are made of the hidden state itself."""
    key_rank: int
    """Size of the latent of keys and values."""
    plain_dim: int
    """Part of each head of queries and keys that is not rotated."""
    rotary_dim: int
    """The other part, which is one for all heads of keys."""
    value_dim: int
    """Size of a head of values."""

    @property
    def query_dim(self) -> int:
        """The size of a head of queries or keys."""
        return self.plain_dim + self.rotary_dim

    @property
    def core_dim(self) -> int:
        """The size of heads where scores and contexts are computed, where kernels take one for all, a multiple of 8."""
        return rounded_up(max(self.query_dim, self.value_dim), 8)

    @property
    def normed(self) -> int:
        """The sizes of both latents, each of which is normed."""
        return (self.query_rank or 0) + self.key_rank


def read_latent_attention(config: Mapping[str, object], model_type: str, where: str) -> LatentAttention:
    """Return the latent attention of a config, or raise ModelError. `where` names the file."""
    rank, plain, rotary, value = (_size(config.get(key)) for key in _SIZES)
    if not all((rank, plain, rotary, value)):
        stated = ", ".join(f"{key} {config.get(key)!r}" for key in _SIZES)
        raise ModelError(f"{where}: {stated}; a {model_type} config must state these, as whole numbers above 0")
    if rotary % 2:
        raise ModelError(f"{where}: qk_rope_head_dim {rotary} is odd; rotations take pairs")
    of_queries = config.get("q_lora_rank", 0)
    if of_queries is not None and not _size(of_queries):
        stated = f"q_lora_rank {of_queries!r}" if "q_lora_rank" in config else "no q_lora_rank"
        raise ModelError(
            f"{where}: {stated}; a {model_type} config must state it, as a whole number above 0, or null for queries "
            "without a latent"
        )
    return LatentAttention(
        query_rank=_size(of_queries) or None, key_rank=rank, plain_dim=plain, rotary_dim=rotary, value_dim=value
    )


def _size(value: object) -> int:
    """Return a whole number above 0, or 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
