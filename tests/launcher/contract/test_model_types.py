"""The launcher's facts are those of model types that the ranks know."""

from __future__ import annotations

from launcher.contract.model_types import MODEL_TYPES, ModelType, facts_of
from sft.models.registry import SUPPORTED


def test_every_entry_is_of_a_family_and_says_something() -> None:
    assert set(MODEL_TYPES) <= set(SUPPORTED)
    assert list(MODEL_TYPES) == sorted(MODEL_TYPES)
    assert ModelType() not in MODEL_TYPES.values()


def test_other_types_are_like_llama() -> None:
    assert facts_of("llama") == facts_of("granite") == ModelType()
