"""Long conversations: the masks of rendering every prefix, in a small part of its work."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding import chat as chat_module
from sft.data.encoding.chat import ChatRenderer
from sft.data.encoding.masking import Encoded, Encoder
from sft.data.reading.formats import Example
from sft.data.reading.messages import Message, read_messages, read_tools
from tests.sft.data.encoding.test_mask_oracle import CALLING, TOOLS, Family, expected_outcomes, turn
from tests.sft.data.encoding.test_masking import PLAIN_TEMPLATE, THINK_TEMPLATE
from tests.sft.tokenizers_for_tests import LLAMA_TEMPLATE
from tests.tiers import thinned
from tests.tiny_model import CHAT_TEMPLATE, make_tokenizer

HEAD = "<|im_start|>{{ message['role'] }}\n"
FIRST_ONLY = CHAT_TEMPLATE.replace(HEAD, "{% if loop.first %}first\n{% endif %}" + HEAD)
NUMBERED = CHAT_TEMPLATE.replace(HEAD, HEAD.replace("\n", " {{ loop.index }}\n"))
BY_FIFTH = CHAT_TEMPLATE.replace(HEAD, "{{ '?' if messages[4:5] and message.role == 'user' }}" + HEAD)
BY_LENGTH = CHAT_TEMPLATE.replace(HEAD, "{{ '!' if messages | length > 40 }}" + HEAD)


def conversation(pairs: int, special: dict[int, str] | None = None) -> Example:
    turns = [Message("system", "be brief")]
    for number in range(pairs):
        said = (special or {}).get(number, f"answer number {number % 7}")
        turns += [Message("user", f"question {number % 5}"), Message("assistant", said)]
    return Example(where="a.jsonl:1", messages=tuple(turns))


def encode(example: Example, template: str) -> Encoded:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    (only,) = Encoder(tokenizer, DataSpec(seq_length=10**6)).encode(example)
    return only


def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "LONG", 10**9)


def same(one: Encoded, other: Encoded) -> bool:
    arrays = ("ids", "weights", "ends")
    equal = all((getattr(one, name) == getattr(other, name)).all() for name in arrays)
    return equal and (one.answers, one.straddling) == (other.answers, other.straddling)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, LLAMA_TEMPLATE, PLAIN_TEMPLATE, FIRST_ONLY])
def test_masks_are_those_of_rendering_every_prefix(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    example = conversation(30, {12: "x<|im_end|>y"})
    at_once = encode(example, template)
    one_by_one(monkeypatch)
    assert same(at_once, encode(example, template))
    assert at_once.answers == 30


@pytest.mark.parametrize("template", [NUMBERED, BY_FIFTH, BY_LENGTH])
def test_templates_that_look_at_the_whole_are_taken_at_their_word(
    monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    """Behind a short history they write something else, so that every prefix is rendered."""
    found: list[object] = []
    for _ in range(2):
        try:
            found.append(encode(conversation(30), template).weights.tolist())
        except DataError as error:
            found.append(error.problems)
        one_by_one(monkeypatch)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["turns", "tools"])
@pytest.mark.parametrize("name", thinned(expected_outcomes(), "qwen2_5", "qwen3", "gemma3", "deepseekv3"))
def test_masks_of_real_templates_are_those_of_rendering_every_prefix(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    family = Family(name)
    once = (
        [*CALLING, turn("assistant", "No rain.")] if kind == "tools" else [turn("user", "Hi"), turn("assistant", "Yo")]
    )
    messages = read_messages(once * 26, "row: messages", {})
    example = Example(where="row", messages=messages, tools=read_tools(TOOLS if kind == "tools" else None, "row"))
    found: list[Any] = []
    for _ in range(2):
        try:
            found.append(Encoder(family.tokenizer, DataSpec(seq_length=10**6)).encode(example))
        except DataError as error:
            found.append(error.problems)
        one_by_one(monkeypatch)
    at_once, each = found
    if isinstance(each, tuple):
        assert at_once == each
    else:
        assert all(map(same, at_once, each))


def test_a_turn_that_a_template_rewrites_is_found_among_many() -> None:
    """Only this one is written differently once others follow, and it is not among those that are checked exactly."""
    example = conversation(40, {17: "<think>hm</think>seventeen"})
    with pytest.raises(DataError, match=r"message 37 \(assistant\): the chat template rewrites, once turns follow"):
        encode(example, THINK_TEMPLATE)
    split = Encoder(_tokenizer(THINK_TEMPLATE), DataSpec(seq_length=10**6, on_mismatch="split")).encode(example)
    assert sum(each.answers for each in split) == 40


def _tokenizer(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_800_turns_take_the_work_of_some_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    """200, 400 and 800 pairs were seen to take 2, 15 and 46 seconds."""
    rendered = 0
    apply = ChatRenderer.apply

    def counted(self: ChatRenderer, messages: Any, tools: Any, generation_prompt: bool) -> str:
        nonlocal rendered
        rendered += len(messages)
        return apply(self, messages, tools, generation_prompt)

    monkeypatch.setattr(ChatRenderer, "apply", counted)
    example = dataclasses.replace(
        conversation(400), messages=(*conversation(400).messages[:-1], Message("assistant", "end"))
    )
    began = time.process_time()
    encoded = encode(example, CHAT_TEMPLATE)
    assert (encoded.answers, int((encoded.weights > 0).any())) == (400, 1)
    assert rendered < 30 * len(example.messages), "each prefix would be 800 of them"
    assert time.process_time() - began < 10, "half a second on a quiet core"
