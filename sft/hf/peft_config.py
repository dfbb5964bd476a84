"""adapter_config.json: what PEFT needs to put an exported adapter on its model.

transformers keeps the matrices of all experts in two tensors, also of models whose files, and so whose adapters, name
them by expert. PEFT adapts such tensors as `target_parameters`. For some model types it makes these itself of the names
in `target_modules`, but then of nothing else that has the same names. What PEFT is not told of stays without its
adapter, and it does not say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.contract.hub_cache import snapshot_of
from launcher.contract.spec import LoraSpec
from sft.hf.adapter import AdapterTarget
from sft.hf.expert_adapter import ExpertTarget
from sft.hf.trained_routers import modules_to_save
from sft.models.architecture import Architecture

_CONVERTED = (
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite"),
    *("minimax_m2", "mixtral", "olmoe", "qwen3_moe", "qwen3_next"),
)
"""Model types of which PEFT takes the names of experts' layers for their tensors."""
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"


def peft_config(
    lora: LoraSpec,
    architecture: Architecture,
    base: Path,
    targets: Sequence[AdapterTarget],
    of_experts: Sequence[ExpertTarget],
) -> dict[str, object]:
    """Return adapter_config.json of these adapters for the model in `base`.

    A model of the hub is named by its id and commit: its path in the cache means nothing elsewhere.
    """
    assert lora.rank is not None
    snapshot = snapshot_of(str(base))
    alpha, rslora = lora.rank if lora.alpha is None else lora.alpha, lora.rslora
    if rslora and any(target.tensor is None for target in of_experts):
        # PEFT joins two adapters of an expert to one of twice the rank and twice the alpha, which is another scale with
        # rsLoRA. So its alpha / sqrt(rank) is stated as what a plain adapter has.
        alpha, rslora = lora.scale * lora.rank, False
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base) if snapshot is None else snapshot.repository.id,
        "revision": None if snapshot is None else snapshot.commit,
        "r": lora.rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": lora.dropout,
        "target_modules": _target_modules(architecture, targets, of_experts),
        **_of_tensors(lora.rank, alpha, architecture, targets, of_experts),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": modules_to_save(architecture, lora),
        "use_dora": lora.dora,
        "use_rslora": rslora,
    }


def _target_modules(
    architecture: Architecture, targets: Sequence[AdapterTarget], of_experts: Sequence[ExpertTarget]
) -> list[str]:
    """Return the names by which PEFT finds the targets.

    Those of a multimodal model are whole ones: its vision tower has layers of the same last names.
    """
    weights = architecture.weights
    if weights.language_prefix is not None:
        return [weights.module(target.module) for target in targets]
    by_expert = [target.name for target in of_experts if target.tensor is None and _is_converted(architecture)]
    return list(dict.fromkeys([*(target.name for target in targets), *by_expert]))


def _of_tensors(
    rank: int,
    alpha: float,
    architecture: Architecture,
    targets: Sequence[AdapterTarget],
    of_experts: Sequence[ExpertTarget],
) -> dict[str, object]:
    """Return the settings about tensors that are adapted and not modules, and of ranks that are not all others'."""
    by_expert = [target for target in of_experts if target.tensor is None]
    names = {target.name for target in by_expert}
    if by_expert and _is_converted(architecture):
        same = [f"{architecture.weights.module(target.module)}.weight" for target in targets if target.name in names]
        return {"target_parameters": same} if same else {}
    if by_expert:
        # Gate and up projection are one tensor in transformers; PEFT joins their two adapters to one of twice the rank.
        joined = {_DOWN if target.linear.endswith("fc2") else _GATE_UP: None for target in by_expert}
        twice = {"rank_pattern": {_GATE_UP: 2 * rank}, "alpha_pattern": {_GATE_UP: _whole(2 * alpha)}}
        of_all = {"target_parameters": [f"mlp.experts.{name}" for name in joined]}
        return {**of_all, **(twice if _GATE_UP in joined else {})}
    parameters = list(dict.fromkeys(_within_layer(str(target.tensor)) for target in of_experts))
    return {"target_parameters": parameters} if parameters else {}


def _within_layer(tensor: str) -> str:
    """Return the name of a tensor without that of its layer."""
    return tensor.rpartition(".layers.")[2].partition(".")[2]


def _is_converted(architecture: Architecture) -> bool:
    return architecture.shape.model_type in _CONVERTED


def _whole(alpha: float) -> float | int:
    """Return the number as PEFT's own files have it."""
    return int(alpha) if float(alpha).is_integer() else alpha
