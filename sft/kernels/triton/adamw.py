"""`sft.kernels.adamw` as one Triton kernel for all tensors of a parameter group.

It moves 30 bytes a weight, at the speed of the memory: weight and two moments are read and written, the gradient is
read, the copy in half precision written. torch's fused AdamW reaches two thirds of that speed, also writes the scaled
gradient back, and leaves the copy to another pass.

One launch takes all tensors, as Apex's multi-tensor kernels do: with a launch for each, the host would take longer
than the device. A table on the device tells each program its tensor and its place in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.adamw import Row, Settings

_BLOCK = 2048
_ALIGNMENT = 16
"""A thread moves several elements at once where addresses (in bytes) and sizes (in elements) are multiples of this."""


@triton.jit
def _adamw(
    address_ptr, size_ptr, block_ptr, corrections_ptr, scale_ptr, skip_ptr,
    lr, kept, beta1, rest1, beta2, rest2, eps, COPY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # In 64 bits: a tensor may have more than 2^31 elements.
    tensor = tl.load(block_ptr + 2 * tl.program_id(0)).to(tl.int64)
    begin = tl.load(block_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * BLOCK
    # Triton specializes kernels on the alignment of their arguments; of addresses read from memory it knows nothing.
    weight_ptr = tl.load(address_ptr + 5 * tensor).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(address_ptr + 5 * tensor + 1).to(tl.pointer_type(tl.float32))
    mean_ptr = tl.load(address_ptr + 5 * tensor + 2).to(tl.pointer_type(tl.float32))
    square_ptr = tl.load(address_ptr + 5 * tensor + 3).to(tl.pointer_type(tl.float32))
    copy_ptr = tl.load(address_ptr + 5 * tensor + 4).to(tl.pointer_type(COPY))
    size = tl.load(size_ptr + tensor)
    if ALIGNED:
        size = tl.multiple_of(size, 16)  # the mask depends on it, and would rule out wide loads as well
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        mean_ptr = tl.multiple_of(mean_ptr, 16)
        square_ptr = tl.multiple_of(square_ptr, 16)
        copy_ptr = tl.multiple_of(copy_ptr, 16)
    place = begin + tl.arange(0, BLOCK)
    inside = place < tl.where(tl.load(skip_ptr) == 0, size, 0)  # a skipped step neither reads nor writes
    grad = tl.load(grad_ptr + place, mask=inside) / tl.load(scale_ptr)
    mean = beta1 * tl.load(mean_ptr + place, mask=inside) + rest1 * grad
    square = beta2 * tl.load(square_ptr + place, mask=inside) + rest2 * grad * grad
    unbiased = mean / tl.load(corrections_ptr + 2 * tensor)
    spread = tl.sqrt(square / tl.load(corrections_ptr + 2 * tensor + 1)) + eps
    weight = kept * tl.load(weight_ptr + place, mask=inside) - lr * unbiased / spread
    tl.store(mean_ptr + place, mean, mask=inside)
    tl.store(square_ptr + place, square, mask=inside)
    tl.store(weight_ptr + place, weight, mask=inside)
    tl.store(copy_ptr + place, weight.to(COPY), mask=inside)


class Table:
    """Addresses and sizes of the tensors of some rows, on their device: made once and used every step."""

    def __init__(self, rows: Sequence[Row]) -> None:
        sizes = torch.tensor([len(row.weight) for row in rows])
        counts = (sizes + _BLOCK - 1) // _BLOCK
        own = torch.repeat_interleave(torch.arange(len(rows)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        device = rows[0].weight.device
        self.addresses = addresses_of(rows)
        """The addresses as Python numbers, to see whether the table still holds."""
        self.copy_type = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[rows[0].copy.dtype]
        self.aligned = all(number % _ALIGNMENT == 0 for row in [*self.addresses, sizes.tolist()] for number in row)
        self.address_table = _to_device(torch.tensor(self.addresses), device)
        self.sizes = _to_device(sizes, device)
        self.blocks = _to_device(torch.stack([own, torch.arange(len(own)) - first], dim=1).int(), device)
        """[programs, 2]: the tensor a program works on, and which block of it."""


def addresses_of(rows: Sequence[Row]) -> list[list[int]]:
    """Return the addresses of the five tensors of each row."""
    return [[tensor.data_ptr() for tensor in row] for row in rows]


def update(table: Table, corrections: Tensor, scale: Tensor, skip: Tensor, settings: Settings) -> None:
    """Do what `sft.kernels.adamw.update` does, to the rows of `table`."""
    lr, weight_decay, (beta1, beta2), eps = settings
    _adamw[(len(table.blocks),)](
        table.address_table, table.sizes, table.blocks, corrections, scale, skip,
        lr, 1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
        COPY=table.copy_type, ALIGNED=table.aligned, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on `device` without waiting for the copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
