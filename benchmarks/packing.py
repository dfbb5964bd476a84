"""Measure how full rows are on real chat data, and how long an epoch takes to plan.

The output is the rows of docs/explanation/performance.md.

    python benchmarks/packing.py --trees oasst_en_100_tree.jsonl --model MODEL
    python benchmarks/packing.py --plan 10000000

MODEL is as in model.path of a config; its tokenizer and chat template are used. Conversations are all paths from the
prompt of an OpenAssistant tree to a leaf that an assistant wrote. What counts is what a step computes: the places of
all rows of all ranks, empty rows included, as `collate` makes them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launcher.contract.spec import DataSpec, ModelSpec, RunSpec, TrainSpec
from sft.data.batches.batch import RankShare, collate
from sft.data.batches.sampler import TokenSchedule
from sft.data.cache.store import TokenCache
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.schedule import batch_schedule
from sft.model_source import resolve_model_dir

ROW_LENGTHS = (2048, 4096)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trees", type=Path, help="OpenAssistant trees, one a line")
    parser.add_argument("--model", default="", help="whose tokenizer and chat template to use")
    parser.add_argument("--plan", type=int, help="plan an epoch of so many examples of drawn lengths")
    arguments = parser.parse_args()
    if arguments.trees:
        with tempfile.TemporaryDirectory() as folder:
            measure_fill(arguments.trees, arguments.model, Path(folder))
    if arguments.plan:
        measure_planning(arguments.plan)


def measure_fill(trees: Path, model: str, folder: Path) -> None:
    """Print how full rows are with every way to make batches, for both row lengths."""
    rows = [row for line in trees.read_text(encoding="utf-8").splitlines() for row in conversations(json.loads(line))]
    file = folder / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for length in ROW_LENGTHS:
        spec = RunSpec(
            run_root=str(folder),
            model=ModelSpec(path=model),
            data=DataSpec(train=[str(file)], seq_length=length),
            train=TrainSpec(epochs=1),
        )
        (cache,) = open_or_build(spec, resolve_model_dir(spec, convert=True), build=True).training_caches
        print(f"{len(cache)} examples, {int((cache.lengths - 1).sum()):,} tokens, rows of {length}")
        whole = TokenSchedule(lengths=cache.lengths - 1, row_length=length, rows_per_step=1, seed=1, shuffle=True)
        fill = (cache.lengths - 1).sum() / (whole.steps_per_epoch * length)
        print(f"  the epoch's rows: {fill:.2%} full, {whole.steps_per_epoch} rows")
        for ranks in (1, 8):
            report(spec, cache, length, ranks)


def report(spec: RunSpec, cache: TokenCache, length: int, ranks: int) -> None:
    """Print how full the rows of an epoch's steps are, spread over `ranks` data parallel ranks."""
    tokens = {"global_batch_unit": "tokens", "global_batch_size": 32 * length}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
        # data, train, micro-batch size
        "packed, 32 rows a step": ({"packing": True}, tokens, 1),
        "packed, 128 examples a step": ({"packing": True}, {"global_batch_size": 128}, 1),
        "packed, 32 examples a step": ({"packing": True}, {"global_batch_size": 32}, 1),
        "padded, 128 examples, grouped by length": ({"group_by_length": True}, {"global_batch_size": 128}, 4),
        "padded, 128 examples": ({}, {"global_batch_size": 128}, 4),
    }
    for name, (data, train, micro_batch) in ways.items():
        settings = RunSpec(data=DataSpec(seq_length=length, **data), train=TrainSpec(**train))
        schedule = batch_schedule(settings, cache, shuffle=True)
        places = used = 0
        for step in range(schedule.steps_per_epoch):
            for rank in range(ranks):
                share = RankShare(
                    dp_rank=rank,
                    dp_size=ranks,
                    micro_batch_size=micro_batch,
                    pad_to_multiple=8,
                    row_length=length if settings.data.packing else None,
                )
                batch = collate(cache, schedule, step, share)
                places += sum(micro.tokens.numel() for micro in batch.micro_batches)
            used += batch.tokens
        print(f"  dp {ranks}, {name}: {used / places:.2%} full")


def conversations(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every path from a tree's prompt to a leaf that an assistant wrote, as a chat row."""
    waiting: list[tuple[dict[str, Any], list[dict[str, str]]]] = [(tree["prompt"], [])]
    while waiting:
        node, before = waiting.pop()
        role = "user" if node["role"] == "prompter" else "assistant"
        messages = [*before, {"role": role, "content": node["text"]}]
        replies = node.get("replies") or []
        waiting += [(reply, messages) for reply in replies]
        if not replies and role == "assistant":
            yield {"messages": messages}


def measure_planning(examples: int) -> None:
    """Print how long it takes to plan one epoch: the order of examples, packing, and the order of rows."""
    drawn = np.random.default_rng(0).lognormal(np.log(375), 1.0, examples)
    lengths = np.clip(drawn, 2, 4095).astype(np.int64)
    schedule = TokenSchedule(lengths=lengths, row_length=4096, rows_per_step=64, seed=1, shuffle=True)
    began, cpu = time.perf_counter(), time.process_time()
    schedule.examples_at(0)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    fill = lengths.sum() / (schedule.steps_per_epoch * 64 * 4096)
    print(f"{examples:,} examples: planned in {wall:.1f} s ({cpu:.1f} s of one core), rows {fill:.2%} full")


if __name__ == "__main__":
    main()
