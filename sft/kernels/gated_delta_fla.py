"""The gated delta rule and the convolution before it by flash-linear-attention's Triton kernels: half precision alone.

An optional package, from version 0.6 on, which this module imports: only `sft.kernels.gated_delta` imports it.
"""

from __future__ import annotations

from fla.modules.causal_conv1d import causal_conv1d
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

Offsets = tuple[Tensor, Tensor]
"""Where documents begin, on the device and on the host: without the second the kernels would wait for the first."""


def convolution(x: Tensor, weight: Tensor, offsets: Offsets) -> Tensor:
    """Return what `gated_convolution` does."""
    convolved: Tensor = causal_conv1d(
        x.unsqueeze(0).contiguous(),
        weight.contiguous(),
        activation="silu",
        cu_seqlens=offsets[0],
        cu_seqlens_cpu=offsets[1],
    )[0]
    return convolved.squeeze(0)


def rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, offsets: Offsets, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `gated_delta_rule` does."""
    rows = (part.unsqueeze(0).contiguous() for part in (query, key, value, decay.float(), beta.float()))
    output, last = chunk_gated_delta_rule(
        *rows,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=offsets[0],
        cu_seqlens_cpu=offsets[1],
    )
    return output.squeeze(0), last
