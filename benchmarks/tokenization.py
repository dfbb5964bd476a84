"""Tokens a second that one core turns from chat rows into ids and loss weights: ours against `datasets.map`.

    python benchmarks/tokenization.py --rows gsm8k_test.jsonl --model SMOLLM2

Both read the same prompt/completion rows and give the same ids and the same trained tokens, which is checked. The map
function is what trainers on `datasets` do: the chat template once for the prompt and once for the whole row, and a mask
by the prompt's length. Needs the package `datasets`. What counts is processor time, of child processes too, so that
other work on the machine does not; importing is left out.

With `--parts` it tells instead what each part of our way takes for a row, and what the map function takes, without
`datasets`: each part by itself, the best of six.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launcher.contract.spec import DataSpec, ModelSpec, RunSpec, TrainSpec
from sft.data.cache.build import Job, Worker
from sft.data.encoding.chat import ChatRenderer
from sft.data.encoding.escape import ControlTokens
from sft.data.encoding.tokenizer import ChatTemplates, load_tokenizer
from sft.data.prepared.prepare import open_or_build
from sft.data.reading.files import cut
from sft.data.reading.formats import Example, parse_row
from sft.data.reading.messages import Message
from sft.model_source import resolve_model_dir

COLUMNS = {"prompt": "question", "completion": "answer"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, required=True, help="jsonl with question and answer")
    parser.add_argument("--model", required=True, help="whose tokenizer and chat template to use")
    parser.add_argument("--copies", type=int, default=8, help="how many times over the file is taken")
    parser.add_argument("--parts", action="store_true", help="where the time of a row goes")
    arguments = parser.parse_args()
    if arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            tell_parts(arguments.rows, arguments.model, Path(folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.rows, arguments.copies, arguments.model, Path(folder))


def compare(rows: Path, copies: int, model: str, folder: Path) -> None:
    """Tokenize the rows both ways and print the rates."""
    file = folder / "rows.jsonl"
    file.write_text(rows.read_text(encoding="utf-8") * copies, encoding="utf-8")
    data = DataSpec(train=[str(file)], columns=COLUMNS, seq_length=4096, workers=1)
    spec = RunSpec(run_root=str(folder), model=ModelSpec(path=model), data=data, train=TrainSpec(epochs=1))
    model_dir = resolve_model_dir(spec, convert=True)
    cache, ours = timed(lambda: open_or_build(spec, model_dir, build=True).train)
    mapped, theirs = timed(lambda: map_rows(file, model_dir, folder))
    check_same(cache, mapped)
    tokens = int(cache.offsets[-1])
    print(f"{len(cache):,} rows, {tokens:,} tokens, one core")
    print(f"sft prepare   {tokens / ours:>10,.0f} tokens/s")
    print(f"datasets.map  {tokens / theirs:>10,.0f} tokens/s")
    print(f"ratio         {theirs / ours:>10.2f}")


def map_rows(file: Path, model_dir: Path, folder: Path) -> Any:
    """Return the same rows, tokenized by `datasets.map` in one process."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(model_dir)

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        turns: list[dict[str, str | None]] = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
        return map_row(tokenizer, turns)

    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
    return rows.map(encode, remove_columns=rows.column_names)


def tell_parts(rows: Path, model: str, folder: Path) -> None:
    """Print the microseconds of a row that each part takes."""
    spec = RunSpec(run_root=str(folder), model=ModelSpec(path=model), train=TrainSpec(epochs=1))
    model_dir = resolve_model_dir(spec, convert=True)
    tokenizer = load_tokenizer(model_dir)
    data = DataSpec(columns=COLUMNS, seq_length=4096, format="prompt_completion")
    worker = Worker(Job(tokenizer_dir=model_dir, data=data))
    renderer = ChatRenderer(tokenizer, ChatTemplates(tokenizer.chat_template), ControlTokens(tokenizer), data)
    lines = rows.read_bytes().splitlines()
    parsed = [parse_row(line, "", "prompt_completion", COLUMNS, []) for line in lines]
    examples = [
        Example(where="", messages=(Message("user", each.prompt), Message("assistant", each.completion or "")))
        for each in parsed
    ]
    texts = [renderer.render(example)[0].text for example in examples]
    turns = [[{"role": turn.role, "content": turn.content} for turn in example.messages] for example in examples]
    (whole,) = cut(rows, 1 << 30)
    encode = tokenizer.backend_tokenizer.encode
    parts: dict[str, Callable[[], Any]] = {
        "a row as JSON": lambda: [parse_row(line, "", "prompt_completion", COLUMNS, []) for line in lines],
        "template, twice, and checks": lambda: [renderer.render(example) for example in examples],
        "tokenizer alone": lambda: [encode(text, add_special_tokens=False) for text in texts],
        "tokens with their places": lambda: [renderer.controls.tokenize(text) for text in texts],
        "all of it": lambda: worker.run((whole, folder / "part")),
        "map function": lambda: [map_row(tokenizer, each) for each in turns],
    }
    for name, work in parts.items():
        best = min(timed(work)[1] for _ in range(6))
        print(f"{name:<30}{best / len(lines) * 1e6:>8.0f} us")


def map_row(tokenizer: Any, turns: list[dict[str, str | None]]) -> dict[str, list[int]]:
    """Return ids and mask of a row as trainers on `datasets` make them."""
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    return {"ids": ids, "mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}


def check_same(cache: Any, mapped: Any) -> None:
    """Exit with an error where the two ways gave a row other ids or other trained tokens."""
    for index in range(0, len(cache), max(1, len(cache) // 200)):
        ids, weights = cache.tokens(index)
        row = mapped[index]
        if not np.array_equal(ids, row["ids"]) or not np.array_equal(weights > 0, np.array(row["mask"]) > 0):
            raise SystemExit(f"row {index} differs")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of `work` and the processor seconds that it took."""
    before = processor_seconds()
    result = work()
    return result, processor_seconds() - before


def processor_seconds() -> float:
    """Return user and system time of this process and of its ended children, in seconds."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
