"""Files of other trainers without a map of their columns, and files that are for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.reading.formats import Example, parse_row, with_detected_form
from sft.data.reading.messages import Message

Q, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def read(tmp_path: Path, row: dict[str, Any], **given: Any) -> Example:
    """The row as it is read in a file of its own."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row) + "\n")
    data = with_detected_form([file], DataSpec(**given), "data.train")
    return parse_row(json.dumps(row).encode(), "a.jsonl:1", data.format, data.columns)


@pytest.mark.parametrize("given", [{}, {"format": "prompt_completion"}])
def test_alpaca_needs_no_map(tmp_path: Path, given: dict[str, Any]) -> None:
    row = {"instruction": "Translate.", "input": "hello", "output": "bonjour"}
    example = read(tmp_path, row, **given)
    assert (example.prompt, example.completion) == ("Translate.\n\nhello", "bonjour")
    assert read(tmp_path, {**row, "input": ""}, **given).prompt == "Translate."
    del row["input"]
    assert read(tmp_path, row, **given).prompt == "Translate."
    system = read(tmp_path, {**row, "system": "Be brief.", "text": "all of it"}, **given)
    assert [turn.content for turn in system.messages] == ["Be brief.", "Translate.", "bonjour"]


def test_dolly_needs_no_map(tmp_path: Path) -> None:
    example = read(tmp_path, {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"})
    assert (example.prompt, example.completion, example.unread) == ("Who?\n\nAnn.", "Ann", ("category",))


def test_a_map_of_ones_own_counts(tmp_path: Path) -> None:
    row = {"instruction": "hi", "output": "yo", "better": "hello"}
    example = read(tmp_path, row, columns={"prompt": "instruction", "completion": "better"})
    assert (example.prompt, example.completion) == ("hi", "hello")


@pytest.mark.parametrize("given", [{}, {"format": "sharegpt"}])
@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "gpt"), ("user", "model")])
def test_sharegpt_with_role_and_content(tmp_path: Path, given: dict[str, Any], roles: tuple[str, str]) -> None:
    turns = [{"role": role, "content": turn["content"]} for role, turn in zip(roles, (Q, A), strict=True)]
    assert read(tmp_path, {"conversations": turns}, **given).messages == (
        Message("user", "hi"),
        Message("assistant", "yo"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, r"preference pairs, as for DPO.*\{completion: chosen\}"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, r"preference pairs, as for DPO.*\{messages: chosen\}"),
        ({"prompt": [Q]}, "a prompt and no answer, as for PPO or GRPO"),
        ({"question": "hi", "answer": "yo"}, "no format fits the keys 'question', 'answer'"),
    ],
)
def test_what_a_file_is_for_is_said(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)


def test_the_chosen_answers_of_pairs_can_be_trained(tmp_path: Path) -> None:
    row = {"chosen": [Q, A], "rejected": [Q, A]}
    assert len(read(tmp_path, row, columns={"messages": "chosen"}).messages) == 2
    pair = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    assert read(tmp_path, pair, columns={"completion": "chosen"}).completion == "a"
