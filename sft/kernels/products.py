"""Matrix products written or added to fp32 memory by the product itself.

The usual way writes the product in bf16, reads it again and adds it: three times the memory traffic, and one rounding
more. cuBLAS multiplies half precision factors into an fp32 result in one call, which torch offers from 2.8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out [m, n], which is in fp32 or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to out [m, n], which is in fp32 or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
