"""docs/models.md says what the registry and the tests over it say."""

from __future__ import annotations

from pathlib import Path

from tests.models_page import models_page


def test_the_page_is_made_from_the_registry() -> None:
    """Renew it with `python -m tests.models_page > docs/models.md`."""
    assert (Path(__file__).parents[3] / "docs" / "models.md").read_text() == models_page()
