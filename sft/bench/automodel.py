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

from sft.bench.plain_loop import packed_batches, train_in_a_loop
from sft.bench.result import Result, StepClock
from sft.bench.workload import Workload

_MODELS = {
    "llama": ("nemo_automodel.components.models.llama.model", "LlamaForCausalLM"),
    "qwen2": ("nemo_automodel.components.models.qwen2.model", "Qwen2ForCausalLM"),
    "qwen3_moe": ("nemo_automodel.components.models.qwen3_moe.model", "Qwen3MoeForCausalLM"),
}
"""Automodel's own implementations, by the model type of transformers."""


def run_automodel(workload: Workload, *, micro_batches: int, warmup: int, steps: int, **_: object) -> Result:
    """Train Automodel's model of the workload's shape. Raise ValueError for a workload that it cannot train here."""
    if workload.data != "full" or workload.lora_rank is not None:
        raise ValueError("automodel is run on `--data full` without LoRA: its packed rows need Transformer Engine")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(workload, device).train()

    def share_of(batch: dict[str, Tensor], lengths: list[int], targets: int) -> Tensor:
        rows = batch["input_ids"].view(len(lengths), -1).to(device, non_blocking=True)
        output = model.model(rows)
        hidden = getattr(output, "last_hidden_state", output)
        return _summed_loss(hidden[:, :-1].flatten(0, 1), model.lm_head.weight, rows[:, 1:].flatten()) / targets

    clock, batches = StepClock(warmup, steps), packed_batches(workload, warmup + steps, micro_batches)
    loss = train_in_a_loop(clock, batches, micro_batches, model, share_of)
    settings: dict[str, object] = {"weights": "bf16", "rows": workload.rows, "attention": "sdpa"}
    settings |= {"experts": "grouped"} if workload.model_shape.num_experts else {}
    return clock.result("automodel", settings, workload.model_shape, loss)


def _model(workload: Workload, device: torch.device) -> Any:
    import transformers
    from nemo_automodel.components.models.common import BackendConfig

    config = transformers.AutoConfig.for_model(**workload.model_config, dtype=torch.bfloat16)
    if config.model_type not in _MODELS:
        raise ValueError(f"automodel is run on models of type {', '.join(_MODELS)} here, not {config.model_type}")
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
    draws_its_own = isinstance(model, transformers.PreTrainedModel)  # as those of dense models do when they are made
    if draws_its_own:
        model.to(torch.bfloat16)
    else:
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
