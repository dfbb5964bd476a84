"""Parts of a conversation that a template leaves out, with the templates of real families (from the trl wheel)."""

from __future__ import annotations

from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.long_chat import LONG
from sft.data.encoding.masking import Encoder
from sft.data.reading.formats import Example
from sft.data.reading.messages import read_messages, read_tools
from tests.sft.data.encoding.test_mask_oracle import templates, tokenizer_for
from tests.tiny_model import make_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather of a city."}}]


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def encoded(template: str, messages: list[dict[str, Any]]) -> list[int]:
    """The ids of a conversation under a template of one's own."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    example = Example(where="a.jsonl:1", messages=read_messages(messages, "messages", {}))
    (only,) = Encoder(tokenizer, DataSpec()).encode(example)
    ids: list[int] = only.ids.tolist()
    return ids


def trained(family: str, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[str]:
    """What each trained run of tokens decodes to."""
    template = (templates() / f"{family}.jinja").read_text()
    tokenizer = tokenizer_for(template, template)
    example = Example(
        where="a.jsonl:1", messages=read_messages(messages, "messages", {}), tools=read_tools(tools, "tools")
    )
    (encoded,) = Encoder(tokenizer, DataSpec()).encode(example)
    return [str(tokenizer.decode(encoded.ids[encoded.weights > 0]))]


@pytest.mark.parametrize("family", ["llama3", "llama3_1", "llama3_2", "gemma", "lfm2", "qwen2_5", "smolvlm"])
def test_text_parts_are_one_text(family: str) -> None:
    """Seen to train `[{'type': 'text', 'text': 'Hello there.'}]` with the list handed to the template."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": " you"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello there."}]},
    ]
    (answer,) = trained(family, messages)
    assert "Hello there." in answer
    assert "type" not in answer


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "audio", "audio": "x"}, {"text": "no type"}, "bare"])
def test_parts_that_are_no_text_are_refused_by_name(part: object) -> None:
    with pytest.raises(DataError, match=r"messages\[0\]: 'content' holds"):
        read_messages([{"role": "user", "content": [part]}], "messages", {})


def test_a_tool_turn_whose_words_the_answer_repeats_is_not_taken_for_written() -> None:
    """Seen to pass (exit 0, without the turn) where the words were looked for in the whole text."""
    messages = [
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "I will look it up."},
        {"role": "tool", "content": "Paris"},
        {"role": "assistant", "content": "It is Paris."},
    ]
    with pytest.raises(DataError, match=r"message 3 \(tool\): the chat template does not write its content"):
        trained("phi3", messages)


def test_a_turn_of_a_role_that_the_template_passes_over_is_not_taken_for_written() -> None:
    """Its words stand in the answer, too."""
    messages = [
        {"role": "developer", "content": "Say Paris"},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "I was told: Say Paris"},
    ]
    with pytest.raises(DataError, match=r"message 1 \(developer\): the chat template does not write its content"):
        trained("phi3", messages)


ELSE_ANSWERS = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NO_ROLES = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(("role", "turn"), [("system", 0), ("developer", 0), ("tool", 2)])
def test_a_turn_that_the_template_writes_as_an_answer_is_refused(role: str, turn: int) -> None:
    """Seen to be trained behind: a template that asks for users, and takes whatever else for answers."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    messages = [*messages[:turn], {"role": role, "content": "Be brief."}, *messages[turn:], *messages]
    with pytest.raises(DataError, match=rf"message {turn + 1} \({role}\): .* does not write its role: it writes an an"):
        encoded(ELSE_ANSWERS, messages)
    assert encoded(NO_ROLES, messages)


CALLED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "(CALL){% endfor %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize(
    "written", ["", "{{ c.function.arguments.values() | list }}", "{{ c.function.arguments | list }}"]
)
@pytest.mark.parametrize("value", [3, 0.5, True, {"x": 3}])
def test_arguments_that_are_no_texts_must_be_written_too(written: str, value: object) -> None:
    """Neither without them, nor without their names, nor without what they are."""
    asked = {"name": "add", "arguments": {"a": value}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": asked}]},
    ]
    if value is True and "arguments | list" in written:
        assert encoded(CALLED.replace("CALL", written), messages)  # true and false cannot be told from other words
        return
    with pytest.raises(DataError, match=r"message 2 \(assistant\): .* does not write its tool call's arguments"):
        encoded(CALLED.replace("CALL", written), messages)
    assert encoded(CALLED.replace("CALL", "{{ c.function.arguments | tojson }}"), messages)


@pytest.mark.parametrize("family", ["llama3", "phi3", "gemma"])
def test_tools_whose_name_the_question_holds_are_not_taken_for_written(family: str) -> None:
    messages = [
        {"role": "user", "content": "What is the weather in Paris? Tells the weather of a city."},
        {"role": "assistant", "content": "Sunny."},
    ]
    with pytest.raises(DataError, match=r"does not write the tools \(tool name, tool description\)"):
        trained(family, messages, TOOLS)


def test_each_of_several_calls_must_be_written() -> None:
    """Seen to train the first call only, and to keep both results, where only the function's name was looked for."""
    messages = [
        {"role": "user", "content": "Weather in Paris and in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call("Paris"), call("Rome")]},
        {"role": "tool", "name": "weather", "content": "sun in Paris"},
        {"role": "tool", "name": "weather", "content": "rain in Rome"},
        {"role": "assistant", "content": "Sun and rain."},
    ]
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template does not write its tool call"):
        trained("gptoss", messages, TOOLS)
    (answers,) = trained("qwen2_5", messages, TOOLS)
    assert '"Paris"' in answers
    assert '"Rome"' in answers


EXTRACTIVE = [
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris is the capital.", "reasoning_content": "Paris"},
]


@pytest.mark.parametrize("family", ["llama3", "gemma3", "gemma4", "phi3", "qwen2_5", "qwen3_instruct_2507"])
@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_whose_words_the_answer_repeats_is_not_taken_for_written(family: str, key: str) -> None:
    """Seen to be dropped without a word by 22 of 41 templates, where its words were looked for in the answer."""
    asked, answer = EXTRACTIVE[0], {"role": "assistant", "content": "Paris is the capital.", key: "Paris"}
    with pytest.raises(DataError, match=rf"message 2 \(assistant\): the chat template does not write its {key}"):
        trained(family, [asked, answer])


def test_the_same_reasoning_under_two_keys_needs_to_be_written_once() -> None:
    answer = {**EXTRACTIVE[1], "reasoning": "Paris"}
    (text,) = trained("qwen3", [EXTRACTIVE[0], answer])
    assert text == "<think>\nParis\n</think>\n\nParis is the capital.<|im_end|>\n"


@pytest.mark.parametrize("family", ["llama3_1", "llama3_2"])
def test_content_beside_a_call_whose_words_the_call_repeats_is_not_taken_for_written(family: str) -> None:
    """Seen to be dropped: these templates write the call alone."""
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "Paris", "tool_calls": [call("Paris")]},
        {"role": "tool", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template does not write its content"):
        trained(family, messages, TOOLS)
    assert "Paris" in trained("qwen2_5", messages, TOOLS)[0]


@pytest.mark.parametrize(("family", "count"), [("llama3", 1), ("qwen3", 2)])
def test_loss_on_all_trains_no_answer_without_its_reasoning(family: str, count: int) -> None:
    """Seen to be dropped: under loss_on all no answer was looked at. Qwen 3 keeps reasoning in the last turn alone."""
    template = (templates() / f"{family}.jinja").read_text()
    tokenizer = tokenizer_for(template, template)
    turns = read_messages(EXTRACTIVE * count, "messages", {})
    with pytest.raises(
        DataError, match=r"message 2 \(assistant\): the chat template does not write its reasoning_content"
    ):
        Encoder(tokenizer, DataSpec(loss_on="all")).encode(Example(where="a.jsonl:1", messages=turns))


@pytest.mark.parametrize(("family", "is_written"), [("qwen3", True), ("llama3_1", False)])
def test_an_answer_is_not_trained_behind_one_whose_reasoning_the_template_never_writes(
    family: str, is_written: bool
) -> None:
    """Seen to be trained without it. Qwen 3 writes what was thought between a call and its answer."""
    template = (templates() / f"{family}.jinja").read_text()
    tokenizer = tokenizer_for(template, template)
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "reasoning_content": "I must look.", "tool_calls": [call("Paris")]},
        {"role": "tool", "name": "weather", "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    example = Example(where="a.jsonl:1", messages=read_messages(messages, "messages", {}))
    encoder = Encoder(tokenizer, DataSpec(loss_on="last_assistant"))
    if is_written:
        (encoded,) = encoder.encode(example)
        assert "I must look." in tokenizer.decode(encoded.ids)
    else:
        with pytest.raises(DataError, match=r"message 2 \(assistant\): .* does not write its reasoning_content"):
            encoder.encode(example)


def test_answers_of_a_long_conversation_are_proven_too() -> None:
    template = (templates() / "llama3.jinja").read_text()
    tokenizer = tokenizer_for(template, template)
    turns = EXTRACTIVE * LONG
    for index in range(0, len(turns), 2):
        turns[index + 1] = turns[index + 1] if index == 20 else {"role": "assistant", "content": "Paris."}
    example = Example(where="a.jsonl:1", messages=read_messages(turns, "messages", {}))
    with pytest.raises(DataError, match=r"message 22 \(assistant\): .* does not write its reasoning_content"):
        Encoder(tokenizer, DataSpec()).encode(example)


def test_a_result_that_the_template_rewrites_is_not_trained_with_its_header() -> None:
    """gpt-oss writes results as JSON text: the whole turn was seen to be trained, though only what it says is meant."""
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [call("Paris")]},
        {"role": "tool", "name": "weather", "content": 'a "sun"', "train": True},
    ]
    with pytest.raises(DataError, match=r"message 3 \(tool\): the chat template changes its content"):
        trained("gptoss", messages, TOOLS)


def test_one_proof_serves_all_conversations_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    encoder = Encoder(tokenizer, DataSpec())
    rendered: list[str] = []
    real = tokenizer.apply_chat_template

    def counting(conversation: list[dict[str, Any]], **options: Any) -> Any:
        rendered.append(conversation[0]["content"])
        return real(conversation, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    for question in ("one", "two", "three"):
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "an answer"}]
        encoder.encode(Example(where="a.jsonl:1", messages=read_messages(turns, "messages", {})))
    assert len([text for text in rendered if text.startswith("zq0")]) == 1


@pytest.mark.parametrize(
    ("family", "answers", "of_user", "of_result"),
    [
        ("qwen2_5", "weather", "ann", False),
        ("qwen2_5", "forecast", None, True),
        ("muse_glimmer", "forecast", None, False),
    ],
)
def test_names_that_a_template_does_not_write_are_told(
    family: str, answers: str, of_user: str | None, of_result: bool
) -> None:
    """The name of a result is in its call already, if they are the same."""
    template = (templates() / f"{family}.jinja").read_text()
    encoder = Encoder(tokenizer_for(template, template), DataSpec())
    asked = {"role": "user", "content": "Weather?"}
    turns = [
        asked,
        {"role": "assistant", "content": "", "tool_calls": [call("Paris")]},
        {"role": "tool", "name": answers, "content": "sun"},
        {"role": "assistant", "content": "Sun."},
    ]
    assert bool(encoder.unread(conversation(turns))) == of_result
    if of_user is not None:
        assert encoder.unread(conversation([{**asked, "name": of_user}, *turns[1:]])) == (
            "messages[].name (by the chat template)",
        )


def conversation(turns: list[dict[str, Any]]) -> Example:
    return Example(where="", messages=read_messages(turns, "messages", {}), tools=read_tools(TOOLS, "tools"))
