"""Templates with channels, as gpt-oss has them: reasoning, calls and answers are trained, each with its own end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.masking import Encoder
from sft.data.reading.formats import Example
from sft.data.reading.messages import read_messages, read_tools
from tests.sft.tokenizers_for_tests import byte_level

CHANNELS = """
{%- macro write(role, text, end) -%}<|start|>{{ role }}<|message|>{{ text }}<|{{ end }}|>{%- endmacro -%}
{%- macro say(channel, text, end) -%}
<|start|>assistant<|channel|>{{ channel }}<|message|>{{ text }}<|{{ end }}|>
{%- endmacro -%}
{%- for tool in tools or [] -%}{{ write('developer', tool.function.name ~ ' ' ~ tool.function.description, 'end') }}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role != 'assistant' -%}{{ write(message.role, message.content, 'end') }}
{%- else -%}
{%- if message.thinking and (loop.last or message.tool_calls) -%}{{ say('analysis', message.thinking, 'end') }}
{%- endif -%}
{%- if message.tool_calls -%}
{%- set call = message.tool_calls[0].function -%}
<|start|>assistant to={{ call.name }}<|channel|>commentary<|message|>{{ call.arguments | tojson }}<|call|>
{%- else -%}{{ say('final', message.content, 'return' if loop.last else 'end') }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""
"""Each message of an answer has its own end token, and only the last one's ends the answer. Earlier reasoning goes."""
CONTROLS = ("start", "end", "message", "channel", "return", "call")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks it up."}}]
QUESTION = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is 4.", "thinking": "Two and two."}
CALL = {
    "role": "assistant",
    "content": "",
    "thinking": "I must look.",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"what": "sum"}}}],
}
RESULT = {"role": "tool", "content": "four"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_level()
    tokens = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in CONTROLS]
    made.add_special_tokens({"additional_special_tokens": tokens})
    made.chat_template = CHANNELS
    return made


def trained(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[Any] | None = None,
    **settings: Any,
) -> tuple[list[str], set[str]]:
    """The trained part of each text, and the tokens that end answers."""
    read = read_messages(messages, "messages", {}), read_tools(tools, "tools")
    encoded = Encoder(tokenizer, DataSpec(**settings)).encode(Example(where="a", messages=read[0], tools=read[1]))
    ends = {token for each in encoded for token in tokenizer.convert_ids_to_tokens(each.ids[each.ends])}
    return [str(tokenizer.decode(each.ids[each.weights > 0])) for each in encoded], ends


def test_reasoning_and_answer_are_trained_up_to_the_end_of_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """The end of the reasoning is trained as well, and is none of the tokens that an engine must stop at."""
    texts, ends = trained(tokenizer, [QUESTION, ANSWER])
    assert texts == [
        "<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    ]
    assert ends == {"<|return|>"}


def test_a_call_ends_with_its_own_token(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, ends = trained(tokenizer, [QUESTION, CALL, RESULT, ANSWER], TOOLS)
    assert texts == [
        "<|channel|>analysis<|message|>I must look.<|end|>"
        '<|start|>assistant to=look<|channel|>commentary<|message|>{"what": "sum"}<|call|>'
        "<|channel|>analysis<|message|>Two and two.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>"
    ]
    assert ends == {"<|call|>", "<|return|>"}


def test_turns_that_the_template_rewrites_are_refused_or_trained_in_texts_of_their_own(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Once another turn follows, reasoning goes and `<|return|>` becomes `<|end|>`, which no answer may end with."""
    conversation = [QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "Still 4."}]
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template rewrites, once turns follow"):
        trained(tokenizer, conversation)
    texts, ends = trained(tokenizer, conversation, on_mismatch="split")
    assert [text[-26:] for text in texts] == [
        "<|message|>It is 4.<|return|>"[-26:],
        "<|message|>Still 4.<|return|>"[-26:],
    ]
    assert all("<|message|>Two and two.<|end|>" in text for text in texts)
    assert ends == {"<|return|>"}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_any_key_is_written_or_refused(key: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Newer versions of transformers hand it to templates under all of these names, earlier ones under its own."""
    answer = {"role": "assistant", "content": "It is 4.", key: "Two and two."}
    try:
        texts, _ = trained(tokenizer, [QUESTION, answer])
    except DataError as error:
        assert key != "thinking"
        assert f"message 2 (assistant): the chat template does not write its {key}" in str(error)
    else:
        assert texts[0].startswith("<|channel|>analysis<|message|>Two and two.<|end|>")


def test_reasoning_that_the_template_writes_nowhere_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHANNELS.replace("message.thinking and", "false and")
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template does not write its thinking"):
        trained(made, [QUESTION, ANSWER])


def test_a_second_call_that_the_template_drops_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    other = {"type": "function", "function": {"name": "look", "arguments": {"what": "product"}}}
    calls = {**CALL, "tool_calls": [*CALL["tool_calls"], other]}
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template does not write its tool call"):
        trained(tokenizer, [QUESTION, calls, RESULT, ANSWER], TOOLS)


MARKED = "<|channel|>analysis<|message|>Two and two.<|end|><|start|>assistant<|channel|>final<|message|>It is 4."


def test_content_with_the_marks_of_channels_is_refused_where_the_template_refuses_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """Seen to train the marks as letters: hidden, they did not meet the check that gpt-oss's template makes."""
    made = copy.deepcopy(tokenizer)
    refuse = "{% if '<|channel|>' in message.content %}{{ raise_exception('give thinking by itself') }}{% endif %}"
    made.chat_template = CHANNELS.replace("{%- for message in messages -%}", "{%- for message in messages -%}" + refuse)
    with pytest.raises(DataError, match="the chat template refuses the first 2 messages: give thinking by itself"):
        trained(made, [QUESTION, {"role": "assistant", "content": MARKED}])


def test_content_whose_marks_the_template_reads_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """As templates do that take reasoning out of content, in a tokenizer where its marks are special tokens."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHANNELS.replace(
        "say('final', message.content,", "say('final', message.content.split('<|message|>')[-1],"
    )
    with pytest.raises(DataError, match=r"the chat template reads special tokens that the content spells.*in keys"):
        trained(made, [QUESTION, {"role": "assistant", "content": MARKED}])
    texts, _ = trained(tokenizer, [{"role": "user", "content": MARKED}, {"role": "assistant", "content": MARKED}])
    assert texts == [f"<|channel|>final<|message|>{MARKED}<|return|>"]


def test_parameters_of_tools_that_the_template_drops_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """Seen to train calls without the schema that they follow."""
    schema = {"type": "object", "properties": {"what": {"type": "string"}}, "required": ["what"]}
    described = {"name": "look", "description": "Looks it up.", "parameters": schema}
    tools = [{"type": "function", "function": described}]
    with pytest.raises(DataError, match=r"does not write the tools \(tool parameters\)"):
        trained(tokenizer, [QUESTION, CALL, RESULT, ANSWER], tools)
    made = copy.deepcopy(tokenizer)
    made.chat_template = CHANNELS.replace(
        "tool.function.description,", "tool.function.description ~ tool.function.parameters | tojson,"
    )
    assert trained(made, [QUESTION, CALL, RESULT, ANSWER], tools)[1] == {"<|call|>", "<|return|>"}
