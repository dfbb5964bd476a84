"""Topologies of a benchmark by name (`dp`, `tp2+sp`, `tp2+pp2`), and the speed that the planner expects of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from launcher.contract.cost_model.assumptions import implementation_of, layout_of, workload_of
from launcher.contract.cost_model.predict import evaluate
from launcher.contract.errors import TopologyError
from launcher.contract.hardware import match_gpu
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec, TopologySpec
from launcher.contract.topology import Topology

_PART = re.compile(r"(dp|tp|pp|vp|cp|ep|etp)(\d*)")
_KEYS = {
    "tp": "tensor_parallel",
    "pp": "pipeline_parallel",
    "vp": "virtual_pipeline",
    "cp": "context_parallel",
    "ep": "expert_parallel",
    "etp": "expert_tensor_parallel",
}
_FILL = 4
"""Micro-batches for each pipeline stage, so that the bubble is a fifth of a step at most."""


def parse_topology(name: str) -> TopologySpec:
    """Return the topology that a name like `tp2+sp` means. Data parallelism takes the ranks that are left.

    Raise TopologyError for another name.
    """
    values: dict[str, Any] = {}
    for part in name.split("+"):
        match = _PART.fullmatch(part)
        if part == "sp":
            values["sequence_parallel"] = True
        elif match is None:
            raise TopologyError(
                [f"--topology {name}: {part!r} is not one of dp, tpN, ppN, vpN, cpN, epN, etpN, sp; give e.g. tp2+sp"]
            )
        elif match[1] != "dp":
            values[_KEYS[match[1]]] = int(match[2] or 1)
    return TopologySpec(**values)


def replica_size(topology: TopologySpec) -> int:
    """Return the number of ranks that hold one model together."""
    return topology.tensor_parallel * topology.pipeline_parallel * topology.context_parallel


def micro_batch_rows(topology: TopologySpec, rows: int, micro_batches: int) -> int:
    """Return the rows of a micro-batch if each GPU has `rows` in a step, cut into `micro_batches`.

    With pipeline parallelism there are more micro-batches, as many as fill the pipeline.
    """
    own = rows * replica_size(topology)
    wanted = micro_batches * (_FILL * topology.pipeline_parallel if topology.pipeline_parallel > 1 else 1)
    # The largest divisor of the rows that gives as many micro-batches as are wanted.
    return max(size for size in range(1, own + 1) if own % size == 0 and own // size >= min(wanted, own))


def expected_tokens_per_second(
    spec: RunSpec, topology: Topology, shape: ModelShape, *, attended: float, fill: float, trained: float
) -> float | None:
    """Return the tokens per second and GPU, without padding, that the planner predicts, or None for another GPU.

    `attended` is the mean length that a token's attention sees, `fill` the share of tokens that are not padding, and
    `trained` that of those which are targets.
    """
    gpu = match_gpu(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is None:
        return None
    workload = replace(workload_of(spec, shape), attended=attended, fill=fill, trained=trained)
    layout = layout_of(spec, topology, spec.train.recompute)
    found = evaluate(workload, layout, gpu, implementation_of(spec, shape, gpu))
    return round(found.tokens_per_second / topology.world_size, 1)
