"""Settings of a model's config that change its training in transformers, and that a run takes from its own config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.model_shape import language_model_config
from launcher.contract.spec import ModelSpec

_OF_ATTENTION = ("attention_dropout", "attn_pdrop")
_OF_BRANCHES = ("resid_pdrop", "hidden_dropout", "residual_dropout", "embd_pdrop")


def unused_dropouts(model_dir: Path, model: ModelSpec) -> Iterator[str]:
    """Yield a remark for each dropout of config.json that the run does not train with."""
    config = language_model_config(json.loads((model_dir / "config.json").read_text(encoding="utf-8")))
    ours = {"model.attention_dropout": _OF_ATTENTION, "model.hidden_dropout": _OF_BRANCHES}
    for key, names in ours.items():
        used = model.attention_dropout if names is _OF_ATTENTION else model.hidden_dropout
        for name in names:
            value = config.get(name)
            if isinstance(value, int | float) and value and value != used:
                yield f"model: {name} {value:g} of config.json is not used; {key} is {used:g}"
