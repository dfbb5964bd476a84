"""Layouts of a benchmark by name (`dp`, `tp2+sp`, `tp2+pp2`), and what the planner expects of them."""

from __future__ import annotations

import re
from typing import Any

import torch

from launcher.contract.cost_model.implementation import CURRENT
from launcher.contract.cost_model.predict import evaluate
from launcher.contract.cost_model.workload import Layout, Workload
from launcher.contract.errors import TopologyError
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec, TopologySpec
from launcher.contract.topology import Topology

_PART = re.compile(r"(dp|tp|pp|vp|cp)(\d*)")
_KEYS = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "vp": "virtual_pipeline", "cp": "context_parallel"}
_FILL = 4
"""Micro-batches a pipeline stage: the bubble is then a fifth at most."""


def parse_layout(name: str) -> TopologySpec:
    """`tp2+sp` and the like; data parallel takes the ranks that are left. Raises TopologyError on other words."""
    sizes: dict[str, Any] = {}
    for part in name.split("+"):
        found = _PART.fullmatch(part)
        if part == "sp":
            sizes["sequence_parallel"] = True
        elif found is None:
            raise TopologyError([f"--topology {name}: {part!r} is none of dp, tpN, ppN, vpN, cpN, sp; e.g. tp2+sp"])
        elif found[1] != "dp":
            sizes[_KEYS[found[1]]] = int(found[2] or 1)
    return TopologySpec(**sizes)


def replica_size(layout: TopologySpec) -> int:
    """Ranks that hold one model together."""
    return layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel


def micro_batch_rows(layout: TopologySpec, rows: int, micro_batches: int) -> int:
    """Rows of a micro-batch where each GPU has `rows` in a step, in `micro_batches`, or more to fill a pipeline."""
    own = rows * replica_size(layout)
    wanted = micro_batches * (_FILL * layout.pipeline_parallel if layout.pipeline_parallel > 1 else 1)
    return max(size for size in range(1, own + 1) if own % size == 0 and own // size >= min(wanted, own))


def expected_tokens_per_second(
    spec: RunSpec, topology: Topology, shape: ModelShape, attended: float, fill: float
) -> float | None:
    """Real tokens a second and GPU by the planner's cost model; None on a GPU that it does not know."""
    gpu = match_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is None:
        return None
    rows = spec.train.global_batch_size // spec.data.seq_length
    workload = Workload(
        shape=shape, seq_length=spec.data.seq_length, rows=rows, attended=attended, fill=fill,
        precision=spec.train.precision,
    )  # fmt: skip
    layout = Layout(topology=topology, recompute=spec.train.recompute)
    return round(evaluate(workload, layout, gpu, CURRENT).tokens_per_second / topology.world_size, 1)
