"""Other trainers on the same GPU, model and data, each at its best: TRL's SFTTrainer, and a plain loop with Liger.

Both pack rows (best-fit decreasing) and use Liger's kernels and fused AdamW. Both also get our attention kernels
(sft.kernels.attention), registered with transformers under a name of its own, so that neither is slow only because a
package is not installed.

`fp32` weights are computed with in bf16, which gives updates the precision of ours. `bf16` weights alone are faster and
lose small updates.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.bench.plain_loop import packed_batches, train_in_a_loop
from sft.bench.result import Result, StepClock
from sft.bench.sft_trainer import tokenizer_of_two, train_with_trl
from sft.bench.workload import Workload
from sft.kernels import attention

if TYPE_CHECKING:
    from peft import PeftConfig

ATTENTION = "packed_offsets"
"""A name with "flash" in it would make transformers look for a package of that name."""
Weights = Literal["fp32", "bf16"]
Chosen = Literal["auto", "flash2", "flash4"]
Experts = Literal["liger", "grouped"]


def packed_flash(
    module: object, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, *, scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, kernel: attention.Kernel = "flash2",
    sliding_window: int | None = None, s_aux: Tensor | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Return the attention [1, t, heads, dim] of query [1, heads, t, dim], key and value [1, groups, t, dim].

    transformers calls this with the packed sequences' offsets, and where a model has them with a window and sinks.
    """
    assert cu_seq_lens_q is not None and max_length_q is not None, "only for packed rows"
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if not query.is_cuda:  # for trying a command out, not for measurements
        lengths = cu_seq_lens_q.diff().tolist()
        parts = [tensor.transpose(0, 1)[None].split(lengths, dim=2) for tensor in (query, key, value)]
        attend = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
        whole = [attend(*part) for part in zip(*parts, strict=True)]
        return torch.cat(whole, dim=2).transpose(1, 2), None
    query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < max_length_q else None
    packed = cu_seq_lens_q, max_length_q, scaling, kernel
    return attention.flash(query, key, value, *packed, window=window, sinks=s_aux)[None], None


def choose_kernel(chosen: Chosen, workload: Workload) -> attention.Kernel:
    """Return the kernel of attention that was asked for, or for `auto` the fastest one there is."""
    return attention.fastest_kernel(workload.model_shape.head_dim) if chosen == "auto" else chosen


def build_model(workload: Workload, weights: Weights, kernel: attention.Kernel) -> torch.nn.Module:
    """Return transformers' model of this shape with random weights, on the device."""
    import transformers
    from transformers.masking_utils import flash_attention_mask

    transformers.AttentionInterface.register(ATTENTION, partial(packed_flash, kernel=kernel))
    transformers.AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
    config = transformers.AutoConfig.for_model(**workload.model_config)
    dtype = torch.float32 if weights == "fp32" else torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(workload.seed)
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION
        )
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=workload.router_std)
    return model


def run_trl(
    workload: Workload,
    *,
    weights: Weights,
    attention: Chosen,
    micro_batches: int,
    warmup: int,
    steps: int,
    parallel: str = "ddp",
) -> Result:
    """Train with TRL's SFTTrainer: packing `bfd`, no gradient checkpointing, DDP or FSDP2 on several GPUs."""
    kernel = choose_kernel(attention, workload)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    clock, rank = StepClock(warmup, steps), workload.lora_rank
    loss = train_with_trl(
        workload,
        clock,
        build_model(workload, weights, kernel),
        tokenizer_of_two(),
        micro_batches=micro_batches,
        lengths_of=lambda inputs: inputs["cu_seq_lens_q"].diff(),
        peft_config=_peft_config(workload),
        use_liger_kernel=torch.cuda.is_available(),
        **_fsdp() if parallel == "fsdp" and world > 1 else {},
    )
    settings = {**_settings(workload, weights, kernel), **({"parallel": parallel} if world > 1 else {})}
    return clock.result("trl", settings, workload.model_shape, loss, lora_rank=rank)


def run_transformers(
    workload: Workload,
    *,
    weights: Weights,
    attention: Chosen,
    micro_batches: int,
    warmup: int,
    steps: int,
    experts: Experts = "liger",
) -> Result:
    """Train transformers' model with Liger's kernels, fused linear cross-entropy included, in a plain loop.

    Experts are Liger's, or transformers' own, which call torch's grouped product.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        from liger_kernel.transformers import monkey_patch

        monkey_patch._apply_liger_kernel(workload.model_shape.model_type, swiglu=experts == "liger")
    device = "cuda" if on_gpu else "cpu"
    kernel = choose_kernel(attention, workload)
    model = build_model(workload, weights, kernel).train()
    adapted = _peft_config(workload)
    if adapted is not None:
        import peft

        model = peft.get_peft_model(model, adapted)

    def share_of(batch: dict[str, Tensor], lengths: list[int], targets: int) -> Tensor:
        moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=weights == "fp32" or adapted is not None):
            share: Tensor = model(
                **moved, max_length_q=max(lengths), max_length_k=max(lengths), use_cache=False,
                num_items_in_batch=targets,
            ).loss  # fmt: skip
        return share

    clock, batches = StepClock(warmup, steps), packed_batches(workload, warmup + steps, micro_batches)
    loss = train_in_a_loop(clock, batches, micro_batches, model, share_of)
    settings = _settings(workload, weights, kernel)
    settings |= {"experts": experts} if workload.model_shape.num_experts else {}
    rank = workload.lora_rank
    return clock.result("transformers", settings, workload.model_shape, loss, lora_rank=rank)


def _peft_config(workload: Workload) -> PeftConfig | None:
    """Return PEFT's adapters of every linear layer, or None if all weights are trained."""
    if workload.lora_rank is None:
        return None
    import peft

    rank = workload.lora_rank
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _fsdp() -> dict[str, object]:
    """Return the settings of FSDP2, one unit for each layer, resharded after forward."""
    wrapped = {"version": 2, "reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"fsdp": True, "fsdp_config": wrapped}


def _settings(workload: Workload, weights: Weights, kernel: attention.Kernel) -> dict[str, object]:
    made: dict[str, object] = {"weights": weights, "rows": workload.rows, "liger": True, "packing": "bfd"}
    return {**made, "attention": kernel, "lora": workload.lora_rank}
