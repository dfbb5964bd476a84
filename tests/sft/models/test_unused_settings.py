"""What of a model's config a run leaves to its own is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.spec import ModelSpec, RunSpec, TrainSpec
from sft.models.registry import SUPPORTED
from sft.models.unused_settings import unused_settings


def remarks(directory: Path, config: dict[str, object], spec: RunSpec) -> list[str]:
    (directory / "config.json").write_text(json.dumps(config))
    return list(unused_settings(directory, spec))


def test_dropouts_of_the_model_that_are_not_used_are_named(tmp_path: Path) -> None:
    """Granite 3 and GPT-2 are published with a tenth, with which transformers trains."""
    stated = {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "hidden_size": 64}
    assert remarks(tmp_path, stated, RunSpec(model=ModelSpec(hidden_dropout=0.1))) == [
        "model: attn_pdrop 0.1 of config.json is not used; model.attention_dropout is 0"
    ]
    assert len(remarks(tmp_path, {"text_config": {"attention_dropout": 0.1}}, RunSpec())) == 1
    assert not remarks(tmp_path, {"attention_dropout": 0.0, "resid_pdrop": None}, RunSpec())


@pytest.mark.parametrize("name", SUPPORTED)
def test_dropouts_that_transformers_has_by_default_are_named_too(name: str, tmp_path: Path) -> None:
    """Those of GPT-2, whose config may leave them out."""
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(name).to_dict()
    defaults = defaults.get("text_config", defaults)
    active = {key for key, value in defaults.items() if ("drop" in key or key.endswith("pdrop")) and value}
    active -= {"summary_first_dropout"}  # of a head for multiple choice
    found = remarks(tmp_path, {"model_type": name}, RunSpec())
    assert {remark.split()[1] for remark in found} == active


def test_a_loss_of_routers_that_is_not_used_is_named(tmp_path: Path) -> None:
    stated: dict[str, object] = {"model_type": "mixtral", "output_router_logits": True, "router_aux_loss_coef": 0.02}
    (remark,) = remarks(tmp_path, stated, RunSpec())
    assert "router_aux_loss_coef 0.02; train.router_aux_loss is 0" in remark
    assert not remarks(tmp_path, stated, RunSpec(train=TrainSpec(router_aux_loss=0.01)))
    assert not remarks(tmp_path, {**stated, "output_router_logits": False}, RunSpec())
    assert not remarks(tmp_path, {**stated, "router_aux_loss_coef": 0.0}, RunSpec())
