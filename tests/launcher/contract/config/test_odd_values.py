"""Values that no config should have: each is refused with its key and line, none is unforeseen."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.contract import yaml_document
from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError

BASE = "name: x\ncluster: local\nmodel: {path: MODEL}\n"
BASE += "data: {train: [DATA], columns: COLUMNS}\ntrain: {max_steps: STEPS}\n"
WHOLE = {"MODEL": "model", "DATA": "a.jsonl", "COLUMNS": "{}", "STEPS": "1"}


def problems(workdir: Path, **changed: str) -> list[str]:
    (workdir / "model").mkdir(exist_ok=True)
    (workdir / "a.jsonl").touch()
    text = BASE
    for name, value in {**WHOLE, **changed}.items():
        text = text.replace(name, value)
    (workdir / "cfg.yaml").write_text(text)
    try:
        load_config(workdir / "cfg.yaml")
    except ConfigError as error:
        return [problem.replace(f"{workdir}/", "") for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"STEPS": '"${x}"'}, "cfg.yaml:5: train.max_steps: '${x}' does not resolve"),
        ({"DATA": '"${x}"'}, "cfg.yaml:4: data.train: ['${x}'] does not resolve"),
        ({"COLUMNS": '"${x}"'}, "cfg.yaml:4: data.columns: '${x}' does not resolve"),
        ({"STEPS": '"${train.max_steps}"'}, "cfg.yaml:5: train.max_steps: '${train.max_steps}' does not resolve"),
        ({"DATA": "\"${oc.decode:'[1,2]'}\""}, "cfg.yaml:4: data.train: "),
        ({"COLUMNS": "\"${oc.decode:'[1,2]'}\""}, "cfg.yaml:4: data.columns: "),
        ({"COLUMNS": "{prompt: \"${oc.decode:'[1,2]'}\"}"}, "cfg.yaml:4: data.columns: "),
        ({"STEPS": "1, max_steps: 2"}, "cfg.yaml:5: key 'train.max_steps' is given twice; the first is on line 5"),
        ({"STEPS": "9" * 20}, f"cfg.yaml:5: train.max_steps: {'9' * 20} is not of at most 63 bits"),
        ({"STEPS": f"1, seed: {2**63}"}, f"cfg.yaml:5: train.seed: {2**63} is not of at most 63 bits"),
        ({"COLUMNS": "{}, max_lost_percent: nan"}, "cfg.yaml:4: data.max_lost_percent: nan is not from 0 to 100"),
        (
            {"COLUMNS": "{}, chat_template: none, chat_template_kwargs: {thinking: no}"},
            "cfg.yaml:4: data.chat_template_kwargs: thinking: of a chat template, and data.chat_template is none",
        ),
        ({"MODEL": "~nosuchuser/x"}, "cfg.yaml:3: model.path: ~nosuchuser/x does not exist"),
        ({"DATA": "~nosuchuser/x"}, "cfg.yaml:4: data.train: no file matches ~nosuchuser/x"),
        ({"MODEL": "m" * 300}, "cfg.yaml:3: model.path: "),
        ({"DATA": "m" * 5000}, "cfg.yaml:4: data.train: "),
        ({"DATA": '"**a/[*"'}, "cfg.yaml:4: data.train: no file matches **a/[*"),
    ],
)
def test_an_odd_value_has_its_key_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], message: str
) -> None:
    """Each was seen to be unforeseen, with exit code 1 and without a key."""
    monkeypatch.chdir(tmp_path)
    before = problems(tmp_path)
    found = [problem for problem in problems(tmp_path, **changed) if problem not in before]
    assert any(problem.startswith(message) for problem in found), found


def test_more_files_than_ranks_should_read_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """450,000 took more than three minutes."""
    monkeypatch.chdir(tmp_path)
    found = problems(tmp_path, DATA=", ".join(["a.jsonl"] * 20_001))
    assert any(problem.startswith("cfg.yaml:4: data.train: 20,001 items, and at most 20,000") for problem in found)
    monkeypatch.setattr("launcher.contract.config.checks.data.MOST_ITEMS", 2)
    for name in "bcd":
        (tmp_path / f"{name}.jsonl").touch()
    found = problems(tmp_path, DATA='"*.jsonl"')
    assert any(problem.startswith("cfg.yaml:4: data.train: 4 files, and at most 2 are read") for problem in found)
    assert yaml_document.MOST_ITEMS == 20_000


@pytest.mark.parametrize("form", ["\n  - r/{}.jsonl", " r/{}.jsonl,"])
def test_a_list_of_450000_files_is_refused_at_once(workdir: Path, form: str) -> None:
    items = "".join(form.format(number) for number in range(450_000))
    Path("cfg.yaml").write_text(f"data:\n train: {items if '-' in form else f'[{items}]'}\n")
    began = time.process_time()
    with pytest.raises(
        ConfigError, match=r"450,00\d (lines|commas).* a list has at most 20,000 items, since each rank"
    ):
        load_config(Path("cfg.yaml"))
    assert time.process_time() - began < 1  # PyYAML takes 20 s
