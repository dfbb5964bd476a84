"""Matrices of experts in MXFP4, as gpt-oss is published: 4-bit numbers with a common power of two for each 32 of them.

A file has two tensors for one: `<name>_blocks`, bytes [experts, output, input / 32, 16], and `<name>_scales`, bytes
[experts, output, input / 32]. A byte holds two numbers, the first in its low half. The tensor that they stand for is
[experts, input, output], so that rows of the blocks are its columns. They are read and dequantised by parts: beside the
model no more than one expert's matrix is in memory. All values are exact in bf16.

Training is in full precision, and so are exports.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from launcher.contract.errors import ModelError
from sft.hf.sliceable import Sliceable
from sft.models.weight_map import MXFP4_BLOCK

if TYPE_CHECKING:  # names and shapes are checked without torch
    import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_OF_ONE = 127
_NOT_A_NUMBER = 255


def stored_names(name: str) -> tuple[str, str]:
    """Return the names of blocks and scales of a tensor."""
    return f"{name}_blocks", f"{name}_scales"


def stored_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of blocks and scales of a tensor [experts, input, output]."""
    experts, inputs, outputs = shape
    groups = (experts, outputs, inputs // MXFP4_BLOCK)
    return (*groups, MXFP4_BLOCK // 2), groups


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the numbers in bf16, [..., input], of blocks [..., input / 32, 16] and scales [..., input / 32]."""
    import torch

    pairs = _pairs().index_select(0, blocks.flatten().int()).view(torch.bfloat16)
    factors = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - _SCALE_OF_ONE).bfloat16()
    return pairs.view(*scales.shape, MXFP4_BLOCK).mul_(factors.unsqueeze(-1)).flatten(-2)


class Mxfp4Tensor:
    """A tensor [experts, input, output] whose parts are dequantised when it is indexed."""

    def __init__(self, name: str, blocks: Sliceable, scales: Sliceable) -> None:
        self.name = name
        self._blocks, self._scales = blocks, scales
        self._latest: tuple[tuple[int, int, int], torch.Tensor] | None = None

    def __getitem__(self, index: slice | tuple[int | slice, ...], /) -> torch.Tensor:
        """Return that part in bf16: a matrix, or all of them.

        Outputs are read in pairs, and the latest are kept: of gate and up projection, which alternate, each is asked
        for by itself.
        """
        if isinstance(index, slice):
            return self._read(index).transpose(1, 2).contiguous()
        expert, inputs, outputs = index
        assert isinstance(expert, int)
        assert isinstance(inputs, slice)
        assert isinstance(outputs, slice)
        begin = outputs.start - outputs.start % 2
        key = expert, begin, outputs.stop + outputs.stop % 2
        if self._latest is None or self._latest[0] != key:
            self._latest = key, self._read((expert, slice(*key[1:])))
        return self._latest[1][outputs.start - begin : outputs.stop - begin].T[inputs]

    def _read(self, index: slice | tuple[int | slice, ...]) -> torch.Tensor:
        blocks, scales = self._blocks[index], self._scales[index]
        if (scales == _NOT_A_NUMBER).any():
            raise ModelError(f"tensor {self.name}_scales has a scale that is not a number ({_NOT_A_NUMBER})")
        return dequantized(blocks, scales)


@functools.cache
def _pairs() -> torch.Tensor:
    """Return the two bf16 numbers of each byte, as the bits of one int32, [256]."""
    import torch

    values = torch.tensor([*_MAGNITUDES, *(-size for size in _MAGNITUDES)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=-1).view(torch.int32).flatten()
