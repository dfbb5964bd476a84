"""docs/explanation/threats.md: every claim names a test, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "explanation" / "threats.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def claims() -> list[tuple[str, str]]:
    """Claim and tests of every row of a table."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [(row[0], row[1]) for row in rows if row != ["claim", "test"]]


def test_every_claim_names_a_test() -> None:
    assert len(claims()) > 10
    assert [claim for claim, tests in claims() if not NAMED.search(tests)] == []


def test_every_named_test_exists() -> None:
    functions: dict[str, set[str]] = {}
    for file, _ in NAMED.findall(PAGE):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert [f"{file}::{name}" for file, name in NAMED.findall(PAGE) if name not in functions[file]] == []
