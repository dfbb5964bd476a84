"""Settings of a run that depend on its model: checked by `prepare`, before a rank starts, and by each rank."""

from __future__ import annotations

from launcher.contract.errors import ModelError
from launcher.contract.spec import LoraSpec, RunSpec
from launcher.contract.stages import chunk_ranges
from launcher.contract.topology import expert_tensor_parallel, layers_per_stage
from sft.hf.adapter import all_targets, lora_problems, target_names
from sft.hf.expert_adapter import all_expert_targets, expert_lora_problems, expert_target_names
from sft.hf.learning_rates import rate_problems
from sft.hf.trained_routers import router_problems
from sft.models.architecture import Architecture, Experts


def check_model_settings(spec: RunSpec, architecture: Architecture) -> None:
    """Raise ModelError with every setting that this model cannot follow."""
    problems = [
        *_position_problems(spec, architecture),
        *_head_problems(spec, architecture),
        *_lora_problems(spec, architecture),
        *_router_problems(spec, architecture),
        *_linear_attention_problems(spec, architecture),
        *router_problems(spec.model.lora, architecture),
    ]
    if not problems:  # the names of adapters come from targets that exist
        problems += _stage_problems(spec, architecture)
        problems += rate_problems(spec.train.optimizer, spec.model.lora, architecture)
    if problems:
        raise ModelError(problems)


def trained_adapters(lora: LoraSpec, architecture: Architecture) -> dict[str, object]:
    """Return what decides what a run's adapters are and do, by config key. Nothing where all weights are trained."""
    if lora.rank is None:
        return {}
    names = [*target_names(architecture, lora), *expert_target_names(architecture, lora)]
    return {
        "model.lora.rank": lora.rank,
        "model.lora.alpha as a scale": lora.scale,
        "model.lora.dora": lora.dora,
        "model.lora.targets": list(dict.fromkeys(names)),
        "model.lora.router": lora.router,
    }


def longest_row(architecture: Architecture) -> int | None:
    """Return the tokens beyond which RoPE depends on the length of the batch, or None where it never does."""
    return min((rope.longest for rope in architecture.ropes if rope.longest is not None), default=None)


def _lora_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    lora, topo = spec.model.lora, spec.topology
    of_experts = expert_target_names(architecture, LoraSpec(rank=1))
    problems = lora_problems(lora, architecture, topo.tensor_parallel, of_experts)
    return problems or expert_lora_problems(lora, architecture, expert_tensor_parallel(topo))


def _stage_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    """Return whether pipeline stages would have nothing to train: a target need not be in every layer."""
    lora, topo, shape = spec.model.lora, spec.topology, architecture.shape
    chunks = topo.pipeline_parallel * topo.virtual_pipeline
    if lora.rank is None or topo.pipeline_parallel == 1 or chunks > shape.num_layers:
        return []
    trained = {target.layer for target in all_targets(architecture, lora)}
    trained |= {target.layer for target in all_expert_targets(architecture, lora)}
    if lora.router:
        trained |= {index for index, layer in enumerate(architecture.layers) if isinstance(layer.mlp, Experts)}
    ranges = chunk_ranges(layers_per_stage(spec, shape))
    idle = [
        stage
        for stage in range(topo.pipeline_parallel)
        if not any(layer in trained for own in ranges[stage :: topo.pipeline_parallel] for layer in own)
    ]
    if not idle:
        return []
    names = ", ".join(target_names(architecture, LoraSpec(rank=1)))
    return [
        f"model.lora.targets: none of {', '.join(lora.names)} is in the layers of pipeline stage "
        f"{', '.join(map(str, idle))} of {topo.pipeline_parallel}, which would train nothing; add a layer that it has "
        f"({names}), or set another topology.pipeline_parallel"
    ]


def _router_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    coefficient = spec.train.router_aux_loss
    if not coefficient or architecture.has_experts:
        return []
    kind = architecture.shape.model_type
    return [f"train.router_aux_loss {coefficient:g}: a {kind} model has no experts to use more evenly; set it to 0"]


def _linear_attention_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    chosen, kind = spec.train.linear_attention, architecture.shape.model_type
    if chosen == "auto" or architecture.shape.linear is not None:
        return []
    return [f"train.linear_attention {chosen}: a {kind} model has no linear attention; set it to auto"]


def _position_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    positions, length = architecture.shape.max_position_embeddings, spec.data.seq_length
    if not architecture.ropes and length > positions:
        return [
            f"data.seq_length {length}: this model has learned {positions} positions; set it to at most {positions}"
        ]
    longest = longest_row(architecture)
    answers = f" + evaluation.max_new_tokens {spec.evaluation.max_new_tokens}" if spec.evaluation.prompts else ""
    whole = length + (spec.evaluation.max_new_tokens if answers else 0)
    if longest is None or whole <= longest:
        return []
    return [
        f"data.seq_length {length}{answers}: beyond {longest} tokens this model's RoPE depends on the length of "
        f"the batch (rope_type dynamic or longrope), which is not supported; keep to at most {longest}"
    ]


def _head_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    """Return whether ranks would share a key head that is normed together with the others."""
    ranks, groups = spec.topology.tensor_parallel, architecture.shape.num_query_groups
    if ranks <= groups or not any(attention.width_norm for attention in architecture.attentions):
        return []
    return [
        f"topology.tensor_parallel {ranks}: this model norms its {groups} key heads together, which more ranks than "
        f"heads cannot; set it to at most {groups}"
    ]
