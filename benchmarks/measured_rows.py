"""Measured and published runs as cases of the cost model.

What `sft bench` measured of this project is read from `results/`; planning_rows.yaml spells out the runs of others and
those that have no file there, and says which files are of code that is no more.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from launcher.contract.cost_model.implementation import (
    CURRENT,
    CURRENT_WITH_FLASH2,
    FUSED,
    PLAIN,
    TRANSFORMER_ENGINE,
    Implementation,
)
from launcher.contract.cost_model.memory import largest_stage
from launcher.contract.cost_model.step_time import step_time
from launcher.contract.cost_model.workload import Layout, Workload
from launcher.contract.hardware import GpuKind, gpu_kind, match_gpu
from launcher.contract.model_shape import ModelShape, named_model_config
from launcher.contract.spec import Fp8Spec, LoraSpec
from launcher.contract.stages import even_split
from launcher.contract.topology import Topology
from sft.bench.workload import TRAINED_SHARE
from sft.bench.workload import Workload as BenchWorkload

RESULTS = Path(__file__).with_name("results")
ROWS = yaml.safe_load(Path(__file__).with_name("planning_rows.yaml").read_text(encoding="utf-8"))
IMPLEMENTATIONS = {item.name: item for item in (PLAIN, FUSED, TRANSFORMER_ENGINE, CURRENT, CURRENT_WITH_FLASH2)}
_SIZES = re.compile(r"(tp|pp|cp)(\d+)|(expert parallel) (\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run, and what the cost model is asked about it."""

    what: str
    source: str
    """Who measured it, on what."""
    use: str
    """Which constant it fixed, or `predicted`."""
    workload: Workload
    layout: Layout
    gpu: GpuKind
    implementation: Implementation
    tokens_per_second: float | None
    """Measured, of one GPU, without padding."""
    gib: float | None
    """Measured peak of torch's allocator."""

    @property
    def predicted_tokens_per_second(self) -> float:
        """What the model says of the same."""
        seconds = step_time(self.workload, self.layout, self.gpu, self.implementation).total
        return self.workload.tokens / seconds / self.layout.topology.world_size

    @property
    def predicted_gib(self) -> float:
        """What the model says of the same."""
        return largest_stage(self.workload, self.layout, self.implementation).allocated


def all_rows() -> list[Row]:
    """Return this project's own measurements, then those of others."""
    return [_row(listing) for listing in (*_own(), *ROWS["rows"])]


def measured_files() -> list[str]:
    """Return the files with measurements of this project."""
    return sorted({path.name for path, _ in _results()})


def _results() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(RESULTS.glob("*.json")):
        file = json.loads(path.read_text(encoding="utf-8"))
        for result in file.get("results", ()):
            if result["contender"] == "ours":
                yield path, {**result, "hardware": file["hardware"]}


def _own() -> Iterator[dict[str, Any]]:
    """Yield the measurements whose code is still the one that runs, as planning_rows.yaml would spell them out."""
    for path, result in _results():
        if path.name not in ROWS["older"]:
            yield _listing(path.stem, result)


def _listing(name: str, result: dict[str, Any]) -> dict[str, Any]:
    settings, workload = result["settings"], result["workload"]
    known = {field.name for field in dataclasses.fields(BenchWorkload)}
    bench = BenchWorkload(**{key: value for key, value in workload.items() if key in known})
    gpu = match_gpu(result["hardware"])
    assert gpu is not None
    kernels, precision = settings["kernels"], settings.get("precision", "bf16")
    sizes = [(a or c, int(b or d)) for a, b, c, d in _SIZES.findall(settings.get("layout", ""))]
    gpus = result.get("gpus") or 1
    layers = "" if bench.layers is None else f" with {bench.layers} layers"
    words = [settings.get("layout", "dp1").partition(" = ")[0] + (" + expert parallel" * ("expert" in str(sizes)))]
    words += [f"{bench.rows} rows of {bench.seq_length:,} a GPU", f"micro-batch {settings['micro_batch_size']}"]
    words += [f"{settings['recompute']} recomputed"] * (settings["recompute"] != "none")
    words += [precision] * (precision != "bf16") + ["experts in fp8"] * (settings.get("experts") == "fp8")
    words += ["plain kernels"] * ("plain" in kernels)
    words += [f"LoRA of rank {bench.lora_rank}"] * (bench.lora_rank is not None) + ["flash2"] * ("flash2" in kernels)
    words += ["CUDA graphs"] * ("graphs" in kernels)
    implementation = PLAIN if "plain" in kernels else CURRENT_WITH_FLASH2 if "flash2" in kernels else CURRENT
    return {
        "what": f"{bench.shape}{layers} {bench.data}, {', '.join(words)}",
        "source": name,
        "use": ROWS["calibrated"].get(f"{name} {precision} {settings['recompute']}", "predicted"),
        "model": bench.shape,
        "layers": bench.layers,
        "gpu": gpu.name,
        "implementation": implementation.name,
        "graphs": "graphs" in kernels,
        "gpus": gpus,
        **{{"expert parallel": "ep"}.get(size, size): count for size, count in sizes},
        "micro_batch": settings["micro_batch_size"],
        "rows": bench.rows * gpus,
        "seq_length": bench.seq_length,
        "attended": _attended(bench),
        "fill": result["real_tokens_per_second"] / result["slots_per_second"],
        "trained": TRAINED_SHARE if bench.data == "ragged" else 1.0,
        "precision": precision,
        "fp8_experts": settings.get("experts") == "fp8",
        "recompute": settings["recompute"],
        "recompute_layers": settings.get("recompute_layers"),
        "lora_rank": bench.lora_rank,
        "tokens_per_second": result["real_tokens_per_second"],
        # What a graph keeps between its kernels is no allocation of torch's.
        "gib": None if "graphs" in kernels else result["peak_memory_gib"],
    }


@lru_cache
def _attended(bench: BenchWorkload) -> float:
    """Return the mean over tokens of the length of their example."""
    inputs = bench.lengths(steps=50) - 1
    return float(np.square(inputs).sum() / inputs.sum())


def _row(listing: dict[str, Any]) -> Row:
    shape = _shape(listing)
    length = listing.get("seq_length", 4096)
    workload = Workload(
        shape=shape,
        seq_length=length,
        rows=listing["rows"],
        attended=listing.get("attended", length),
        fill=listing.get("fill", 1.0),
        trained=listing.get("trained", 1.0),
        precision=listing.get("precision", "bf16"),
        fp8=Fp8Spec(experts=listing.get("fp8_experts", False)),
        lora=LoraSpec(rank=listing.get("lora_rank")),
    )
    return Row(
        what=listing["what"],
        source=listing["source"],
        use=listing["use"],
        workload=workload,
        layout=Layout(
            topology=_topology(listing, shape),
            recompute=listing.get("recompute", "none"),
            recompute_layers=listing.get("recompute_layers"),
        ),
        gpu=gpu_kind(listing["gpu"]),
        implementation=dataclasses.replace(
            IMPLEMENTATIONS[listing["implementation"]], graphs="always" if listing.get("graphs") else "never"
        ),
        tokens_per_second=listing.get("tokens_per_second"),
        gib=listing.get("gib"),
    )


def _shape(listing: dict[str, Any]) -> ModelShape:
    changes = {"num_hidden_layers": listing.get("layers"), "vocab_size": listing.get("vocab")}
    config = named_model_config(listing["model"]) | {key: value for key, value in changes.items() if value is not None}
    return ModelShape.from_config(config, listing["model"])


def _topology(listing: dict[str, Any], shape: ModelShape) -> Topology:
    """Return the topology of a row. Its stages have equally many layers: they were not balanced yet."""
    gpus, tensor, pipeline, virtual, context, experts = (
        listing.get(name, 1) for name in ("gpus", "tp", "pp", "vpp", "cp", "ep")
    )
    return Topology(
        world_size=gpus,
        ranks_per_node=min(gpus, 8),
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        virtual_pipeline=virtual,
        context_parallel=context,
        expert_parallel=experts,
        expert_tensor_parallel=tensor,
        data_parallel=gpus // (tensor * pipeline * context),
        sequence_parallel=tensor > 1,
        micro_batch_size=listing.get("micro_batch", 1),
        global_batch_size=listing["rows"],
        layers_per_stage=even_split(shape.num_layers, pipeline * virtual),
    )
