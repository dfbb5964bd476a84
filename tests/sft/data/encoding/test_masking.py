"""Ids and loss weights: the ids of apply_chat_template, and targets that decode to answer and terminator."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import ConfigError, DataError, ModelError
from launcher.contract.spec import DataSpec
from sft.data.encoding import masking
from sft.data.encoding.masking import Encoded, Encoder
from sft.data.encoding.tokenizer import load_tokenizer
from sft.data.reading.formats import Example, parse_row
from sft.data.reading.messages import Message
from tests.sft.tokenizers_for_tests import SHARED_DATA, byte_level, sentencepiece_like, smollm2_dir
from tests.tiny_model import CHAT_TEMPLATE, make_chat_rows, make_tokenizer

LossOn = Literal["assistant", "last_assistant", "all"]

THINK_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops the reasoning from all turns but the last, as Qwen3 and DeepSeek do."""

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Human: {{ m['content'] }}\nAssistant: "
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n"
    "{% else %}{{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
)


def chat(*contents: str, system: str | None = None) -> Example:
    roles = ("user", "assistant")
    turns = [Message(roles[index % 2], content) for index, content in enumerate(contents)]
    return Example(where="a.jsonl:1", messages=(*([Message("system", system)] if system else []), *turns))


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> Encoded:
    (only,) = masking.encode(example, tokenizer, spec)
    return only


def as_dicts(example: Example) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in example.messages]


def library_ids(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    ids: Any = tokenizer.apply_chat_template(as_dicts(example), tokenize=True, return_dict=False)
    return list(ids)


def trained_texts(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """What each run of targets decodes to."""
    edges = np.flatnonzero(np.diff(encoded.weights > 0, prepend=False, append=False))
    return [str(tokenizer.decode(encoded.ids[a:b])) for a, b in edges.reshape(-1, 2)]


CONVERSATION = chat("hi", "yo", "who are you?", "an answer", system="be brief")


def test_trap_9_every_assistant_turn_is_trained_with_its_terminator() -> None:
    """Seen to fail with spans that end where the content does."""
    tokenizer = make_tokenizer()
    encoded = encode(CONVERSATION, tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["yo<|im_end|>\n", "an answer<|im_end|>\n"]


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("last_assistant", ["an answer<|im_end|>\n"]), ("assistant", ["yo<|im_end|>\n", "an answer<|im_end|>\n"])],
)
def test_loss_on(loss_on: LossOn, expected: list[str]) -> None:
    tokenizer = make_tokenizer()
    assert trained_texts(tokenizer, encode(CONVERSATION, tokenizer, DataSpec(loss_on=loss_on))) == expected


def test_loss_on_all_trains_everything_but_the_first_token() -> None:
    encoded = encode(CONVERSATION, make_tokenizer(), DataSpec(loss_on="all"))
    assert encoded.weights.tolist() == [0.0] + [1.0] * (len(encoded.ids) - 1)


def test_trap_9_prompt_ids_are_those_of_generation() -> None:
    """Seen to fail with the prompt rendered without its generation header, which is then trained."""
    tokenizer = make_tokenizer()
    encoded = encode(CONVERSATION, tokenizer, DataSpec(loss_on="last_assistant"))
    prompt = tokenizer.apply_chat_template(
        as_dicts(CONVERSATION)[:-1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert not encoded.weights[: len(prompt)].any()
    assert encoded.weights[len(prompt) :].all()


def test_trap_9_a_template_that_rewrites_history_is_refused_with_the_turn() -> None:
    """Seen to fail without the check against the whole conversation: the mask is then off by the dropped text."""
    example = chat("hi", "<think>hm</think>yo", "and?", "<think>so</think>an answer")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINK_TEMPLATE
    with pytest.raises(DataError) as caught:
        encode(example, tokenizer, DataSpec())
    assert str(caught.value).startswith(
        "a.jsonl:1: message 2 (assistant): the chat template rewrites, once turns follow,"
    )
    last = encode(example, tokenizer, DataSpec(loss_on="last_assistant"))
    assert trained_texts(tokenizer, last) == ["<think>so</think>an answer<|im_end|>\n"]


def test_trap_9_turns_that_are_rewritten_become_examples_of_their_own() -> None:
    """Each after the prompt of generation. Seen to fail with all turns masked in the whole conversation."""
    example = chat("hi", "<think>hm</think>yo", "and?", "plain", "so?", "<think>so</think>an answer")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = THINK_TEMPLATE
    first, both = masking.encode(example, tokenizer, DataSpec(on_mismatch="split"))
    assert trained_texts(tokenizer, first) == ["<think>hm</think>yo<|im_end|>\n"]
    assert trained_texts(tokenizer, both) == ["plain<|im_end|>\n", "<think>so</think>an answer<|im_end|>\n"]
    for encoded, turn in ((first, 1), (both, 3), (both, 5)):
        prompt: Any = tokenizer.apply_chat_template(
            as_dicts(example)[:turn], tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert encoded.ids[: len(prompt)].tolist() == prompt
        assert encoded.weights[len(prompt)] == 1.0


def test_trap_9_turns_that_agree_stay_one_example_under_split() -> None:
    tokenizer = make_tokenizer()
    assert len(masking.encode(CONVERSATION, tokenizer, DataSpec(on_mismatch="split"))) == 1


def test_trap_9_an_end_of_the_whole_is_no_end_of_a_turn() -> None:
    """As Phi-3 writes it. Seen to be refused where a turn had to be in the whole with all that ends it alone."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
    encoded = encode(CONVERSATION, tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["yo<|im_end|>\n", "an answer<|im_end|>\n<|endoftext|>"]
    tokenizer.chat_template = (
        PLAIN_TEMPLATE.replace("{{ eos_token }}", "") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 3 \(assistant\): the chat template rewrites"):
        encode(CONVERSATION, tokenizer, DataSpec())


def test_trap_8_a_turn_that_the_next_header_ends_is_trained_with_it() -> None:
    """As GLM-4 writes it. Seen to fail (answers without an end) with the span of the turn alone."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_end|>' if m['role'] == 'user' else '<|im_start|>' }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    encoded = encode(chat("hi", "yo", "and?", "an answer"), tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["yo<|im_end|>", "an answer<|im_end|>"]
    assert (encoded.answers, encoded.ends.sum()) == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"content": "{{ m['content'][:3] }}"},
            r"message 3 \(assistant\): the chat template does not write its content",
        ),
        ({"system": ""}, r"message 1 \(system\): the chat template does not write it"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(changes: dict[str, str], message: str) -> None:
    """Seen to fail (trained on answers to what is not in the prompt) without the check."""
    content = changes.get("content", "{{ m['content'] }}")
    skipped = "{% if m['role'] != 'system' %}" if "system" in changes else "{% if true %}"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{skipped}<|im_start|>{{{{ m['role'] }}}}\n{content}<|im_end|>\n{{% endif %}}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(DataError, match=message):
        encode(chat("hi", "an answer", system="be brief"), tokenizer, DataSpec())


def test_reasoning_calls_and_tools_that_a_template_leaves_out_are_refused() -> None:
    """Seen to fail (trained without them) without the check."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    asked = Message("user", "hi")
    for example, message in (
        (Example(where="", messages=(asked, Message("assistant", "", None, {"tool_calls": [call]}))), "tool_calls"),
        (Example(where="", messages=(asked, Message("assistant", "yo", None, {"thinking": "hm"}))), "thinking"),
        (Example(where="", messages=(asked, Message("assistant", "yo")), tools=(call,)), "does not write the tools"),
    ):
        with pytest.raises(DataError, match=message):
            encode(example, make_tokenizer(), DataSpec())


def weighted(*weights: float | None) -> Example:
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("be brief", "hi", "yo", "and?", "an answer")
    turns = [Message(*turn) for turn in zip(roles, texts, weights, strict=True)]
    return Example(where="a.jsonl:1", messages=tuple(turns))


def test_messages_weigh_what_the_row_says() -> None:
    """Seen to fail with the weights of messages ignored."""
    tokenizer = make_tokenizer()
    encoded = encode(weighted(None, None, 0.5, None, None), tokenizer, DataSpec())
    assert [w for w, _ in itertools.groupby(encoded.weights)] == [0.0, 0.5, 0.0, 1.0]
    left_out = encode(weighted(None, None, 0.0, None, None), tokenizer, DataSpec())
    assert trained_texts(tokenizer, left_out) == ["an answer<|im_end|>\n"]
    assert (left_out.answers, encoded.answers) == (1, 2)


def test_other_turns_are_trained_only_if_a_row_asks() -> None:
    """Seen to fail with a default weight of 1 for every role."""
    tokenizer = make_tokenizer()
    row = weighted(None, 1.0, 0.0, None, None)
    weighed = encode(row, tokenizer, DataSpec(loss_on="last_assistant"))
    assert trained_texts(tokenizer, weighed) == ["an answer<|im_end|>\n"], "a weight alone does not ask"
    turns = [dataclasses.replace(turn, train=turn.weight == 1.0) for turn in row.messages]
    row = dataclasses.replace(row, messages=tuple(turns))
    asked = encode(row, tokenizer, DataSpec(loss_on="last_assistant"))
    assert trained_texts(tokenizer, asked) == ["hi<|im_end|>\n", "an answer<|im_end|>\n"]
    everything = encode(weighted(None, None, 0.0, None, 0.5), tokenizer, DataSpec(loss_on="all"))
    assert [w for w, _ in itertools.groupby(everything.weights)] == [0.0, 1.0, 0.0, 1.0, 0.5]


def test_a_system_turn_that_a_template_inserts_is_not_trained_with_the_first_turn() -> None:
    """Seen to fail with the first turn trained from where the text begins."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|im_start|>system\nYou are hi-tech.<|im_end|>\n" + CHAT_TEMPLATE
    for said in ("hi", "end", "hi-tech"):
        turns = (Message("user", said, 1.0, train=True), Message("assistant", "yo"))
        encoded = encode(Example(where="", messages=turns), tokenizer, DataSpec())
        assert trained_texts(tokenizer, encoded) == [f"{said}<|im_end|>\n", "yo<|im_end|>\n"]


def test_template_variables_are_yaml_and_dates_stay_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ day }} {{ nothing is none }} {{ flag is true }} {{ n + 1 }}" + CHAT_TEMPLATE
    given = {"day": "2024-07-26", "nothing": "null", "flag": "true", "n": "2"}
    encoded = encode(chat("hi", "yo"), tokenizer, DataSpec(chat_template_kwargs=given))
    assert str(tokenizer.decode(encoded.ids)).startswith("2024-07-26 True True 3<|im_start|>")
    for name, text, message in (
        ("a", "[", "is not valid YAML"),
        ("tools", "1", "tools is set for each row"),
        ("max_length", "9", "max_length is an argument of transformers"),
        ("flags", "true", "the chat template does not read 'flags'; did you mean 'flag'"),  # seen to change nothing
    ):
        with pytest.raises(ConfigError, match=rf"data\.chat_template_kwargs.*{message}"):
            encode(chat("hi", "yo"), tokenizer, DataSpec(chat_template_kwargs={name: text}))


def test_messages_after_the_last_trained_one_are_left_out_and_counted() -> None:
    tokenizer = make_tokenizer()
    encoded = encode(chat("hi", "yo", "bye"), tokenizer, DataSpec())
    assert encoded.ids.tolist() == encode(chat("hi", "yo"), tokenizer, DataSpec()).ids.tolist()
    assert encoded.unused == 1


def test_ids_are_taken_as_they_are() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    example = Example(where="", ids=(7, 8, end, 9, end), weights=(1.0, 0.5, 0.5, 0.0, 1.0))
    encoded = encode(example, tokenizer, DataSpec(chat_template="none"))
    assert encoded.ids.tolist() == [7, 8, end, 9, end]
    assert encoded.weights.tolist() == [0.0, 0.5, 0.5, 0.0, 1.0]
    assert (encoded.answers, encoded.ends.tolist()) == (2, [False, False, True, False, True])


def test_trap_9_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused() -> None:
    """Seen to fail without the check of the prompt: the span then begins inside the header."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template does not go on from"):
        encode(chat("hi", "yo"), tokenizer, DataSpec())


def test_trap_8_an_end_token_that_is_the_padding_token_is_a_target() -> None:
    """Seen to fail with weights cleared where ids equal pad_token_id."""
    tokenizer = byte_level(template=CHAT_TEMPLATE)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoded = encode(CONVERSATION, tokenizer, DataSpec())
    assert np.count_nonzero(encoded.ids[encoded.weights > 0] == tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like, lambda: byte_level(template=CHAT_TEMPLATE)])
def test_trap_11_ids_are_those_of_the_library_and_bos_is_there_once(make: type[PreTrainedTokenizerBase]) -> None:
    """Seen to fail with add_special_tokens left at its default, which puts a second BOS in front."""
    tokenizer = make()
    rows = [Example(where="", messages=tuple(Message(**m) for m in row["messages"])) for row in make_chat_rows(30, 1)]
    for example in rows:
        encoded = encode(example, tokenizer, DataSpec())
        assert encoded.ids.tolist() == library_ids(tokenizer, example)
        assert tokenizer.bos_token_id is None or encoded.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_the_answer_of_a_template_without_generation_prompt_is_trained_with_its_space() -> None:
    tokenizer = sentencepiece_like()
    encoded = encode(chat("Hello", "I am", "b", "Paris"), tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["I am</s>", "Paris</s>"]
    assert encoded.straddling == 0


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_edge_is_trained_and_counted(trim_offsets: bool) -> None:
    """The generation prompt ends with a space, which the tokenizer joins to the answer's first word."""
    tokenizer = byte_level(template=PLAIN_TEMPLATE, trim_offsets=trim_offsets)
    encoded = encode(chat("question", "answer"), tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == [" answer<|im_end|>\n"]
    assert encoded.straddling == 1


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_spaces_are_placed_by_the_text_and_not_by_trimmed_offsets(trim_offsets: bool) -> None:
    """Trimmed, a token of spaces is no wider than the edge it ends at. Seen to fail (trained) with offsets as given."""
    tokenizer = byte_level(template=PLAIN_TEMPLATE.replace("Assistant: ", "Assistant:  "), trim_offsets=trim_offsets)
    encoded = encode(chat("question", ""), tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["<|im_end|>\n"]
    assert encoded.straddling == 0
    spaced = encode(chat("question  ", "x  "), tokenizer, DataSpec())
    assert trained_texts(tokenizer, spaced) == ["x  <|im_end|>\n"]


def test_characters_of_several_tokens_are_trained_as_a_whole() -> None:
    tokenizer = make_tokenizer()
    encoded = encode(chat("\u6f22\u5b57 \U0001f600", "\U0001f600\u6f22"), tokenizer, DataSpec())
    assert trained_texts(tokenizer, encoded) == ["\U0001f600\u6f22<|im_end|>\n"]


def test_a_first_turn_of_the_assistant_is_refused() -> None:
    example = Example(where="a.jsonl:1", messages=(Message("assistant", "yo"),))
    with pytest.raises(DataError, match=r"a\.jsonl:1: message 1 \(assistant\): an answer cannot come first"):
        encode(example, make_tokenizer(), DataSpec())


@pytest.mark.parametrize("on_mismatch", ["error", "split"])
def test_an_answer_that_the_template_writes_nothing_for_is_refused(on_mismatch: Literal["error", "split"]) -> None:
    """An empty answer without an end token. With `split` it would be tried in a text of its own forever."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template writes nothing for it"):
        encode(chat("hi", ""), tokenizer, DataSpec(on_mismatch=on_mismatch))


def test_what_a_template_says_about_a_conversation_is_passed_on() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"a\.jsonl:1: the chat template refuses the first 2 messages: roles must"):
        encode(chat("hi", "yo"), tokenizer, DataSpec())


def test_a_template_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(PLAIN_TEMPLATE)
    tokenizer = make_tokenizer()
    encoded = encode(chat("hi", "yo"), tokenizer, DataSpec(chat_template=str(file)))
    assert tokenizer.decode(encoded.ids) == "Human: hi\nAssistant: yo<|im_end|>\n"


def test_prompt_and_completion_become_two_turns() -> None:
    tokenizer = make_tokenizer()
    row = Example(where="", prompt="hi", completion="yo")
    assert encode(row, tokenizer, DataSpec()).ids.tolist() == library_ids(tokenizer, chat("hi", "yo"))


def test_without_a_template_prompt_and_completion_are_joined_as_they_are() -> None:
    tokenizer = make_tokenizer()
    spec = DataSpec(chat_template="none")
    encoded = encode(Example(where="", prompt="Q: hi", completion=" yo"), tokenizer, spec)
    expected = tokenizer("Q: hi")["input_ids"] + tokenizer(" yo")["input_ids"] + [tokenizer.eos_token_id]
    assert encoded.ids.tolist() == expected
    assert trained_texts(tokenizer, encoded) == [" yo<|im_end|>"]
    closed = encode(Example(where="", prompt="hi", completion="yo<|im_end|>"), tokenizer, spec)
    assert np.count_nonzero(closed.ids == tokenizer.eos_token_id) == 1
    with pytest.raises(ModelError, match="none joins a prompt and its completion, but the rows hold messages"):
        encode(CONVERSATION, tokenizer, spec)


def test_without_a_template_the_tokens_are_those_of_prompt_and_completion_as_one_text() -> None:
    """Seen to fail (a token for " 2" after `1+1=`) with the two tokenized apart."""
    tokenizer = sentencepiece_like()
    spec = DataSpec(chat_template="none")
    for prompt, completion in (("1+1=", "2"), ("The answer is (", "4)"), ("a b", "c d"), ("Paris is", " the capital")):
        encoded = encode(Example(where="", prompt=prompt, completion=completion), tokenizer, spec)
        assert encoded.ids.tolist() == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        text = tokenizer.decode(encoded.ids, skip_special_tokens=True)
        assert text == prompt + completion
        (answer,) = trained_texts(tokenizer, encoded)
        assert completion.strip() in answer
        assert prompt.split()[0] not in answer
    crossing = encode(Example(where="", prompt="Par", completion="is is"), tokenizer, spec)
    assert crossing.straddling == 1


def test_trap_11_a_text_has_the_bos_that_the_tokenizer_gives_it_once() -> None:
    """Seen to fail with leading ids added to a text that already spells BOS."""
    tokenizer = sentencepiece_like()
    expected = [*tokenizer("Paris is")["input_ids"], tokenizer.eos_token_id]
    encoded = encode(Example(where="", text="Paris is"), tokenizer, DataSpec())
    assert encoded.ids.tolist() == expected
    assert encoded.weights.tolist() == [0.0] + [1.0] * (len(expected) - 1)
    spelled = encode(Example(where="", text="<s>Paris is"), tokenizer, DataSpec())
    assert spelled.ids.tolist().count(1) == 1
    joined = encode(Example(where="", prompt="a", completion="b"), tokenizer, DataSpec(chat_template="none"))
    assert joined.ids.tolist().count(1) == 1


def test_smollm2_on_gsm8k_has_the_known_number_of_targets() -> None:
    file = SHARED_DATA / "gsm8k_test.jsonl"
    if not file.is_file():
        pytest.skip(f"{file.name} is not beside the checkout")
    tokenizer = load_tokenizer(smollm2_dir())
    columns = {"prompt": "question", "completion": "answer"}
    encoder = Encoder(tokenizer, DataSpec())
    with file.open("rb") as lines:
        rows = [parse_row(next(lines), f"gsm8k:{n}", "prompt_completion", columns) for n in range(1, 33)]
    encoded = [only for row in rows for only in encoder.encode(row)]
    assert sum(np.count_nonzero(row.weights) for row in encoded) == 4127
    with file.open("rb") as lines:
        answer = json.loads(next(lines))["answer"]
    assert trained_texts(tokenizer, encoded[0]) == [f"{answer}<|im_end|>\n"]
    for row, got in zip(rows, encoded, strict=True):
        turns = chat(row.prompt, row.completion or "")
        assert got.ids.tolist() == library_ids(tokenizer, turns)


def test_all_of_a_prompt_is_trained_with_loss_on_all_whatever_its_form() -> None:
    """Seen to leave out the prompt where it is a list of messages."""
    tokenizer = make_tokenizer()
    spec = DataSpec(loss_on="all", format="prompt_completion")
    turns: dict[str, Any] = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [{"role": "assistant", "content": "yo"}],
    }
    rows = ({"prompt": "hi", "completion": "yo"}, turns)
    examples = [parse_row(json.dumps(row).encode(), "a.jsonl:1", "prompt_completion", {}) for row in rows]
    texts, lists = (encode(example, tokenizer, spec) for example in examples)
    assert lists.ids.tolist() == texts.ids.tolist()
    assert lists.weights.tolist() == texts.weights.tolist() == [0.0] + [1.0] * (len(texts.ids) - 1)
    turns["prompt"][0]["weight"] = 0
    asked = encode(parse_row(json.dumps(turns).encode(), "a.jsonl:1", "prompt_completion", {}), tokenizer, spec)
    assert 0 < asked.weights.sum() < texts.weights.sum()
