"""The shipped JSON schemas and their page are those of the dataclasses, and every `--json` output has one."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from launcher.__main__ import build_parser, main
from launcher.api.answers import ANSWERS, FILES
from launcher.attempts.cause import Cause
from launcher.attempts.restart import Action
from launcher.commands.arguments import json_text
from launcher.contract.forms.events import EVENTS, CauseName
from launcher.contract.forms.page import json_reference
from launcher.contract.forms.schemas import FOLDER, read_schema, schema_names
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths, append_event
from launcher.runs.state import RunStatus
from tests.schemas import problems_of_answer, problems_of_run, runs_below

ROOT = Path(__file__).parents[3]


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


def test_a_field_that_no_schema_has_is_seen(tmp_path: Path) -> None:
    """The test of the tests' own look at what they make (tests/schemas.py)."""
    run = RunPaths(tmp_path / "run")
    run.logs.mkdir(parents=True)
    run.config.touch()
    append_event(run, "prepared", attempt="7.0")
    assert list(runs_below(tmp_path)) == [run.root]
    assert problems_of_run(run.root) == []
    run.events.unlink()
    append_event(run, "prepared", attempt="7.0", colour="red")
    append_event(run, "prepared")
    append_event(run, "unheard_of", attempt="7.0")
    found = problems_of_run(run.root)
    run.events.unlink()
    assert ["'colour' was unexpected" in found[0], "'attempt' is a required" in found[1]] == [True, True]
    assert found[2].startswith("run: events: ")


def test_an_answer_of_another_type_is_seen() -> None:
    row = RunStatus(run="a", directory="/a", state=JobState.RUNNING)
    assert problems_of_answer((row,), json_text((row,))) == []
    wrong = dataclasses.replace(row, step="3")  # type: ignore[arg-type]
    (problem,) = problems_of_answer((wrong,), json_text((wrong,)))
    assert problem.startswith("status[0].step: '3' is not valid")
