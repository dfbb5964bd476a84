"""Files that do not hold one object a line: the same rows whatever the file, and each error with its place."""

from __future__ import annotations

import builtins
import csv
import dataclasses
import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec, LoggingSpec, RunSpec
from sft.data.cache.store import TokenCache
from sft.data.prepared.prepare import open_or_build
from sft.data.reading.files import expand
from sft.data.reading.formats import parse_row
from sft.data.reading.split import Split
from sft.data.reading.tables import as_json, dataset_files, holds_lines, place, read_rows, write_lines
from tests.sft.tokenizers_for_tests import SHARED_DATA
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl

ROWS = [{"prompt": "a,\nb", "completion": 'c "d"'}, {"prompt": "\u6f22", "completion": ""}]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def cache_of(path: Path, tokenizer_dir: Path, tmp_path: Path, **data: Any) -> TokenCache:
    values = {"train": [str(path)], "cache_dir": str(tmp_path / "cache"), "workers": 1, "seq_length": 8192, **data}
    spec = RunSpec(data=DataSpec(**values), logging=LoggingSpec(progress_bar=False))
    return open_or_build(spec, tokenizer_dir, build=True).train


def tokens_of(cache: TokenCache) -> list[tuple[list[int], list[float]]]:
    return [(ids.tolist(), weights.tolist()) for ids, weights in map(cache.tokens, range(len(cache)))]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def write_dataset(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """As `datasets.save_to_disk` leaves it: Arrow streams and a state.json that names them in order."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    half = len(rows) // 2
    table = pa.Table.from_pylist(rows)
    names = []
    for index, part in enumerate((table.slice(0, half), table.slice(half))):
        names.append(f"data-{index:05d}-of-00002.arrow")
        with pa.OSFile(str(folder / names[-1]), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_every_kind_of_file_gives_the_same_tokens(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = make_chat_rows(30, 1)
    pairs = [{"prompt": row["messages"][-2]["content"], "completion": row["messages"][-1]["content"]} for row in rows]
    array = tmp_path / "pretty.json"
    array.write_text(json.dumps(pairs, indent=2))
    files = [
        array,
        write_csv(tmp_path / "a.csv", pairs),
        write_csv(tmp_path / "a.tsv", pairs, "\t"),
        write_parquet(tmp_path / "a.parquet", pairs),
        write_dataset(tmp_path / "saved", pairs),
    ]
    expected = tokens_of(cache_of(write_jsonl(tmp_path / "a.jsonl", pairs), tokenizer_dir, tmp_path))
    for file in files:
        cache = cache_of(file, tokenizer_dir, tmp_path)
        assert tokens_of(cache) == expected
        assert sorted(path.suffix for path in cache.directory.iterdir()) == [".json", *[".npy"] * 5]


def test_nested_rows_of_arrow_are_those_of_json(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Arrow gives each message every key. Seen to fail with those nulls passed on to the template."""
    rows = make_chat_rows(12, 1)
    rows[3]["messages"][-1]["weight"] = 0.5
    rows[4]["messages"][-1]["name"] = "bot"
    expected = tokens_of(cache_of(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer_dir, tmp_path))
    assert tokens_of(cache_of(write_parquet(tmp_path / "a.parquet", rows), tokenizer_dir, tmp_path)) == expected
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    (row,) = [row for _, row in read_rows(write_parquet(tmp_path / "b.parquet", [{"calls": [call, {"type": "g"}]}]))]
    assert row == {"calls": [call, {"type": "g"}]}


def test_columns_may_hold_lists_as_json_text(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = make_chat_rows(5, 1)
    expected = tokens_of(cache_of(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer_dir, tmp_path))
    file = write_csv(tmp_path / "a.csv", [{"messages": json.dumps(row["messages"])} for row in rows])
    assert tokens_of(cache_of(file, tokenizer_dir, tmp_path)) == expected


def test_rows_have_the_number_of_their_first_line(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ROWS)
    assert list(read_rows(file)) == [(2, ROWS[0]), (4, ROWS[1])]
    array = tmp_path / "a.json"
    array.write_text('\n[\n  {"a": 1},\n\n  {"a":\n 2}\n]\n')
    assert list(read_rows(array)) == [(3, {"a": 1}), (5, {"a": 2})]
    array.write_text("[]")
    assert list(read_rows(array)) == []
    assert list(read_rows(write_parquet(tmp_path / "a.parquet", ROWS))) == [(1, ROWS[0]), (2, ROWS[1])]
    assert place(tmp_path / "a.csv", 4) == f"{tmp_path}/a.csv:4"
    assert place(tmp_path / "a.parquet", 2) == f"{tmp_path}/a.parquet row 2"


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, lines in (('{"a": 1}\n', True), ("\ufeff\n [", False), ("", True)):
        file.write_text(text, encoding="utf-8")
        assert holds_lines(file) == lines
    (tmp_path / "a.jsonl").touch()
    assert holds_lines(tmp_path / "a.jsonl")


def test_errors_name_the_row_of_the_file_the_user_wrote(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to fail with the number of the line that was written out."""
    rows = [{"prompt": "a\n\nb", "completion": "c"}, {"prompt": "a", "completion": None}]
    with pytest.raises(DataError) as caught:
        cache_of(write_parquet(tmp_path / "a.parquet", rows), tokenizer_dir, tmp_path)
    assert str(caught.value) == f"{tmp_path}/a.parquet row 2: 'completion' must be a text, found null"
    array = tmp_path / "a.json"
    array.write_text(json.dumps(rows, indent=1))
    with pytest.raises(DataError) as caught:
        cache_of(array, tokenizer_dir, tmp_path)
    assert str(caught.value) == f"{tmp_path}/a.json:6: 'completion' must be a text, found null"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '[{"a": 1}\n {"a": 2}]', ":2: malformed JSON: ',' or ']' is missing after an object"),
        ("a.json", '[{"a": 1},\n {"a": }]', ":2: malformed JSON at column 8: Expecting value"),
        ("a.json", '[{"a": 1}', ":1: malformed JSON: ',' or ']' is missing after an object"),
        ("a.json", "[\n1]", ":2: the number 1, where a JSON object is needed"),
        ("a.json", "[" * 100_000, ":1: JSON is nested too deeply, in more than 100 levels"),
        ("a.csv", "a,b\n1,2\n3\n", ":3: 1 fields, where the header names 2"),
        ("a.csv", "a,b,a\n", ":1: the header names 'a' more than once"),
        ("a.csv", 'a,b\n1,"2\n', ":2: unexpected end of data"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert str(caught.value) == f"{tmp_path}/{name}{message}"


def test_what_is_not_utf_8_or_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\xff\n")
    with pytest.raises(DataError, match=r"a\.csv:2: not UTF-8 \(byte 3 of the line\)"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.json").write_bytes(b"[\xff")
    with pytest.raises(DataError, match=r"a\.json:1: not UTF-8 \(byte 2 of the line\)"):
        list(read_rows(tmp_path / "a.json"))
    pytest.importorskip("pyarrow")
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(b"no table at all")
        with pytest.raises(DataError, match=rf"{name}: damaged after row 0"):
            list(read_rows(tmp_path / name))


def test_what_json_has_no_type_for(tmp_path: Path) -> None:
    row = {"day": datetime.date(2024, 7, 26), "image": b"\xff", "none": b"", "x": 0.5}
    write_lines(write_parquet(tmp_path / "a.parquet", [row]), tmp_path / "lines")
    image = '{"bytes of binary data": 1}'
    assert (tmp_path / "lines").read_text() == f'1\t{{"day": "2024-07-26", "image": {image}, "none": null, "x": 0.5}}\n'


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("system", "'system' must be a text, found 1 bytes of binary data"),
        ("tools", "'tools' must be a list of objects, or JSON text of one, found 1 bytes of binary data"),
        ("image", "image would be left out of training"),
    ],
)
def test_binary_columns_are_not_taken_for_absent(tmp_path: Path, key: str, message: str) -> None:
    """Seen to be read as null: a system prompt, tools or an image were left out of training without a word."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    file = write_parquet(tmp_path / "a.parquet", [{"messages": turns, key: b"x"}])
    ((number, row),) = read_rows(file)
    with pytest.raises(DataError, match=re.escape(message)):
        parse_row(as_json(row).encode(), place(file, number), "messages", {})


def test_binary_data_in_the_arguments_of_a_call_are_refused(tmp_path: Path) -> None:
    """Seen to be trained as null."""
    call = {"function": {"name": "save", "arguments": {"content": b"xy"}}}
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    ((number, row),) = read_rows(write_parquet(tmp_path / "a.parquet", [{"messages": turns}]))
    with pytest.raises(DataError, match=r"messages\[1\]: tool_calls holds 2 bytes of binary data; write them as text"):
        parse_row(as_json(row).encode(), place(tmp_path / "a.parquet", number), "messages", {})


def test_lists_of_messages_in_csv_are_no_texts(tmp_path: Path) -> None:
    """The JSON itself was seen to be trained."""
    asked, said = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    row = {"prompt": json.dumps(asked), "completion": json.dumps(said)}
    ((_, read),) = read_rows(write_csv(tmp_path / "a.csv", [row]))
    with pytest.raises(DataError, match="'prompt' and 'completion' hold lists of messages as JSON text"):
        parse_row(as_json(read).encode(), "", "prompt_completion", {})
    for text in ("[1, 2]", "[]", "[{}]", "[", '[{"role": 1'):
        plain = as_json({**row, "completion": text}).encode()
        assert parse_row(plain, "", "prompt_completion", {}).completion == text


def test_binary_columns_change_no_side_of_a_split(tmp_path: Path) -> None:
    line = as_json({"text": "a", "image": b"\xff"}).encode()
    side = Split(
        "held_out", int.from_bytes(hashlib.blake2b(b'{"text": "a", "image": null}', digest_size=8).digest(), "little")
    )
    assert side.takes(line)
    assert not dataclasses.replace(side, limit=side.limit - 1).takes(line)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        DataError, match=r"a\.parquet: reading it needs pyarrow: pip install 'slurm-sft-launcher\[data\]'"
    ):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_saved_data_set_is_its_files_in_order(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "saved" / "train", ROWS)
    names = [path.name for path in expand([str(folder)], "data.train")]
    assert names == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert [path.name for path in expand([f"{tmp_path}/saved/*"], "data.train")] == names
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError) as caught:
        expand([str(tmp_path / "saved")], "data.train")
    saved = tmp_path / "saved"
    assert (
        str(caught.value) == f"data.train: '{saved}' holds several data sets; name one of {saved}/train, {saved}/test"
    )
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"train cannot be read as a saved data set: '_data_files'"):
        dataset_files(folder, "data.train")


def shared(name: str) -> Path:
    if not (SHARED_DATA / name).is_file():
        pytest.skip(f"{name} is not beside the checkout")
    return SHARED_DATA / name


def test_real_tool_calls_in_sharegpt_form(tmp_path: Path, tokenizer_dir: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% for call in m['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    file = shared("glaive_toolcall_en_demo.json")
    counts = cache_of(file, tokenizer_dir, tmp_path, chat_template=str(template), seq_length=1 << 20).counts
    turns = [turn["from"] for row in json.loads(file.read_text()) for turn in row["conversations"]]
    assert (counts.rows, counts.examples) == (300, 300)
    assert counts.terminators == counts.answers == turns.count("gpt") + turns.count("function_call")


def test_real_nested_rows(tmp_path: Path, tokenizer_dir: Path) -> None:
    columns = {"prompt": "instruction", "input": "instances.0.input", "completion": "instances.0.output"}
    file = shared("self_instruct_seed_tasks.jsonl")
    counts = cache_of(file, tokenizer_dir, tmp_path, columns=columns).counts
    assert (counts.rows, counts.examples, counts.terminators) == (175, 175, 175)


def test_a_key_with_two_values_is_refused_in_an_array(tmp_path: Path) -> None:
    """Seen to keep the last one without a word."""
    array = tmp_path / "a.json"
    array.write_text('[{"a": 1},\n {"a": 1, "a": 2}]')
    with pytest.raises(DataError, match=r"a\.json:2: malformed JSON: key 'a' has two values in one object"):
        list(read_rows(array))
