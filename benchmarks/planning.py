"""The cost model against measured and published rows, scaling on paper, and how long planning takes.

    python benchmarks/planning.py                    # the tables of docs/explanation/planning.md
    python benchmarks/planning.py --json FILE        # the scaling table's figures
    python benchmarks/planning.py --time             # how long plans take

Needs no GPU. A row that misses says so: nothing is left out but what planning_rows.yaml names with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import yaml

from launcher.contract.cost_model.implementation import CURRENT, FUSED, PLAIN, TRANSFORMER_ENGINE
from launcher.contract.cost_model.memory import largest_stage
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.cost_model.step_time import step_time
from launcher.contract.cost_model.workload import Layout, Workload
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, LoraSpec, ResourcesSpec, RunSpec, TrainSpec
from launcher.contract.stages import even_split
from launcher.contract.topology import Topology
from launcher.planning.search import search_layouts

ROWS = yaml.safe_load(Path(__file__).with_name("planning_rows.yaml").read_text(encoding="utf-8"))
IMPLEMENTATIONS = {item.name: item for item in (PLAIN, FUSED, TRANSFORMER_ENGINE, CURRENT)}
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
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


def speed_errors() -> list[tuple[dict[str, Any], float]]:
    """Row and predicted tokens/s/GPU."""
    return [(row, _tokens_per_second(row)) for row in ROWS["speed"]]


def memory_errors() -> list[tuple[dict[str, Any], float]]:
    """Row and predicted GiB of the allocator's peak."""
    return [(row, _allocated(row)) for row in ROWS["memory"]]


def speed_table() -> str:
    """Markdown."""
    lines = ["| row | source | use | tokens/s/GPU | model says | error |", "|---|---|---|---|---|---|"]
    for row, predicted in speed_errors():
        actual = row["tokens_per_second"]
        lines.append(
            f"| {row['what']} | {row['source']} | {row['use']} | {actual:,} | {predicted:,.0f} | "
            f"{predicted / actual - 1:+.1%} |"
        )
    return "\n".join(lines)


def memory_table() -> str:
    """Markdown."""
    lines = ["| row | measured on | use | GiB | model says | error |", "|---|---|---|---|---|---|"]
    for row, predicted in memory_errors():
        error = predicted / row["gib"] - 1
        lines.append(
            f"| {row['what']} | {row['source']} | {row['use']} | {row['gib']} | {predicted:.1f} | {error:+.1%} |"
        )
    return "\n".join(lines)


def scaling_table() -> str:
    """Markdown: the fastest layout of each number of GPUs."""
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
    """8B and 70B on H100s, 1,024 rows of 4,096 tokens a step, fused kernels in bf16: predictions only."""
    rows = []
    for model in ("8b", "70b"):
        for gpus in GPUS:
            found = search_layouts(_scaling_spec(gpus), named_model_shape(model), gpu_kind("h100")).fitting
            rows.append({"model": model, "gpus": gpus, **_figures(found[0] if found else None, gpus)})
    return {
        "what": "predictions of the cost model, nothing was run",
        "command": "python benchmarks/planning.py --json FILE",
        "gpu": "h100",
        "seq_length": 4096,
        "rows_a_step": SCALING_ROWS,
        "rows": rows,
    }


def timings() -> str:
    """Median of five plans, 70B shape."""
    lines = []
    for nodes in (2, 128, 1024):
        spec, taken = _scaling_spec(8 * nodes, rows=8 * nodes), []
        for _ in range(5):
            start = time.perf_counter()
            result = search_layouts(spec, named_model_shape("70b"), gpu_kind("h100"))
            taken.append(time.perf_counter() - start)
        layouts = len(result.fitting) + len(result.too_large)
        lines.append(f"{nodes} nodes x 8 GPUs: {sorted(taken)[2]:.3f} s for {layouts} valid layouts")
    return "\n".join(lines)


def _figures(best: Candidate | None, gpus: int) -> dict[str, Any]:
    if best is None:
        return {"layout": None}
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
        data=DataSpec(seq_length=4096),
        train=TrainSpec(global_batch_size=rows, max_steps=1000),
    )


def _tokens_per_second(row: dict[str, Any]) -> float:
    workload, layout = _case(row)
    implementation = IMPLEMENTATIONS[row["implementation"]]
    seconds = step_time(workload, layout, gpu_kind(row["gpu"]), implementation).total
    return workload.tokens / seconds / layout.topology.world_size


def _allocated(row: dict[str, Any]) -> float:
    workload, layout = _case({"model": "1b", "rows": row["micro_batch"], **row})
    return largest_stage(workload, layout, IMPLEMENTATIONS[row["implementation"]]).allocated


def _case(row: dict[str, Any]) -> tuple[Workload, Layout]:
    shape = named_model_shape(row["model"])
    shape = dataclasses.replace(shape, vocab_size=row.get("vocab", shape.vocab_size))
    gpus, tensor, pipeline, context = (row.get(name, 1) for name in ("gpus", "tp", "pp", "cp"))
    length = row.get("seq_length", 4096)
    topology = Topology(
        world_size=gpus,
        ranks_per_node=min(gpus, 8),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        virtual_pipeline=row.get("vpp", 1),
        context_parallel=context,
        expert_parallel=1,
        expert_tensor_parallel=tensor,
        data_parallel=gpus // (tensor * pipeline * context),
        sequence_parallel=tensor > 1,
        micro_batch_size=row.get("micro_batch", 1),
        global_batch_size=row["rows"],
        layers_per_stage=even_split(shape.num_layers, pipeline * row.get("vpp", 1)),
    )
    workload = Workload(
        shape=shape,
        seq_length=length,
        rows=row["rows"],
        attended=row.get("attended", length),
        precision=row.get("precision", "bf16"),
        lora=LoraSpec(rank=row.get("lora_rank")),
    )
    return workload, Layout(topology=topology, recompute=row.get("recompute", "none"))


if __name__ == "__main__":
    main()
