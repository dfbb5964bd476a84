"""`python -m sft bench`: measure how fast training is on this machine's GPUs, and how fast other trainers are.

All contenders run the same model shape, data and number of rows, one after the other on the same GPUs, each in its own
processes. Options with several values are combined. Results are printed as a table while they come, and written as JSON
with hardware, versions and the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.local_ranks import run_ranks
from launcher.contract.model_shape import named_model_shape
from launcher.contract.rundir import write_json
from sft.bench.environment import contender_variables
from sft.bench.result import Result
from sft.bench.topology import parse_topology

_PACKAGES = (
    "torch",
    "triton",
    "megatron-core",
    "pytorch-lightning",
    "transformers",
    "trl",
    "liger-kernel",
    "nemo-automodel",
    "torchtitan",
    "unsloth",
    "unsloth-zoo",
    "peft",
    "accelerate",
    "flash-attn-4",
)
_ON_SEVERAL = ("torchtitan", "trl")
"""Other trainers that run on several GPUs here: torchtitan under FSDP2, TRL as `--vs-parallel` says."""
_HEAD = f"{'contender':<50}{'step ms':>9}{'real tok/s':>12}{'slots/s':>10}{'TFLOP/s':>9}{'MFU':>7}{'GiB':>7}{'loss':>8}"


def bench(options: argparse.Namespace) -> ExitCode:
    """Run all combinations of the options, and return FAILURE if a contender failed."""
    # Names that are not known are errors before anything runs.
    for shape in options.shape:
        named_model_shape(shape)
    for topology in options.topology:
        parse_topology(topology)
    _check_options(options)
    results, failed = [], False
    for shape, data, length, rows in itertools.product(options.shape, options.data, options.seq_length, options.rows):
        workload = {"shape": shape, "data": data, "seq_length": length, "rows": rows}
        workload |= {"layers": options.layers, "router_std": options.router_std, "lora_rank": options.lora_rank}
        print(f"{shape}, {data} rows of {length:,}, {rows} a step and GPU; rates a GPU\n{_HEAD}", flush=True)
        first: Result | None = None
        for gpus, (contender, settings) in _runs(options):
            result = _run(contender, workload, settings, gpus)
            if result is None:
                failed = True
                continue
            results.append({"workload": workload, "gpus": gpus, **dataclasses.asdict(result)})
            first = first or result
            print(_line(result, gpus, first), flush=True)
            if options.output:
                write_json(options.output, {**_circumstances(), "results": results})
    return ExitCode.FAILURE if failed else ExitCode.OK


def _check_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for options without effect and trainers that would run nowhere.

    Of trainers that run on some of the numbers of GPUs, print where they do not.
    """
    if options.fp8_experts and "fp8" not in options.precision:
        raise ConfigError("--fp8-experts needs --precision fp8")
    if options.recompute_layers is not None and "full" not in options.recompute:
        raise ConfigError("--recompute-layers needs --recompute full")
    several = [str(gpus) for gpus in options.gpus if gpus > 1]
    alone = [name for name in options.vs if name not in _ON_SEVERAL]
    if not several or not alone:
        return
    what = f"{', '.join(alone)}: run on one GPU only"
    if 1 not in options.gpus:
        raise ConfigError(f"--vs {what}, and --gpus is {' '.join(several)}; add 1 to it, or drop them")
    print(f"{what}, left out of --gpus {' '.join(several)}", file=sys.stderr)


def _runs(options: argparse.Namespace) -> Iterator[tuple[int, tuple[str, dict[str, object]]]]:
    """Yield the number of GPUs, the contender and its settings of each run."""
    for gpus in options.gpus:
        topologies = options.topology if gpus > 1 else ["dp"]
        for contender, settings in _contenders(options):
            if contender == "ours":
                yield from ((gpus, (contender, {**settings, "topology": name})) for name in topologies)
            elif gpus == 1 or contender == "torchtitan":
                yield gpus, (contender, settings)
            elif contender in _ON_SEVERAL:
                yield from ((gpus, (contender, {**settings, "parallel": way})) for way in options.vs_parallel)


def _contenders(options: argparse.Namespace) -> list[tuple[str, dict[str, object]]]:
    clock = {"warmup": options.warmup, "steps": options.steps}
    keys = ("kernels", "attention", "precision", "recompute", "cuda_graphs")
    values_of = itertools.product(*(vars(options)[key] for key in keys))
    chosen = [dict(zip(keys, values, strict=True)) for values in values_of]
    for train in chosen:
        if train["recompute"] == "full":
            train["recompute_layers"] = options.recompute_layers
        if train["precision"] == "fp8" and options.fp8_experts:
            train["fp8"] = {"experts": True}
    own: list[tuple[str, dict[str, object]]] = [
        ("ours", {"train": train, "micro_batches": options.micro_batches, **clock}) for train in chosen
    ]
    cut = options.vs_micro_batches or options.micro_batches
    others: list[tuple[str, dict[str, object]]] = [
        (name, {"weights": weights, "attention": attention, "micro_batches": cut, **choice, **clock})
        for name, weights, attention in itertools.product(options.vs, options.vs_weights, options.vs_attention)
        for choice in _choices_of(name, options)
    ]
    return own + others


def _choices_of(contender: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Return what one contender alone has a choice of: launches, and experts where the model has some."""
    if contender == "torchtitan":
        return [{"graphs": graphs} for graphs in options.vs_cuda_graphs]
    if contender != "transformers" or not any(named_model_shape(shape).num_experts for shape in options.shape):
        return [{}]
    return [{"experts": experts} for experts in options.vs_experts]


def _run(contender: str, workload: Mapping[str, object], settings: Mapping[str, object], gpus: int) -> Result | None:
    """Run one contender and return its result, or print the end of its log and return None if it failed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request_file, result_file = folder / "request.json", folder / "result.json"
        write_json(request_file, {"contender": contender, "workload": workload, "settings": settings})
        command = [sys.executable, "-m", "sft.bench.contender", str(request_file), str(result_file)]
        variables = contender_variables(gpus, str(settings.get("topology", "dp")), os.environ)
        code = run_ranks(command, gpus, folder / "logs", variables=variables)
        if code == 0 and result_file.exists():
            return Result(**json.loads(result_file.read_text(encoding="utf-8")))
        log = (folder / "logs" / "rank-0.log").read_text(encoding="utf-8", errors="replace")
        print(f"{contender} failed with exit code {code}:\n" + "\n".join(log.splitlines()[-15:]), flush=True)
        return None


def _line(result: Result, gpus: int, first: Result) -> str:
    """Return the lines of the table for a result, compared with the first one."""
    how = ("layout", "parallel", "attention", "precision", "recompute", "recompute_layers")
    values = [result.settings.get(key) for key in (*how, "weights", "experts", "lora", "launches")]
    name = " ".join([result.contender, *(str(value) for value in values if value not in (None, "none"))])
    mfu = "-" if result.mfu is None else f"{result.mfu:.1%}"
    line = (
        f"{gpus} x {name:<46.46}{result.step_ms:>9.1f}{result.real_tokens_per_second:>12,.0f}"
        f"{result.slots_per_second:>10,.0f}{result.tflops:>9.1f}{mfu:>7}{result.peak_memory_gib:>7.1f}{result.loss:>8.3f}"
    )
    if result.expected_tokens_per_second:
        line += f"  planned {result.expected_tokens_per_second:,.0f}"
    if result is not first:
        line += f"  ours is {first.real_tokens_per_second / result.real_tokens_per_second:.2f} times as fast"
    for label, times in (("phases", result.phases_ms), ("breakdown", result.breakdown_ms)):
        parts = ", ".join(f"{kind} {time:.1f}" for kind, time in times.items())
        line += f"\n  {label}, ms: {parts}" if parts else ""
    return line


def _circumstances() -> dict[str, object]:
    import torch

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "command": " ".join(["python -m sft", *sys.argv[1:]]),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "cuda": torch.version.cuda,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
