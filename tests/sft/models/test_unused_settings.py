"""What of a model's config a run leaves to its own is said."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.contract.spec import ModelSpec
from sft.models.unused_settings import unused_dropouts


def test_dropouts_of_the_model_that_are_not_used_are_named(tmp_path: Path) -> None:
    """Granite 3 and GPT-2 are published with a tenth, with which transformers trains."""
    (tmp_path / "config.json").write_text(json.dumps({"attn_pdrop": 0.1, "resid_pdrop": 0.1, "hidden_size": 64}))
    assert list(unused_dropouts(tmp_path, ModelSpec(hidden_dropout=0.1))) == [
        "model: attn_pdrop 0.1 of config.json is not used; model.attention_dropout is 0"
    ]
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"attention_dropout": 0.1}}))
    assert len(list(unused_dropouts(tmp_path, ModelSpec()))) == 1
    (tmp_path / "config.json").write_text(json.dumps({"attention_dropout": 0.0, "resid_pdrop": None}))
    assert not list(unused_dropouts(tmp_path, ModelSpec()))
