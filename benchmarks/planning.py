"""The cost model against measured and published rows, scaling on paper, and how long planning takes.

    python -m benchmarks.planning                    # the tables of docs/explanation/planning.md
    python -m benchmarks.planning --json FILE        # the scaling table's figures
    python -m benchmarks.planning --time             # how long plans take

Needs no GPU. A row that misses says so: nothing is left out but what planning_rows.yaml names with its reason.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.measured_rows import all_rows
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, ResourcesSpec, RunSpec, TrainSpec
from launcher.planning.choice import Choice, plan_layouts
from launcher.planning.search import search_layouts

GPUS = (8, 32, 256, 1024)
SCALING_ROWS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the scaling table's figures")
    parser.add_argument("--time", action="store_true", help="time plans instead")
    arguments = parser.parse_args()
    if arguments.time:
        print(timings())
        return
    if arguments.json:
        arguments.json.write_text(json.dumps(scaling_figures(), indent=2) + "\n", encoding="utf-8")
    print(f"{speed_table()}\n\n{memory_table()}\n\n{scaling_table()}")


def speed_table() -> str:
    """Return the rows' speeds, measured and predicted, as Markdown."""
    lines = ["| run | source | use | tokens/s/GPU | model says | error |", "|---|---|---|---|---|---|"]
    for row in all_rows():
        if row.tokens_per_second is not None:
            error = row.predicted_tokens_per_second / row.tokens_per_second - 1
            lines.append(
                f"| {row.what} | {row.source} | {row.use} | {row.tokens_per_second:,.0f} | "
                f"{row.predicted_tokens_per_second:,.0f} | {error:+.1%} |"
            )
    return "\n".join(lines)


def memory_table() -> str:
    """Return the rows' peak memory, measured and predicted, as Markdown.

    Runs of the same layout, model and peak are one line.
    """
    lines = ["| run | source | GiB | model says | error |", "|---|---|---|---|---|"]
    seen = set()
    for row in all_rows():
        if row.gib is not None and (key := (row.layout, row.workload.shape, row.gib)) not in seen:
            seen.add(key)
            error = row.predicted_gib / row.gib - 1
            lines.append(f"| {row.what} | {row.source} | {row.gib:.1f} | {row.predicted_gib:.1f} | {error:+.1%} |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Return what `topology: auto` takes for each number of GPUs, as Markdown."""
    lines = [
        "| model | GPUs | layout | s/step | tokens/s/GPU | MFU | exposed communication | bubble |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in scaling_figures()["rows"]:
        if row["layout"] is None:
            lines.append(f"| {row['model']} | {row['gpus']} | none fits | | | | | |")
            continue
        exposed = ", ".join(f"{name} {share:.1%}" for name, share in row["communication"].items() if share >= 0.0005)
        lines.append(
            f"| {row['model']} | {row['gpus']} | {row['layout']} | {row['step_seconds']:.2f} | "
            f"{row['tokens_per_second_per_gpu']:,.0f} | {row['mfu']:.1%} | {exposed or 'none'} | {row['bubble']:.1%} |"
        )
    return "\n".join(lines)


def scaling_figures() -> dict[str, Any]:
    """Return predictions for 8B and 70B on H100s: 1,024 rows of 4,096 tokens a step, fused kernels, bf16."""
    rows = []
    for model in ("8b", "70b"):
        for gpus in GPUS:
            choice = plan_layouts(_scaling_spec(gpus), named_model_shape(model), gpu_kind("h100"), ()).choice
            rows.append({"model": model, "gpus": gpus, **_figures(choice, gpus)})
    return {
        "what": "predictions of the cost model, nothing was run",
        "command": "python -m benchmarks.planning --json FILE",
        "gpu": "h100",
        "seq_length": 4096,
        "rows_a_step": SCALING_ROWS,
        "rows": rows,
    }


def timings() -> str:
    """Return how long a plan of the 70B shape takes, the median of five in processor seconds, as text."""
    lines = []
    for nodes in (2, 128, 1024):
        spec, taken = _scaling_spec(8 * nodes, rows=8 * nodes), []
        for _ in range(5):
            start = time.process_time()
            result = search_layouts(spec, named_model_shape("70b"), gpu_kind("h100"))
            taken.append(time.process_time() - start)
        layouts = len(result.fitting) + len(result.too_large)
        lines.append(f"{nodes} nodes x 8 GPUs: {sorted(taken)[2]:.3f} s for {layouts} valid layouts")
    return "\n".join(lines)


def _figures(choice: Choice | str, gpus: int) -> dict[str, Any]:
    if isinstance(choice, str):
        return {"layout": None}
    best = choice.taken
    shares = dict(best.time.shares())
    return {
        "layout": best.layout.describe(),
        "gib": round(best.memory.total, 2),
        "step_seconds": round(best.time.total, 4),
        "tokens_per_second_per_gpu": round(best.tokens_per_second / gpus, 1),
        "mfu": round(best.mfu, 4),
        "communication": {
            name: round(shares[name], 4) for name in ("tensor_parallel", "data_parallel", "pipeline_sends")
        },
        "bubble": round(shares["pipeline_bubble"], 4),
    }


def _scaling_spec(gpus: int, rows: int = SCALING_ROWS) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=gpus // 8, gpus_per_node=8),
        data=DataSpec(seq_length=4096, packing=True),
        train=TrainSpec(global_batch_size=rows, max_steps=1000),
    )


if __name__ == "__main__":
    main()
