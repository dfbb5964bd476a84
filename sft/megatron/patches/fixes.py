"""Corrections of Megatron-core that CPU and GPU ranks need alike; each has a test that fails without it.

* `DistributedOptimizer` with torch's AdamW (no Transformer Engine, no Apex) cannot be checkpointed right: a never
  stepped optimizer fails an assertion on load, torch's `step` entry raises KeyError, and after a load all parameters
  share one `step` tensor, which AdamW then increments once for each parameter: bias correction is silently wrong.
* The resharding-safe checkpoint of its state joins buckets without the padding behind each, and cuts parameters out of
  that by places which count the padding. Wherever a bucket is padded, all that lies behind it is saved shifted, and is
  loaded so without an error. Only runs with several buckets are hit: those that overlap the reduction of gradients.
* Saving synchronously starts a multiprocessing manager on every rank only to pass results to the same process: it
  re-imports `__main__`, takes seconds, and outlives the rank.
* The gradient norm without Transformer Engine and Apex is taken tensor by tensor with `torch.norm`, each result fetched
  to the host. On a CPU that sums in fp32 one after another: 1.6e-3 too small for the embedding of a 135M model, so
  clipping is off as much. On a GPU it is one synchronisation a parameter.
* Rank 0 writes `common.pt`, `.metadata` and `metadata.json` alone, between two collectives of a save. Where the disk is
  full it leaves by an error, and the other ranks wait in the second one. Here it goes on, and raises when all are done.
* An output that is freed and computed again asks Transformer Engine whether fp8 is on, which is not there to answer:
  `CheckpointWithoutOutput` takes its own default, False, for a recipe. Layers that are not fused need it for norms.

Seen in 0.16.1; the first and the third in 0.19.2 as well.
"""

from __future__ import annotations

import functools
import queue
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sft.kernels.weight_gradient import FusedWeightGradient

_write_errors: list[OSError | RuntimeError] = []


def apply(
    distributed_optimizer: type,
    filesystem_async: types.ModuleType,
    clip_grads: types.ModuleType,
    save_common: type,
    serialization: types.ModuleType,
) -> None:
    """Install the corrections that are replacements, into the classes and modules given."""
    distributed_optimizer._set_main_param_and_optimizer_states = _copy_main_param_and_states  # type: ignore[attr-defined]
    distributed_optimizer.sharded_param_state_fully_reshardable = _at_padded_places(  # type: ignore[attr-defined]
        distributed_optimizer.sharded_param_state_fully_reshardable  # type: ignore[attr-defined]
    )
    filesystem_async._results_queue = queue.Queue()  # type: ignore[attr-defined]

    if clip_grads.l2_norm_impl.__name__ == "local_multi_tensor_l2_norm":  # neither Transformer Engine nor Apex
        clip_grads.l2_norm_impl = _l2_norm  # type: ignore[attr-defined]

    writer = filesystem_async.FileSystemWriterAsync
    for holder, name in ((save_common, "save_common"), (writer, "finish"), (serialization, "save_config")):
        setattr(holder, name, _raising_later(getattr(holder, name)))


def provide_weight_gradient(linears: types.ModuleType) -> None:
    """Give Megatron-core's linears the product that adds to a gradient buffer, where Apex's is not installed."""
    if not linears._grad_accum_fusion_available:
        linears.fused_weight_gradient_mlp_cuda = FusedWeightGradient  # type: ignore[attr-defined]
        linears._grad_accum_fusion_available = True  # type: ignore[attr-defined]


def checkpoint_without_fp8(checkpoint: type) -> None:
    """Let `CheckpointWithoutOutput` take no recipe of fp8 for none."""
    init = checkpoint.__init__  # type: ignore[misc]

    @functools.wraps(init)
    def mended(self: Any, fp8: Any = None) -> None:
        init(self, fp8 or None)

    checkpoint.__init__ = mended  # type: ignore[misc]


def raise_write_error() -> None:
    """Raise what went wrong with a file that rank 0 writes alone, since this was last called."""
    errors = _write_errors.copy()
    _write_errors.clear()
    if errors:
        raise errors[0]


def _raising_later(write: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(write)
    def attempt(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except (OSError, RuntimeError) as error:  # torch.save gives the second for a full disk
            _write_errors.append(error)

    return attempt


def prime_states(optimizer: Any) -> None:
    """Give a never stepped distributed optimizer the empty AdamW states that loading expects."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param] = {
                        "step": torch.zeros((), device=param.device),
                        "exp_avg": torch.zeros_like(param),
                        "exp_avg_sq": torch.zeros_like(param),
                    }


def unshare_steps(optimizer: Any) -> None:
    """Give each parameter a `step` of its own again after a load, where the fused AdamW looks for it."""
    for inner in _torch_optimizers(optimizer):
        for param, state in inner.state.items():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"]).to(device=param.device, dtype=torch.float32, copy=True)


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: list[list[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Euclidean norm, [1], of all tensors together, in the calling form of Apex's `multi_tensor_l2norm`."""
    return total_norm(tensor_lists[0]).reshape(1), None


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all tensors together, on their device."""
    if tensors[0].is_cuda:  # tree reductions: fp32 is accurate enough there
        norms = torch.stack(torch._foreach_norm(tensors))
    else:
        norms = torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors])
    norm: torch.Tensor = torch.linalg.vector_norm(norms).float()
    return norm


def _torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield part.optimizer


def _copy_main_param_and_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Copy loaded tensors into the main parameter and its states; torch's `step` is restored with the groups."""
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    main_param.data.copy_(tensors["param"])
    for name, state in self.optimizer.state[main_param].items():
        if name != "step":
            state.copy_(tensors[name])


def _at_padded_places(sharded_state: Callable[..., Any]) -> Callable[..., Any]:
    """`sharded_state` over a parameter state in which each bucket begins where it begins in the buffer."""

    @functools.wraps(sharded_state)
    def mended(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero

        def with_padding(**options: Any) -> Any:
            found = gather(**options)
            for index, buffer in enumerate(self.buffers if found is not None else []):
                for tensors in found[index].values():
                    for key in ("param", "exp_avg", "exp_avg_sq"):
                        tensors[key] = _spread(tensors[key], buffer)
            return found

        self.get_parameter_state_dp_zero = with_padding
        try:
            return sharded_state(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return mended


def _spread(joined: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Buckets that lie one behind the other, each at its place in the padded buffer."""
    spread = torch.zeros(buffer.numel, dtype=joined.dtype, device=joined.device)
    begin = 0
    for bucket in buffer.buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[begin : begin + bucket.numel_unpadded]
        begin += bucket.numel_unpadded
    return spread
