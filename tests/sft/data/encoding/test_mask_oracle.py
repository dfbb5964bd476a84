"""Our masks on chat templates of many families, against marks that others set by hand.

The `trl` wheel ships the chat templates of many families as their checkpoints have them, and for most a training twin
in which `{% generation %}` marks what is trained. Masks on the ORIGINAL template are compared with the twin's marks,
turn by turn: the twin renders the conversation up to a turn, and marks what is trained of the turn it ends with.
The table in docs/how-to/chat-templates.md, read here, says what happens to each family and kind of conversation.

The tokenizers of these families cannot be had without a network. Each family gets a byte-level BPE that holds the
control tokens its templates write, so that ids, offsets and special tokens are real ones.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.masking import Encoded, Encoder
from sft.data.reading.formats import Example
from sft.data.reading.messages import read_messages, read_tools

DOCS = Path(__file__).parents[4] / "docs" / "how-to" / "chat-templates.md"
KINDS = ("turns", "system", "tools", "thinking", "thinking turns", "thinking tools")

GIVEN = {
    "qwen2_5": "\n",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), "<think>\n"),
    **dict.fromkeys(("nemotron_3_5_lightning", "qwen3_5_think", "qwen3_6", "qwen3_8"), "<think>\n"),
    "qwen3_5_nothink": "<think>\n\n</think>\n\n",
}
"""What twins mark although the generation prompt ends with it, so that no model ever generates it."""

ENDING = {"llava_next": " ", "diffusion_gemma": "<|tool_response>"}
"""What the original writes after an answer (the latter after a call), and the twin leaves unmarked."""

HEADER = {"diffusion_gemma": "<|turn>model\n"}
"""What the original writes in front of an answer to a tool's result, though its generation prompt does not."""

PARTS = ("idefics3", "llava_next", "smolvlm")
"""Families whose templates want content as a list of parts."""

_CONTROL = re.compile(
    r"<\|[^|<>\s'{}]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|</?s>|\[gMASK\]|<sop>|<[be]os>|<\|[a-z_]+>|<[a-z_]+\|>|<image>"  # noqa: RUF001
)
_BEGIN = ("<bos>", "<|begin_of_text|>", "<|startoftext|>", "<｜begin▁of▁sentence｜>", "<s>")  # noqa: RUF001
_END = ("<|im_end|>", "<|eot_id|>", "<|return|>", "<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "</s>")  # noqa: RUF001

CALL = [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name."}},
                "required": ["city"],
            },
        },
    }
]


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


QUESTION, ANSWER = turn("user", "What is 2+2?"), turn("assistant", "It is 4.")
CALLING = [
    turn("user", "Rain?"),
    turn("assistant", "", tool_calls=CALL),
    turn("tool", '{"rain": 0}', name="get_weather"),
]
THOUGHT = {"reasoning_content": "Two and two."}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "turns": [turn("user", "Hi, who are you?"), turn("assistant", "An answer, I am."), QUESTION, ANSWER],
    "system": [turn("system", "Be brief."), QUESTION, ANSWER, turn("user", "More?"), turn("assistant", "No more.")],
    "tools": [*CALLING, turn("assistant", "No rain."), turn("user", "Thanks"), turn("assistant", "Welcome.")],
    "thinking": [QUESTION, {**ANSWER, **THOUGHT}],
    "thinking turns": [QUESTION, {**ANSWER, **THOUGHT}, turn("user", "3+3?"), turn("assistant", "It is 6.", **THOUGHT)],
    "thinking tools": [
        CALLING[0],
        {**CALLING[1], "reasoning_content": "I must look."},
        CALLING[2],
        turn("assistant", "No rain.", reasoning_content="So it is."),
    ],
}


def templates() -> Path:
    wheel = importlib.util.find_spec("trl")
    if wheel is None or wheel.origin is None:
        pytest.skip("the wheel trl is not installed")
    return Path(wheel.origin).parent / "chat_templates"


def expected_outcomes() -> dict[str, tuple[str, ...]]:
    """The table in docs/how-to/chat-templates.md: family -> what happens to each kind of conversation."""
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    head = next(index for index, row in enumerate(rows) if row[:1] == ["family"])
    assert tuple(rows[head][1 : 1 + len(KINDS)]) == KINDS
    body = rows[head + 2 :]
    end = next((index for index, row in enumerate(body) if not row), len(body))
    return {row[0]: tuple(row[1 : 1 + len(KINDS)]) for row in body[:end]}


def families() -> list[str]:
    """Every family that has marks: of its own, or in a twin."""
    found = []
    for path in sorted(templates().glob("*.jinja")):
        if not path.stem.endswith("_training"):
            twin = path.with_name(f"{path.stem}_training.jinja")
            if twin.is_file() or re.search(r"{%-?\s*generation", path.read_text()):
                found.append(path.stem)
    return found


class Family:
    """The original and the twin of one family, and a tokenizer with its control tokens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.original = (templates() / f"{name}.jinja").read_text()
        twin = templates() / f"{name}_training.jinja"
        self.twin = twin.read_text() if twin.is_file() else self.original
        self.tokenizer = tokenizer_for(self.original, self.twin)

    def messages(self, kind: str) -> list[dict[str, Any]]:
        turns = CONVERSATIONS[kind]
        if self.name in PARTS:
            return [{**item, "content": [{"type": "text", "text": item["content"]}]} for item in turns]
        return turns

    def encode(self, kind: str, on_mismatch: Literal["error", "split"]) -> list[Encoded]:
        messages = read_messages(self.messages(kind), "row: messages", {})
        tools = read_tools(TOOLS if "tools" in kind else None, "row")
        encoder = Encoder(self.tokenizer, DataSpec(on_mismatch=on_mismatch))
        return encoder.encode(Example(where="row", messages=messages, tools=tools))

    def prompt(self, kind: str, count: int) -> str:
        """What generation begins with after `count` messages."""
        text: Any = self.tokenizer.apply_chat_template(
            self.messages(kind)[:count], tools=self.tools(kind), tokenize=False, add_generation_prompt=True
        )
        return str(text)

    def marked(self, kind: str, count: int) -> list[str]:
        """What the twin marks in the first `count` messages; marks that touch are one."""
        (text,), (marks,) = render_jinja_template(
            [self.messages(kind)[:count]],
            tools=self.tools(kind),
            chat_template=self.twin,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        trained = np.zeros(len(text) + 2, dtype=np.int8)
        for first, last in marks:
            trained[first + 1 : last + 1] = 1
        edges = np.flatnonzero(np.diff(trained)).reshape(-1, 2)
        return [text[a:b] for a, b in edges]

    def wanted(self, kind: str, index: int, mark: str) -> str:
        """What must be trained of message `index`: the twin's mark, less what the generation prompt gives."""
        prompt = self.prompt(kind, index)
        given = next(mark[:n] for n in range(len(mark), -1, -1) if prompt.endswith(mark[:n]))
        assert given in ("", GIVEN.get(self.name)), "a twin marks more of the prompt than is listed"
        header, ending = HEADER.get(self.name, ""), ENDING.get(self.name, "")
        after_tool = self.messages(kind)[index - 1]["role"] == "tool"
        calls = "tool_calls" in self.messages(kind)[index]
        tail = ending if calls or ending.isspace() else ""
        return (header if after_tool else "") + mark[len(given) :] + tail

    @staticmethod
    def tools(kind: str) -> list[Any] | None:
        return TOOLS if "tools" in kind else None


@functools.cache
def family(name: str) -> Family:
    return Family(name)


def tokenizer_for(original: str, twin: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens that the templates write."""
    controls = sorted(set(_CONTROL.findall(original + twin)))
    begin = next((token for token in _BEGIN if token in controls), "<BOS_TOKEN>")
    end = next((token for token in _END if token in controls), "<|endoftext|>")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=sorted({*controls, begin, end}),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([original], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, chat_template=original
    )


def runs(encoded: Encoded) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(encoded.weights > 0, prepend=False, append=False)).reshape(-1, 2)
    return [(int(a), int(b)) for a, b in edges]


def check(name: str, kind: str, encoded: list[Encoded]) -> None:
    """Each answer is trained once, as the twin marks it, after the ids that generation would begin with.

    A whole conversation is compared with the whole twin; turns that were split, with the twin up to the turn.
    """
    each = family(name)
    turns = [index for index, message in enumerate(each.messages(kind)) if message["role"] == "assistant"]
    prompts = {
        tuple(each.tokenizer(each.prompt(kind, index), add_special_tokens=False)["input_ids"]) for index in turns
    }
    trained = []
    for example in encoded:
        for first, last in runs(example):
            assert tuple(example.ids[:first].tolist()) in prompts
            trained.append(str(each.tokenizer.decode(example.ids[first:last])))
        assert example.ends.sum() == example.answers == len(runs(example)), "an answer without a terminator"
    if len(encoded) == 1:
        marks = each.marked(kind, len(each.messages(kind)))
    else:
        marks = [each.marked(kind, index + 1)[-1] for index in turns]
    wanted = [each.wanted(kind, index, mark) for index, mark in zip(turns, marks, strict=True)]
    assert sorted(trained) == sorted(wanted)


def outcome(name: str, kind: str) -> str:
    """`equal`, `split` where only data.on_mismatch split can train it, or `no`; masks are checked on the way."""
    each = family(name)
    try:
        whole = each.encode(kind, "error")
    except DataError as error:
        if "rewrites, once turns follow" not in str(error):
            assert re.search("does not (write|go on from)|chat template refuses", str(error))
            return "no"
    else:
        assert len(whole) == 1
        check(name, kind, whole)
        return "equal"
    try:
        check(name, kind, each.encode(kind, "split"))
    except DataError:
        return "no"
    return "split"


@pytest.mark.parametrize("name", expected_outcomes())
def test_trap_9_masks_are_those_that_others_marked_by_hand(name: str) -> None:
    """Seen to fail, in the families concerned: spans that end where the content does, no check against the whole, no
    end token taken from the next header, no end of the whole taken off, another end token taken for the turn's own."""
    if not (templates() / f"{name}.jinja").is_file():
        pytest.skip(f"this trl has no {name}")
    assert tuple(outcome(name, kind) for kind in KINDS) == expected_outcomes()[name]


def test_every_family_with_marks_is_in_the_table() -> None:
    assert sorted(expected_outcomes()) == families()


@pytest.mark.parametrize(
    ("name", "kind", "thinking"),
    [
        ("qwen3_5_nothink", "thinking", "true"),
        ("nemotron_3_nano", "turns", "false"),
        ("qwen3_5_think", "system", "false"),
    ],
)
def test_template_variables_open_what_the_default_prompt_closes(name: str, kind: str, thinking: str) -> None:
    """Seen to fail with the variables left out of the generation prompt."""
    each = family(name)
    messages = read_messages(each.messages(kind), "row: messages", {})
    spec = DataSpec(on_mismatch="split", chat_template_kwargs={"enable_thinking": thinking})
    examples = Encoder(each.tokenizer, spec).encode(Example(where="row", messages=messages))
    texts = [str(each.tokenizer.decode(example.ids[a:b])) for example in examples for a, b in runs(example)]
    answers = [message for message in each.messages(kind) if message["role"] == "assistant"]
    assert len(texts) == len(answers)
    for text, answer in zip(texts, answers, strict=True):
        assert text.endswith(f"{answer['content']}<|im_end|>\n")
        assert ("Two and two." in text) == (thinking == "true")
