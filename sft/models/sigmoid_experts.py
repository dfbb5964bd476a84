"""What GLM-4.5, DeepSeek-V3 and dots.llm1 share: experts chosen by sigmoids and a bias that is not trained.

Their files hold further layers, which predict further tokens. They are not trained; exports have them as they were.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.llama_like import SILU, Layer, separate_experts, shared_expert
from sft.models.weight_map import frozen_vector


def sigmoid_experts(config: ConfigReader) -> Experts:
    """Return the experts of a config, beside a shared one."""
    shape = config.shape
    if not shape.shared_expert_size:
        config.refuse("n_shared_experts 0 is not supported: layers with experts have a shared one")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=config.flag("norm_topk_prob", default=True),
        scores="sigmoid",
        selection_bias=True,
        groups=int(config.number("n_group", 1)),
        chosen_groups=int(config.number("topk_group", 1)),
        scaling=config.number("routed_scaling_factor", 1.0),
        shared=SharedExpert(width=shape.shared_expert_size, weighted=False),
        activation=config.choice("hidden_act", SILU),
    )
    check_groups(config, experts)
    return experts


def check_groups(config: ConfigReader, experts: Experts) -> None:
    """Refuse groups that are unequal, or from which a token cannot have all its experts."""
    size, rest = divmod(experts.count, experts.groups) if experts.groups > 0 else (0, 1)
    if rest or (experts.groups > 1 and size < experts.best_of_group):
        config.refuse(f"n_group {experts.groups}: {experts.count} experts are no such number of equal groups")
    elif not 1 <= experts.chosen_groups <= experts.groups or experts.chosen > experts.chosen_groups * size:
        config.refuse(
            f"topk_group {experts.chosen_groups}: the {experts.chosen} experts of a token must fit into that many of "
            f"{experts.groups} groups of {size}"
        )


def sigmoid_expert_part(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer's router, experts and shared expert."""
    mlp = f"{prefix}mlp."
    return {
        **separate_experts(shape, f"{mlp}gate.weight", f"{mlp}experts.{{}}."),
        "mlp.router.bias": frozen_vector(f"{mlp}gate.e_score_correction_bias", shape.num_experts),
        **shared_expert(shape, f"{mlp}shared_experts."),
    }


def further_layers(config: ConfigReader, default: int = 1) -> tuple[str, ...]:
    """Return what the names of the further layers' tensors begin with.

    `default` is the number of these layers where none is stated.
    """
    count = int(config.number("num_nextn_predict_layers", config.number("num_mtp_layers", default)))
    return tuple(f"model.layers.{config.shape.num_layers + index}." for index in range(count))
