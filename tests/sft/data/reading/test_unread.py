"""Keys that nobody reads: refused where they change what is trained, else named with their numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec, EvaluationSpec, LoggingSpec, RunSpec, SourceSpec
from sft.data.cache.store import MOST_UNREAD
from sft.data.prepared.ignored_keys import check_ignored_keys
from sft.data.prepared.prepare import open_or_build, prepare_data
from sft.data.reading.formats import parse_row
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer, write_jsonl

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
PAIR = {"prompt": "hi", "completion": "yo"}
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
IDS = {"input_ids": [1, 2], "labels": [-100, 2]}


def unread(row: dict[str, Any], row_format: str, *ignored: str, **columns: str) -> tuple[str, ...]:
    return parse_row(json.dumps(row).encode(), "a.jsonl:3", row_format, columns, ignored).unread


@pytest.mark.parametrize(
    ("row", "row_format", "key"),
    [
        ({**PAIR, "context": "c"}, "prompt_completion", "context"),
        ({**PAIR, "instruction": "c"}, "prompt_completion", "instruction"),
        ({**PAIR, "system_prompt": "Answer in French."}, "prompt_completion", "system_prompt"),
        ({**PAIR, "weight": 0.5}, "prompt_completion", "weight"),
        ({"messages": CHAT, "documents": ["d"]}, "messages", "documents"),
        ({"messages": CHAT, "image": "a.png"}, "messages", "image"),
        ({"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}}, "messages", "chat_template_kwargs"),
        ({"conversations": SHARED, "system_message": "s"}, "sharegpt", "system_message"),
        ({**IDS, "completion_mask": [0, 1]}, "tokens", "completion_mask"),
        ({"text": "t", "images": ["a.png"]}, "text", "images"),
        ({"text": "t", "weight": 0.1}, "text", "weight"),
        ({**PAIR, "reasoning_content": "hm"}, "prompt_completion", "reasoning_content"),
        ({**PAIR, "tool_calls": [{"name": "f"}]}, "prompt_completion", "tool_calls"),
        ({"messages": CHAT, "loss_weights": [0.1]}, "messages", "loss_weights"),
    ],
)
def test_keys_that_change_the_training_are_refused_until_they_are_named(
    row: dict[str, Any], row_format: str, key: str
) -> None:
    """Each was seen to be dropped without a word."""
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {key} would be left out of training") as caught:
        unread(row, row_format)
    assert "data.ignore_keys" in str(caught.value)
    assert unread(row, row_format, key) == (key,)
    assert unread({**row, key: None}, row_format) == ()


@pytest.mark.parametrize(
    "key",
    [
        *("loss", "training", "train_detail", "image", "thoughts"),
        *("tools", "function_calls", "tool_plan", "tool_responses", "refusal", "channel", "recipient"),
    ],
)
def test_keys_of_turns_that_change_the_training_are_refused(key: str) -> None:
    """`"loss": false` chooses in other trainers what is learnt; `channel` says in harmony that this is no answer."""
    row = {"messages": [CHAT[0], {**CHAT[1], key: False}]}
    with pytest.raises(DataError, match=rf"messages\[1\]: {key} would be left out of training"):
        unread(row, "messages")
    assert unread(row, "messages", key) == (f"messages[].{key}",)


def test_keys_of_turns_in_json_text_are_named_too() -> None:
    """As CSV holds them. Seen to be left out without a word."""
    turns = json.dumps([CHAT[0], {**CHAT[1], "mood": "calm"}])
    assert unread({"messages": turns}, "messages") == ("messages[].mood",)
    assert unread({"prompt": "[1", "completion": "[2]"}, "prompt_completion") == ()


def test_reasoning_beside_the_value_of_a_sharegpt_turn_is_refused() -> None:
    row = {"conversations": [SHARED[0], {**SHARED[1], "reasoning_content": "hm"}]}
    with pytest.raises(DataError, match=r"conversations\[1\]: reasoning_content would be left out"):
        unread(row, "sharegpt")


def test_a_weight_of_one_and_mapped_columns_change_nothing() -> None:
    assert unread({**PAIR, "weight": 1.0}, "prompt_completion") == ("weight",)
    row = {"q": {"text": "hi"}, "completion": "yo", "context": "c", "system_prompt": "s"}
    columns = {"prompt": "q.text", "input": "context", "system": "system_prompt"}
    assert unread(row, "prompt_completion", **columns) == ()


def test_everything_that_is_read_is_not_named() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [
        {"role": "user", "content": "hi", "name": "me", "weight": 0.5, "train": False},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    assert unread({"messages": turns, "system": "s", "tools": [tool]}, "messages") == ()
    masks = {"attention_mask": [1, 1], "position_ids": [0, 1], "seq_lengths": [2]}
    assert unread({**IDS, **masks, "loss_mask": [0, 1]}, "tokens") == ()


@pytest.mark.parametrize("label", [True, False, "True"])
def test_feedback_for_kto_is_refused_by_a_sentence(label: object) -> None:
    """The row's answer would be learnt, although it is the bad one."""
    with pytest.raises(DataError, match="feedback for KTO, in which an answer with label false is a bad one"):
        unread({**PAIR, "label": label}, "prompt_completion")
    assert unread({**PAIR, "label": 3}, "prompt_completion") == ("label",)
    with pytest.raises(DataError, match="Keep the rows whose 'kto_tag' is true"):
        unread({"messages": CHAT, "kto_tag": label}, "messages")


def test_labels_and_a_mask_that_disagree_are_refused() -> None:
    """The labels were seen to be ignored beside a mask."""
    assert unread({**IDS, "loss_mask": [0, 1]}, "tokens") == ()
    with pytest.raises(DataError, match="'labels' and 'loss_mask' do not train the same tokens"):
        unread({**IDS, "loss_mask": [1, 1]}, "tokens")


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def spec_of(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> RunSpec:
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    values = {"train": [str(file)], "cache_dir": str(tmp_path / "cache"), "workers": 1, **data}
    return RunSpec(data=DataSpec(**values), logging=LoggingSpec(progress_bar=False))


def test_prepare_names_each_key_once_with_the_number_of_rows(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [CHAT[0], {**CHAT[1], "score": 1}, CHAT[0], {**CHAT[1], "score": 2}]
    rows = [{"messages": turns, "id": n} for n in range(3)] + [{"messages": CHAT, "id": 4}]
    spec = spec_of(tmp_path, rows)
    expected = "not read: 'id' in 4 rows, 'messages[].score' in 3 rows;"
    prepare_data(spec, tokenizer_dir)
    assert capsys.readouterr().out.count(expected) == 1
    prepare_data(spec, tokenizer_dir)  # from the cache
    assert capsys.readouterr().out.count(expected) == 1


def test_prepare_tells_names_that_the_chat_template_does_not_write(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to be dropped without a word, as a key that is read."""
    named = [{**CHAT[0], "name": "ann"}, CHAT[1]]
    spec = spec_of(tmp_path, [{"messages": named}, {"messages": CHAT}, {"messages": named}])
    prepare_data(spec, tokenizer_dir)
    assert "not read: 'messages[].name (by the chat template)' in 2 rows;" in capsys.readouterr().out
    template = tmp_path / "named.jinja"
    template.write_text(CHAT_TEMPLATE.replace("message['role']", "message['role'] + message.get('name', '')"))
    prepare_data(
        dataclasses.replace(spec, data=dataclasses.replace(spec.data, chat_template=str(template))), tokenizer_dir
    )
    assert "not read" not in capsys.readouterr().out


def test_a_column_that_no_row_has_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to be skipped without a word, as a row may lack it."""
    rows = [{**PAIR, "more": "m"}, PAIR, {**PAIR, "more": None}]
    found = open_or_build(spec_of(tmp_path, rows, columns={"input": "more"}), tokenizer_dir, build=True)
    assert len(found.train) == 3
    with pytest.raises(DataError, match="reads input from 'moer', which none of 3 rows has"):
        open_or_build(spec_of(tmp_path, rows, columns={"input": "moer"}), tokenizer_dir, build=True)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("context", None),
        ("score", None),  # of a turn
        ("held", None),
        ("history", None),  # of the prompts to answer
        ("contxt", "take it out, or write it as the rows do; did you mean 'context'"),
        ("empty", "no row has a key 'empty' with a value"),
        ("completion", "no row has a key 'completion' with a value that nothing reads"),
    ],
)
def test_an_ignored_key_that_no_row_has_is_refused(
    name: str, problem: str | None, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Seen to say nothing; of several data sets each may have its own keys."""
    rows = [{**PAIR, "context": "c", "empty": None}, {"prompt": CHAT[:1], "completion": [{**CHAT[1], "score": 1}]}]
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{**PAIR, "held": 1}])
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "?", "history": ["h"]}])
    settings = {"validation": [str(held_out)], "require_end_tokens": False}
    spec = spec_of(tmp_path, rows, ignore_keys=["context", name], **settings)
    spec = dataclasses.replace(spec, evaluation=EvaluationSpec(prompts=str(prompts)))
    caches = open_or_build(spec, tokenizer_dir, build=True).caches
    if problem is None:
        check_ignored_keys(spec, caches)
        return
    with pytest.raises(DataError, match=f"data.ignore_keys: .*{problem}"):
        check_ignored_keys(spec, caches)
    many = [dataclasses.replace(caches[0], unread={str(n): 1 for n in range(MOST_UNREAD)}), *caches[1:]]
    check_ignored_keys(spec, many)


@pytest.mark.parametrize(
    ("row", "columns", "formats"),
    [
        ({"messages": CHAT, "ctx": "c"}, {"input": "ctx"}, "messages"),
        ({"text": "t", "sys": "s"}, {"system": "sys"}, "text"),
        ({**PAIR, "mask": [1]}, {"loss_mask": "mask"}, "prompt_completion"),
    ],
)
def test_a_column_that_the_format_does_not_read_is_refused(
    row: dict[str, Any], columns: dict[str, str], formats: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """Seen to be left out without a word, since the rows have it."""
    spec = spec_of(tmp_path, [row], columns=columns, require_end_tokens=False)
    name = next(iter(columns))
    with pytest.raises(DataError, match=rf"data\.columns: {name} is not read in rows of format {formats}, so that"):
        open_or_build(spec, tokenizer_dir, build=True)
    source = SourceSpec(files=spec.data.train, columns=columns)
    data = dataclasses.replace(spec.data, train=[], columns={}, sources={"one": source})
    with pytest.raises(DataError, match=rf"data\.sources\.one\.columns: {name} is not read"):
        open_or_build(dataclasses.replace(spec, data=data), tokenizer_dir, build=True)


def test_a_column_may_be_for_the_held_out_data_alone(tmp_path: Path, tokenizer_dir: Path) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [{"turns": CHAT}])
    columns = {"prompt": "q", "completion": "a", "messages": "turns"}
    for keys in ({"validation": [str(held_out)]}, {"validation_sets": {"one": str(held_out)}}):
        spec = spec_of(tmp_path, [{"q": "hi", "a": "yo"}], columns=columns, **keys)
        assert len(open_or_build(spec, tokenizer_dir, build=True).train) == 1
