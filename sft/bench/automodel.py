"""NeMo Automodel's models on the same data, in a plain loop: its grouped experts, compiled attention, Liger's loss.

Rows hold one example each (`--data full`): without Transformer Engine, Automodel's attention takes no packed rows.
Weights are bf16 alone, as in its recipes.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.bench.peers import packed_batches
from sft.bench.result import Result, StepClock
from sft.bench.workload import Workload

_MODELS = {
    "llama": ("nemo_automodel.components.models.llama.model", "LlamaForCausalLM"),
    "qwen3_moe": ("nemo_automodel.components.models.qwen3_moe.model", "Qwen3MoeForCausalLM"),
}
"""Automodel's own implementations, by the model type of transformers."""


def run_automodel(workload: Workload, *, micro_batches: int, warmup: int, steps: int, **_: object) -> Result:
    """Train Automodel's model of the workload's shape. Raise ValueError for a workload that it cannot train here."""
    if workload.data != "full" or workload.lora_rank is not None:
        raise ValueError("automodel is run on `--data full` without LoRA: its packed rows need Transformer Engine")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(workload, device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
    )
    clock, loss = StepClock(warmup, steps), torch.zeros((), device=device)
    batches = iter(packed_batches(workload, warmup + steps, micro_batches))
    for parts in zip(*[batches] * micro_batches, strict=True):
        clock.before_step()
        loss = torch.zeros((), device=device)
        targets = sum(supervised for _, _, supervised in parts)
        for batch, lengths, _supervised in parts:
            rows = batch["input_ids"].view(len(lengths), -1).to(device, non_blocking=True)
            hidden = model.model(rows)
            share = _summed_loss(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten()) / targets
            share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        slots = sum(batch["input_ids"].numel() for batch, _, _ in parts)
        clock.after_step([length for _, lengths, _ in parts for length in lengths], slots, targets)
    settings: dict[str, object] = {"weights": "bf16", "rows": workload.rows, "attention": "sdpa"}
    settings |= {"experts": "grouped"} if workload.model_shape.num_experts else {}
    return clock.result("automodel", settings, workload.model_shape, float(loss))


def _model(workload: Workload, device: torch.device) -> Any:
    import transformers
    from nemo_automodel.components.models.common import BackendConfig

    config = transformers.AutoConfig.for_model(**workload.model_config, dtype=torch.bfloat16)
    module, name = _MODELS[config.model_type]
    backend = BackendConfig(
        attn="sdpa",
        rms_norm="torch",
        experts="torch_mm",
        compile_attn=device.type == "cuda",
        enable_hf_state_dict_adapter=False,
    )
    with device:
        torch.manual_seed(workload.seed)
        model = getattr(importlib.import_module(module), name)(config, backend=backend)
    model.initialize_weights(buffer_device=device, dtype=torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=workload.router_std)
    return model


def _summed_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    if not hidden.is_cuda:
        return F.cross_entropy((hidden @ head.t()).float(), labels, reduction="sum")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head, hidden, labels)
    return loss
