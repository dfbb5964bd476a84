"""Chat templates by name: what they write, which tokenizers they fit, that every answer ends; templates for tools."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from launcher.contract.errors import DataError, ModelError
from launcher.contract.named_templates import NAMES, fit_all, named_template, needed_tokens
from launcher.contract.spec import DataSpec
from sft.data.encoding.masking import Encoder
from sft.data.encoding.tokenizer import ChatTemplates, chat_template
from sft.data.reading.formats import Example
from sft.data.reading.messages import Message, Tool, ToolCall
from tests.sft.tokenizers_for_tests import byte_level, sentencepiece_like

TURNS = (
    Message("system", "Be brief."),
    Message("user", "What is 2 + 2?"),
    Message("assistant", "It is 4."),
    Message("user", "Who are you?"),
    Message("assistant", "An answer."),
)
TOOL: Tool = {"type": "function", "function": {"name": "look", "description": "Look it up", "parameters": {}}}
EXPECTED = {
    "alpaca": "<s>Be brief.\n\n### Instruction:\nWhat is 2 + 2?\n\n### Response:\n[It is 4.</s>]\n\n"
    "### Instruction:\nWho are you?\n\n### Response:\n[An answer.</s>]\n\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n[It is 4.<|im_end|>]\n<|im_start|>user\nWho are you?<|im_end|>\n"
    "<|im_start|>assistant\n[An answer.<|im_end|>]\n",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n"
    "[It is 4.<end_of_turn>]\n<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    "[An answer.<end_of_turn>]\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat is 2 + 2?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[It is 4.<|eot_id|>]"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[An answer.<|eot_id|>]",
    "mistral": "<s>[INST] Be brief.\n\nWhat is 2 + 2? [/INST][ It is 4.</s>][INST] Who are you? [/INST]"
    "[ An answer.</s>]",
    "vicuna": "<s>Be brief.\n\nUSER: What is 2 + 2? ASSISTANT:[ It is 4.</s>]USER: Who are you? ASSISTANT:"
    "[ An answer.</s>]",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nWhat is 2 + 2?</s>\n<|assistant|>\n[It is 4.</s>]\n"
    "<|user|>\nWho are you?</s>\n<|assistant|>\n[An answer.</s>]\n",
}
"""What is written, the trained parts in brackets."""


def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    tokenizer = sentencepiece_like()
    needed = needed_tokens(named_template(name))
    tokens = [AddedToken(token, special=True, normalized=False) for token in needed]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})  # type: ignore[dict-item]
    return tokenizer


def test_every_name_is_tested() -> None:
    assert sorted(EXPECTED) == list(NAMES)
    assert fit_all() == ["alpaca", "mistral", "vicuna", "zephyr"]


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_trained_with_their_end_token(name: str) -> None:
    tokenizer = tokenizer_for(name)
    template = chat_template(tokenizer, DataSpec(chat_template=name))
    assert template is not None
    turns = [message.for_template() for message in TURNS]
    written = str(tokenizer.apply_chat_template(turns, chat_template=template.default, tokenize=False))
    marked = re.compile(r"\[( ?(?:It is 4\.|An answer\.)[^]]*)\]")
    assert written == marked.sub(r"\1", EXPECTED[name])
    (encoded,) = Encoder(tokenizer, DataSpec(chat_template=name)).encode(Example(where="row 1", messages=TURNS))
    parts = [[]]
    for token, weight in zip(encoded.ids.tolist(), encoded.weights.tolist(), strict=True):
        if weight:
            parts[-1].append(token)
        elif parts[-1]:
            parts.append([])
    trained = [tokenizer.decode(part).strip() for part in parts if part]
    assert trained == [part.strip() for part in marked.findall(EXPECTED[name])]
    assert int(encoded.ends.sum()) == encoded.answers == 2


def test_chatml_writes_tools_and_calls() -> None:
    calls: list[ToolCall] = [
        {"type": "function", "function": {"name": "look", "arguments": {"at": place}}} for place in ("Rome", "Paris")
    ]
    turns = (
        Message("user", "Which?"),
        Message("assistant", None, extra={"tool_calls": calls}),
        Message("tool", "Rome: hot"),
        Message("assistant", "It is Rome."),
    )
    tokenizer = byte_level()
    example = Example(where="row 1", messages=turns, tools=(TOOL,))
    (encoded,) = Encoder(tokenizer, DataSpec(chat_template="chatml")).encode(example)
    text = tokenizer.decode(encoded.ids)
    assert '"description": "Look it up"' in text
    assert text.count('<tool_call>\n{"name": "look"') == 2
    assert "<tool_response>\nRome: hot\n</tool_response>" in text


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"chatml writes <\|im_start\|>, <\|im_end\|>, which are not special tokens"):
        chat_template(sentencepiece_like(), DataSpec(chat_template="chatml"))


@pytest.mark.parametrize("name", ["gemma", "mistral", "vicuna", "alpaca"])
def test_a_role_that_a_template_does_not_have_is_refused(name: str) -> None:
    turns = (*TURNS[1:3], Message("tool", "x"), TURNS[4])
    with pytest.raises(DataError, match=f"the roles of template {name} are"):
        Encoder(tokenizer_for(name), DataSpec(chat_template=name)).encode(Example(where="row 1", messages=turns))


DEFAULT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + DEFAULT


def test_the_template_for_tools_is_chosen_where_a_row_has_some() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": DEFAULT, "tool_use": WITH_TOOLS}
    encoder = Encoder(tokenizer, DataSpec())
    plain, with_tools = (
        encoder.encode(Example(where="row 1", messages=TURNS[1:3], tools=tools))[0] for tools in ((), (TOOL,))
    )
    assert tokenizer.decode(plain.ids).startswith("<|im_start|>user")
    assert tokenizer.decode(with_tools.ids).startswith('{"type": "function"')
    turns = [message.for_template() for message in TURNS[1:3]]
    expected = tokenizer.apply_chat_template(turns, tools=[TOOL], tokenize=True, return_dict=False)  # type: ignore[list-item]
    assert with_tools.ids.tolist() == expected


def test_a_list_of_templates_without_a_default() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"only": DEFAULT}
    assert chat_template(tokenizer, DataSpec()) == ChatTemplates(DEFAULT)
    tokenizer.chat_template = {"rag": DEFAULT, "tool_use": WITH_TOOLS}
    with pytest.raises(ModelError, match="has templates rag, tool_use and none is the default"):
        chat_template(tokenizer, DataSpec())


def test_an_export_has_the_named_template_and_no_other(tmp_path: Path) -> None:
    from sft.hf.exporter import copy_settings

    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": DEFAULT, "tool_use": WITH_TOOLS}
    tokenizer.save_pretrained(source)
    target.mkdir()
    copy_settings(source, source, named_template("chatml").encode(), target)
    exported = PreTrainedTokenizerFast.from_pretrained(target)
    assert exported.get_chat_template(tools=[TOOL]) == named_template("chatml")  # type: ignore[list-item]


def test_the_processor_of_an_export_has_the_named_template_too(tmp_path: Path) -> None:
    """Seen to have the source's: processors read chat_template.json and their own config before chat_template.jinja."""
    from transformers import ProcessorMixin

    from sft.hf.exporter import copy_settings

    source, target = tmp_path / "source", tmp_path / "target"
    byte_level().save_pretrained(source)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT}))
    (source / "processor_config.json").write_text(json.dumps({"image_seq_length": 4, "chat_template": DEFAULT}))
    target.mkdir()
    copy_settings(source, source, named_template("chatml").encode(), target)
    settings, _ = ProcessorMixin.get_processor_dict(target)
    assert settings == {"image_seq_length": 4, "chat_template": named_template("chatml")}


@pytest.mark.parametrize("as_file", [True, False])
def test_the_processor_of_an_export_has_the_template_of_the_tokenizer(as_file: bool, tmp_path: Path) -> None:
    """Where the source's differ, a run that takes the tokenizer's was seen to be asked in the processor's."""
    from transformers import ProcessorMixin

    from sft.hf.exporter import copy_settings

    source, target = tmp_path / "source", tmp_path / "target"
    tokenizer = byte_level()
    tokenizer.chat_template = DEFAULT
    tokenizer.save_pretrained(source, save_jinja_files=as_file)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": WITH_TOOLS}))
    (source / "processor_config.json").write_text("{}")
    target.mkdir()
    copy_settings(source, source, None, target)
    assert ProcessorMixin.get_processor_dict(target)[0]["chat_template"] == DEFAULT
    assert PreTrainedTokenizerFast.from_pretrained(target).chat_template == DEFAULT
    # One of several by name.
    (source / "chat_template.jinja").unlink(missing_ok=True)
    named = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": "tools"}]
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    several = tmp_path / "several"
    several.mkdir()
    copy_settings(source, source, None, several)
    assert not (several / "chat_template.json").exists()
    assert PreTrainedTokenizerFast.from_pretrained(several).chat_template == {"default": DEFAULT, "tool_use": "tools"}
    # Where they agree, files stay as they are.
    (source / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT}))
    copy_settings(source, source, None, target)
    assert (target / "chat_template.json").read_bytes() == (source / "chat_template.json").read_bytes()
