"""Which runs launch their layers as CUDA graphs (`train.cuda_graphs`): the ranks and the planner ask here."""

from __future__ import annotations

from typing import Literal, Protocol

from launcher.contract.flops import layer_operations
from launcher.contract.head_sizes import LARGEST_FLASH_HEAD
from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import facts_of
from launcher.contract.spec import RunSpec

GraphChoice = Literal["auto", "never", "always"]
_FEW_OPERATIONS = 1.5e12
"""Operations of a micro-batch in a layer, forward and backward, that a GPU of today computes in less time than a slow
host needs to launch the layer's kernels: 3 ms at 500 TFLOP/s. With more, graphs would cost their memory for nothing."""
_FEW_WITH_ADAPTERS = 3.75e12
"""The same where weights are frozen and have adapters: the host needs 5 ms and more, and of these operations the GPU
computes two thirds, since frozen weights have no gradients."""


class _Parallel(Protocol):
    @property
    def tensor_parallel(self) -> int: ...
    @property
    def pipeline_parallel(self) -> int: ...
    @property
    def context_parallel(self) -> int: ...


def uses_cuda_graphs(spec: RunSpec, shape: ModelShape) -> bool:
    """Return whether the layers of this run are launched as graphs, on GPUs and where layers are fused."""
    choice, length, adapted = spec.train.cuda_graphs, spec.data.seq_length, spec.model.lora.rank is not None
    wanted = graphs_pay(choice, shape, length, spec.train.micro_batch_size * length, adapted=adapted)
    return wanted and no_graphs_because(spec, shape) is None


def no_graphs_because(spec: RunSpec, shape: ModelShape | None) -> str | None:
    """Return what of the run graphs are not made for, or None. Without a shape the config alone is asked."""
    train = spec.train
    fixed = _fixed_setting_without_graphs(spec)
    return fixed or layout_without_graphs(spec.topology, train.precision, train.recompute, shape)


def no_graphs(because: str) -> str:
    """Return why `always` is refused."""
    return f"always: graphs are not made for this run ({because}); set it to auto"


def takes_graphs(spec: RunSpec) -> bool:
    """Return whether the settings that no layout changes allow graphs."""
    return _fixed_setting_without_graphs(spec) is None


def _fixed_setting_without_graphs(spec: RunSpec) -> str | None:
    if not spec.data.packing:
        return "rows are not packed"
    # Which rows have a graph depends on when a run began: the first product of a step is written or added to zeros.
    if spec.train.deterministic:
        return "train.deterministic"
    dropouts = {"model.attention_dropout": spec.model.attention_dropout, "model.lora.dropout": spec.model.lora.dropout}
    return next((name for name, share in dropouts.items() if share), None)


def layout_without_graphs(topology: _Parallel, precision: str, recompute: str, shape: ModelShape | None) -> str | None:
    """Return what of a layout and a model graphs are not made for, or None."""
    reasons = {
        "tensor parallelism": topology.tensor_parallel > 1,
        "pipeline parallelism": topology.pipeline_parallel > 1,
        "context parallelism": topology.context_parallel > 1,
        f"train.precision {precision}": precision != "bf16",
        f"train.recompute {recompute}": recompute != "none",
    }
    if shape is not None:
        reasons |= {
            "experts": bool(shape.num_experts),
            "linear attention": shape.linear is not None,
            # capped ones are computed by a kernel that reads the lengths of sequences on the host
            "capped scores": facts_of(shape.model_type).scores == "capped",
            # Of these, too, sequences are computed one by one, by their lengths on the host.
            f"heads of more than {LARGEST_FLASH_HEAD}": shape.largest_head > LARGEST_FLASH_HEAD,
        }
    return next((reason for reason, holds in reasons.items() if holds), None)


def graphs_pay(choice: GraphChoice, shape: ModelShape, seq_length: int, tokens: float, *, adapted: bool) -> bool:
    """Return whether graphs are wanted for micro-batches of so many tokens, by the config and by what they save."""
    few = tokens * max(layer_operations(shape, seq_length)) < (_FEW_WITH_ADAPTERS if adapted else _FEW_OPERATIONS)
    return choice == "always" or (choice == "auto" and few)
