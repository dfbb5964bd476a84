"""Matrices of experts in MXFP4, as gpt-oss is published: 4-bit numbers with a common power of two for each 32 of them.

A file has two tensors for one: `<name>_blocks`, bytes [experts, output, input / 32, 16], and `<name>_scales`, bytes
[experts, output, input / 32]. A byte holds two numbers, the first in its low half. The tensor that they stand for is
[experts, input, output], so that rows of the blocks are its columns. They are read and dequantised by parts: beside the
model no more than one expert's matrix is in memory. All values are exact in bf16.

Training is in full precision, and so are exports.
"""

from __future__ import annotations

from typing import Protocol

import torch

from launcher.contract.errors import ModelError

BLOCK = 32
"""Numbers with one scale."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_NOT_A_NUMBER = 255


class _Bytes(Protocol):
    def __getitem__(self, index: slice | tuple[int | slice, ...], /) -> torch.Tensor: ...


def stored_names(name: str) -> tuple[str, str]:
    """Return the names of blocks and scales of a tensor."""
    return f"{name}_blocks", f"{name}_scales"


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of blocks and scales of a tensor [experts, input, output]."""
    experts, inputs, outputs = shape
    groups = (experts, outputs, inputs // BLOCK)
    return (*groups, BLOCK // 2), groups


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers in bf16, [..., input], of blocks [..., input / 32, 16] and scales [..., input / 32]."""
    pairs = _pairs().index_select(0, blocks.flatten().int()).view(*scales.shape, BLOCK)
    factors = torch.ldexp(torch.ones(()), scales.int() - _BIAS)
    return (pairs * factors.unsqueeze(-1)).bfloat16().flatten(-2)


class Mxfp4Tensor:
    """A tensor [experts, input, output] whose part is dequantised when it is indexed."""

    def __init__(self, name: str, blocks: _Bytes, scales: _Bytes) -> None:
        self._name = name
        self._blocks, self._scales = blocks, scales

    def __getitem__(self, index: slice | tuple[int | slice, ...], /) -> torch.Tensor:
        """Return that part, in bf16."""
        expert, inputs, outputs = (*(index if isinstance(index, tuple) else (index,)), slice(None), slice(None))[:3]
        blocks, scales = self._blocks[expert, outputs], self._scales[expert, outputs]
        if (scales == _NOT_A_NUMBER).any():
            raise ModelError(f"tensor {self._name}_scales has a scale that is not a number ({_NOT_A_NUMBER})")
        return dequantized(blocks, scales).transpose(-1, -2)[..., inputs, :]


def _pairs() -> torch.Tensor:
    """Return the two numbers of each byte, fp32 [256, 2]."""
    values = torch.tensor([*_MAGNITUDES, *(-size for size in _MAGNITUDES)])
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
