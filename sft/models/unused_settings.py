"""Settings of a model's config that change its training in transformers, and that a run takes from its own config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.spec import ModelSpec, RunSpec
from launcher.contract.usual_keys import HfConfig, language_model_config

_OF_ATTENTION = ("attention_dropout", "attn_pdrop")
_OF_BRANCHES = ("resid_pdrop", "hidden_dropout", "residual_dropout", "embd_pdrop", "embedding_dropout")
_LEFT_OUT: dict[str, HfConfig] = {
    "gpt2": dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.1),
    "seed_oss": dict.fromkeys(("attention_dropout", "residual_dropout"), 0.1),
}
"""By model type: dropouts that transformers has where the config does not state them."""


def unused_settings(model_dir: Path, spec: RunSpec) -> Iterator[str]:
    """Yield a remark for each setting of config.json that transformers would train with and the run does not."""
    config = language_model_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    yield from _unused_dropouts(config, spec.model)
    coefficient = config.get("router_aux_loss_coef", "its default")
    if config.get("output_router_logits") and coefficient != 0 and not spec.train.router_aux_loss:
        yield (
            "model: output_router_logits of config.json is not used: transformers would add a loss of the routers, by "
            f"router_aux_loss_coef {coefficient}; train.router_aux_loss is 0"
        )


def _unused_dropouts(config: HfConfig, model: ModelSpec) -> Iterator[str]:
    stated = {**_LEFT_OUT.get(str(config.get("model_type")), {}), **config}
    ours = {"model.attention_dropout": _OF_ATTENTION, "model.hidden_dropout": _OF_BRANCHES}
    for key, names in ours.items():
        used = model.attention_dropout if names is _OF_ATTENTION else model.hidden_dropout
        for name in names:
            value = stated.get(name)
            if isinstance(value, int | float) and value and value != used:
                yield f"model: {name} {value:g} of config.json is not used; {key} is {used:g}"
