"""A Hugging Face directory as transformers loads it, also one that holds a language model among other parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from launcher.contract.rundir import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_transformers_model(
    model_dir: Path, dtype: torch.dtype | Literal["auto"], **options: object
) -> PreTrainedModel:
    """Return the model of `model_dir`, of the class that its config names for text. It takes seconds to import."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    multimodal = "text_config" in (read_json(model_dir / "config.json") or {})
    loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(model_dir, dtype=dtype, **options)
    _set_unit(model[0] if isinstance(model, tuple) else model)  # a tuple with `output_loading_info`
    return model


def _set_unit(model: PreTrainedModel) -> None:
    """Give the experts of gpt-oss the unit that the model's config states, which transformers reads from 5.19 on."""
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":
            for name, key in (("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")):
                setattr(module, name, getattr(model.config, key, getattr(module, name)))
