"""Prompts are written as training writes them; what a metric function returns is checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import ConfigError, DataError, ModelError
from launcher.contract.spec import DataSpec, EvaluationSpec, RunSpec
from sft.generation.evaluation_prompts import (
    averages,
    check_prompts,
    metric_function,
    read_prompts,
    stop_tokens,
    trimmed,
)
from tests.tiny_model import VOCAB_SIZE, make_tokenizer, write_jsonl

TOKENIZER = make_tokenizer()


def prompts(tmp_path: Path, *rows: dict[str, Any], **data: Any) -> list[Any]:
    return read_prompts(write_jsonl(tmp_path / "prompts.jsonl", rows), TOKENIZER, RunSpec(data=DataSpec(**data)))


def test_a_prompt_is_the_template_with_its_generation_prompt(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "I saw 3 otters."}]
    plain, chat = prompts(tmp_path, {"prompt": "I saw 3 otters."}, {"messages": turns})
    assert plain.text == "<|im_start|>user\nI saw 3 otters.<|im_end|>\n<|im_start|>assistant\n"
    for prompt, messages in ((plain, turns[1:]), (chat, turns)):
        expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(prompt.ids) == expected


def test_what_stands_beside_a_prompt_is_read(tmp_path: Path) -> None:
    """Seen to be ignored: `system` and `tools`. Lines end at line feeds alone; a byte order mark is no part of one."""
    (prompt,) = prompts(tmp_path, {"prompt": "I saw 3 otters.", "system": "Be brief."})
    assert prompt.text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nI saw")
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the chat template does not write the tools"):
        prompts(tmp_path, {"prompt": "Rain?", "tools": [{"name": "weather"}]})
    file = tmp_path / "marks.jsonl"
    file.write_bytes('\ufeff{"prompt": "one\u2028two\u0085three"}\r\n'.encode())
    (prompt,) = read_prompts(file, TOKENIZER, RunSpec(data=DataSpec(chat_template="none")))
    assert prompt.text == "one\u2028two\u0085three"


def test_a_prompt_that_is_answered_already_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the last turn is the assistant's"):
        prompts(tmp_path, {"messages": turns})


def test_text_never_becomes_a_control_token(tmp_path: Path) -> None:
    (prompt,) = prompts(tmp_path, {"prompt": "<|im_end|>"})
    assert prompt.ids.count(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == 1


def test_without_a_template_the_text_is_the_prompt(tmp_path: Path) -> None:
    (prompt,) = prompts(tmp_path, {"prompt": "I saw"}, chat_template="none")
    assert list(prompt.ids) == TOKENIZER("I saw")["input_ids"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"prompts.jsonl:1: a row has prompt \(a text\) or messages"),
        ({"prompt": 3}, r"prompts.jsonl:1: a row has prompt"),
        ({"messages": "?"}, r"prompts.jsonl:1: messages"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "name": "f", "arguments": {}}]},
                    {"role": "tool", "content": "4", "tool_call_id": "b"},
                ]
            },
            r"prompts.jsonl:1: messages\[1\]: tool_call_id 'b' is that of no call before it; these have 'a'",
        ),
        ({"prompt": "?", "system_prompt": "Be brief."}, r"prompts.jsonl:1: system_prompt would be left out of the"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts(tmp_path, row)


def test_ids_that_are_given_are_the_prompt(tmp_path: Path) -> None:
    (prompt,) = prompts(tmp_path, {"prompt": "I saw", "input_ids": [7, 5, 300]})
    assert (prompt.text, prompt.ids) == ("I saw", (7, 5, 300))
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: 'input_ids' must be a list of token ids"):
        prompts(tmp_path, {"prompt": "I saw", "input_ids": "7"})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Four. Human: and", "Four."),
        ("Four.\nAssistant: x Human:", "Four."),
        (" Four. ", " Four. "),
        ("Human:", ""),
    ],
)
def test_an_answer_ends_before_the_first_stop_sequence(answer: str, expected: str) -> None:
    assert trimmed(answer, ["Human:", "Assistant:"]) == expected


def test_no_prompt_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no prompt"):
        prompts(tmp_path)


def test_stop_tokens_are_those_of_tokenizer_model_and_config(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    spec = RunSpec(evaluation=EvaluationSpec(stop_tokens=["<|im_start|>"]))
    assert stop_tokens(spec, TOKENIZER, tmp_path) == {0, 1, 2, 3}
    with pytest.raises(ModelError, match=r"evaluation\.stop_tokens: 'no such' is not a token"):
        stop_tokens(RunSpec(evaluation=EvaluationSpec(stop_tokens=["no such"])), TOKENIZER, tmp_path)


@pytest.mark.parametrize(
    "config", [{"eos_token_id": [0, 3]}, {"eos_token_id": None, "text_config": {"eos_token_id": 3}}]
)
def test_without_generation_settings_the_end_tokens_of_the_model_config_count(
    config: dict[str, object], tmp_path: Path
) -> None:
    """Seen not to, though transformers stops at them: answers in evaluations went on."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert 3 in stop_tokens(RunSpec(), TOKENIZER, tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert 3 not in stop_tokens(RunSpec(), TOKENIZER, tmp_path)


def test_averages() -> None:
    assert averages("m:f", {"a": [1.0, 2.0, 6.0], "b": 4}, 3) == {"metric/a": 3.0, "metric/b": 4.0}


@pytest.mark.parametrize("result", [3.0, {"a": "text"}, {"a": [1.0, 2.0]}, {"a": None}, {"a": []}])
def test_other_results_are_refused(result: Any) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.metric: m:f returned"):
        averages("m:f", result, 3)


def test_metric_function_is_found_or_named() -> None:
    assert metric_function("math:sqrt") is math.sqrt
    for name in ("no_such_package:f", "math:no_such_function", "math:pi"):
        with pytest.raises(ConfigError, match=rf"evaluation\.metric: {name}"):
            metric_function(name)


def test_prompts_are_checked_before_ranks_start(
    tmp_path: Path, tokenizer_dir: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tokenizer_dir()
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "How many?"}] * 3)
    check_prompts(RunSpec(), directory, directory, VOCAB_SIZE)
    assert capsys.readouterr().out == ""
    spec = RunSpec(evaluation=EvaluationSpec(prompts=str(file), metric="math:sqrt"))
    check_prompts(spec, directory, directory, VOCAB_SIZE)
    assert capsys.readouterr().out.startswith("prompts: 3 to answer at each evaluation, the longest of ")
    with pytest.raises(ConfigError, match="cannot be imported"):
        other = RunSpec(evaluation=EvaluationSpec(prompts=str(file), metric="math:no"))
        check_prompts(other, directory, directory, VOCAB_SIZE)
    write_jsonl(file, [{"prompt": "?", "input_ids": [5, VOCAB_SIZE]}])
    with pytest.raises(DataError, match=rf"token id {VOCAB_SIZE} is not in the model's vocabulary of {VOCAB_SIZE}"):
        check_prompts(spec, directory, directory, VOCAB_SIZE)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Callable[[], Path]:
    def save() -> Path:
        TOKENIZER.save_pretrained(tmp_path / "tokenizer")
        return tmp_path / "tokenizer"

    return save
