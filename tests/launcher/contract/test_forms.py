"""The shipped JSON schemas and their page are those of the dataclasses, and every `--json` output has one."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import jsonschema
import pytest

from launcher.__main__ import build_parser, main
from launcher.api.answers import ANSWERS, FILES
from launcher.attempts.cause import Cause
from launcher.attempts.restart import Action
from launcher.contract.forms.events import EVENTS, CauseName
from launcher.contract.forms.page import json_reference
from launcher.contract.forms.schemas import FOLDER, read_schema, schema_names

ROOT = Path(__file__).parents[3]


def made_schemas() -> dict[str, object]:
    loader = SourceFileLoader("schemas", str(ROOT / "scripts" / "schemas"))
    spec = spec_from_loader("schemas", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return dict(module.schemas())


def test_schemas_and_page_are_up_to_date() -> None:
    """Renew them with scripts/schemas."""
    pytest.importorskip("pydantic", reason="schemas are made with pydantic")
    made = made_schemas()
    assert {name: read_schema(name) for name in schema_names()} == made
    assert (ROOT / "docs" / "reference" / "json.md").read_text() == json_reference()


def test_every_schema_is_one() -> None:
    names = schema_names()
    assert set(names) == {*ANSWERS, *FILES}
    for name in names:
        schema = read_schema(name)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$id"].endswith(f":v{FOLDER.name[1:]}:{name}")


def test_every_json_output_has_a_schema() -> None:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    with_json = {
        name
        for name, parser in commands.choices.items()
        if any("--json" in action.option_strings for action in parser._actions)
    }
    assert with_json == set(ANSWERS) - {"why"}  # which `status` prints


def test_every_field_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in json_reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert [row[0] for row in rows if len(row[-1].removesuffix(" |").strip()) < 3] == ["| `prepared`"]


def test_words_of_decisions_are_those_of_the_policy() -> None:
    schema = read_schema("events")["$defs"]["RestartDecided"]["properties"]
    assert schema["cause"]["enum"] == [cause.value for cause in Cause] == list(CauseName.__args__)  # type: ignore[attr-defined]
    assert schema["decision"]["enum"] == [action.value for action in Action]
    assert len(EVENTS) == len(read_schema("events")["$defs"]) - 3


def test_schema_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert capsys.readouterr().out.split() == schema_names()
    assert main(["schema", "status"]) == 0
    assert json.loads(capsys.readouterr().out) == read_schema("status")
    assert main(["schema", "statsu"]) == 2
    assert "did you mean 'status'?" in capsys.readouterr().err


def test_dataclass_modules_need_no_pydantic() -> None:
    tell = "import sys, launcher.api.answers; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", tell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
