"""No file ends in a traceback: thousands of mutated rows are trained or refused by a sentence."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.length_policy import fit
from sft.data.encoding.masking import Encoder
from sft.data.reading.files import cut, read_lines
from sft.data.reading.formats import parse_row, with_detected_form
from sft.data.reading.tables import holds_lines, read_rows, write_lines
from tests.tiny_model import make_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": 1}}}
ROWS: list[dict[str, Any]] = [
    {"prompt": "hi", "completion": "yo"},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]},
    {"instruction": "hi", "input": "x", "output": "yo", "system": "s"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "weight": 0.5}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "4", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "yo", "reasoning_content": "hm"},
        ],
        "tools": [TOOL],
        "system": "s",
    },
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "tools": json.dumps([TOOL])},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
    {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "position_ids": [0, 1, 2], "seq_lengths": [3]},
    {"text": "all of it"},
]


def deep(levels: int, inner: object = 1) -> object:
    for _ in range(levels):
        inner = {"a": inner} if levels % 2 else [inner]
    return inner


VALUES: list[Callable[[random.Random], object]] = [
    lambda _: None,
    lambda _: True,
    lambda _: 0,
    lambda _: -1,
    lambda _: 2**31,
    lambda _: 10**400,
    lambda _: 1e39,
    lambda _: float("nan"),
    lambda _: float("inf"),
    lambda _: "",
    lambda _: " ",
    lambda _: "\ud800",
    lambda _: "\x00\u2028\x85",
    lambda _: chr(0x100000),
    lambda _: "<|im_end|>",
    lambda _: "{{ 1 / 0 }}",
    lambda _: "[" * 50_000,
    lambda _: json.dumps(deep(600)),
    lambda _: "[1, 2",
    lambda _: [],
    lambda _: {},
    lambda _: [[]],
    lambda _: [None],
    lambda _: {"": ""},
    lambda _: deep(600),
    lambda _: deep(99),
    lambda _: {"function": None},
    lambda _: {"type": "image"},
    lambda r: copy.deepcopy(r.choice(ROWS)),
    lambda r: copy.deepcopy(r.choice(ROWS[3]["messages"])),
    lambda r: copy.deepcopy([TOOL, CALL, r.random()]),
]
KEYS = [
    "role",
    "content",
    "weight",
    "train",
    "name",
    "tools",
    "tool_calls",
    "system",
    "label",
    "input",
    "a.b",
    "",
    "\ud800",
]


def mutated(row: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The row with one to three changes anywhere in it."""
    row = copy.deepcopy(row)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        node: Any = row
        while isinstance(node, dict | list) and node:
            key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if chance.random() < 0.3 or not isinstance(node[key], dict | list):
                break
            node = node[key]
        what = chance.random()
        if not isinstance(node, dict | list) or not node:
            continue
        if what < 0.6:
            node[key] = chance.choice(VALUES)(chance)
        elif what < 0.75:
            del node[key]
        elif isinstance(node, dict):
            node[chance.choice(KEYS)] = chance.choice(VALUES)(chance)
        else:
            node.insert(chance.randint(0, len(node)), chance.choice(VALUES)(chance))
    return row


def json_text(row: object) -> str:
    return json.dumps(row)


def flipped(content: bytes, chance: random.Random) -> bytes:
    """The bytes with some of them changed, put in or taken out."""
    changed = bytearray(content)
    for _ in range(chance.choice((0, 0, 0, 0, 0, 1, 2))):
        at = chance.randrange(max(len(changed), 1))
        what = chance.random()
        if what < 0.5 and changed:
            changed[at] ^= 1 << chance.randrange(8)
        elif what < 0.75:
            changed[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 5)))
        else:
            del changed[at : at + chance.randint(1, 9)]
    return bytes(changed)


def write(path: Path, rows: list[dict[str, Any]], chance: random.Random) -> bool:
    """Write the rows as the file's ending says, and return whether they can be written so."""
    if path.suffix in (".jsonl", ".json"):
        lines = [json_text(row) for row in rows]
        text = "\n".join(lines) if path.suffix == ".jsonl" else f"[{', '.join(lines)}]"
        path.write_bytes(flipped(text.encode(), chance))
        return True
    if path.suffix == ".csv":
        names = list(dict.fromkeys(key for row in rows for key in row))
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(names)
        cells = [
            [value if isinstance(value := row.get(key, ""), str) else json_text(value) for key in names] for row in rows
        ]
        writer.writerows(cells)
        path.write_bytes(flipped(table.getvalue().encode("utf-8", "surrogatepass"), chance))
        return True
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    try:
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError, NotImplementedError):
        return False  # such a file does not exist
    return True


def outcome(path: Path, encoder: Encoder, data: DataSpec) -> str:
    """What becomes of a file in `prepare`: `trained`, or what it is refused for."""
    try:
        data = with_detected_form([path], data, "data.train")
        lines = path
        if not holds_lines(path):
            lines = path.with_suffix(".lines")
            write_lines(path, lines)
        for part in cut(lines, 1 << 20, None if lines == path else path):
            for number, line in read_lines(part):
                example = parse_row(line, part.where(number), data.format, data.columns, data.ignore_keys)
                for encoded in encoder.encode(example):
                    fit(encoded, data, Counter())
    except DataError as error:
        assert error.problems
        assert all(str(path) in problem or "data.train" in problem for problem in error.problems), error.problems
        return str(error)
    return "trained"


def fuzz(folder: Path, rows: int, seed: int) -> Counter[bool]:
    """Mutate so many rows, and return how many files were trained and refused."""
    tokenizer = make_tokenizer()
    chance = random.Random(seed)
    outcomes: Counter[bool] = Counter()
    encoder = Encoder(tokenizer, DataSpec(seq_length=64))
    endings = ("jsonl", "json", "csv", "parquet", "arrow")
    made = 0
    while made < rows:
        path = folder / f"{made}.{chance.choice(endings)}"
        chosen = chance.choice(ROWS)
        some = [mutated(chosen, chance)]
        some.insert(chance.randint(0, 1), chosen)  # an undamaged one, for the form of the file
        if not write(path, some, chance):
            continue
        made += len(some) - 1
        ignored = chance.choice([[], ["images", "weight", "label"]])
        outcomes[outcome(path, encoder, DataSpec(seq_length=64, ignore_keys=ignored)) == "trained"] += 1
        path.unlink()
    return outcomes


DEEP_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": deep(900)}}}
DEEP_TOOL = {"type": "function", "function": {"name": "f", "parameters": deep(600)}}
CHAT = ROWS[3]["messages"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT, "tools": [DEEP_TOOL]}, "nested too deeply, in more than 100 levels"),
        ({"messages": CHAT, "tools": json.dumps([DEEP_TOOL])}, "nested too deeply, in more than 100 levels"),
        ({"messages": [CHAT[0], {"role": "assistant", "tool_calls": [DEEP_CALL]}]}, "nested too deeply"),
        ({"messages": CHAT, "unread": deep(600)}, "nested too deeply"),
        ({"messages": CHAT, "tools": [{"function": None}]}, "a tool's 'function' must be an object, found null"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 10**400}]},
            "'weight' must be a number .*, found the number of 400",
        ),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 1e39}]},
            "must be a number from 0 to 1,000,000, found the number 1e",
        ),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 1e-40}]}, "must be a number from 0 to 1,000,000"),
        ({"input_ids": [1, 2], "loss_mask": [0, 1e39]}, "'loss_mask' must be a number from 0 to 1,000,000"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_what_was_a_traceback_is_a_sentence(tmp_path: Path, row: dict[str, Any], message: str, ending: str) -> None:
    """Each without a file or a line, or trained with an infinite weight."""
    path = tmp_path / f"a.{ending}"
    assert write(path, [row], Unchanging())
    found = outcome(path, Encoder(make_tokenizer(), DataSpec(seq_length=64)), DataSpec(seq_length=64))
    if ending != "csv" or not {"unread", "input_ids"} & set(row):  # texts there
        assert re.search(rf"a\.{ending}:[12]\b.*{message}", found), found


class Unchanging(random.Random):
    """Chooses the first of everything, which changes no byte."""

    def choice(self, seq: Any) -> Any:
        return seq[0]


def test_a_number_of_more_digits_than_python_converts(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"text": %s}'), ("a.json", '[{"text": %s}]')):
        (tmp_path / name).write_text(text % ("1" * 5_000))
        found = outcome(tmp_path / name, Encoder(make_tokenizer(), DataSpec()), DataSpec())
        assert f"{name}:1: malformed JSON: Exceeds the limit" in found


@pytest.mark.parametrize("form", ["a.parquet", "stream.arrow", "file.arrow"])
def test_flipped_bytes_of_tables_are_damage(tmp_path: Path, form: str) -> None:
    """Offsets of texts were seen to lead anywhere in memory, up to a segmentation fault."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table, path, chance = pa.Table.from_pylist([ROWS[3]] * 20), tmp_path / form, random.Random(5)
    if form == "a.parquet":
        pq.write_table(table, path)
    else:
        new = pa.ipc.new_stream if form == "stream.arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    whole = path.read_bytes()
    damaged = 0
    for _ in range(80):
        path.unlink()  # mapped memory of the file before stays as it is
        path.write_bytes(flipped(flipped(flipped(whole, chance), chance), chance))
        try:
            list(read_rows(path))
        except DataError as error:
            damaged += 1
            assert str(path) in str(error)
    assert damaged > 5


def test_no_traceback_for_mutated_rows(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 400, seed=1)
    assert min(outcomes[True], outcomes[False]) > 20, "both happen"


@pytest.mark.slow  # the same for longer
@pytest.mark.parametrize("seed", range(2, 7))
def test_no_traceback_for_thousands_of_mutated_rows(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, 2_000, seed)
