"""`launcher plan`: the layouts that fit and how fast they are predicted to be."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.cost_model.implementation import CURRENT
from launcher.contract.cost_model.memory import pipeline_memory
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.flops import parameters
from launcher.contract.spec import RunSpec
from launcher.planning.run_plan import nothing_fits, override_words, run_cost
from launcher.planning.search import HEADROOM, SearchResult
from launcher.views.text import columns

_HEAD = "GPUS TP PP VPP DP EPxETP MICRO RECOMPUTE GIB S/STEP TOKENS/S MFU GPU-HOURS COST MOST-OF-THE-REST"
_STAGE_HEAD = "STAGE LAYERS WEIGHTS GRADIENTS OPTIMIZER ACTIVATIONS LOGITS OVERHEAD GIB"
_NAMES = {
    "matmul": "matrix products",
    "elementwise": "elementwise kernels",
    "recompute": "recomputation",
    "tensor_parallel": "tensor parallel collectives",
    "context_parallel": "gathering of keys and values",
    "expert_parallel": "exchange of tokens between experts",
    "pipeline_bubble": "pipeline bubble",
    "pipeline_sends": "pipeline sends",
    "data_parallel": "gradient reduction and weight gathering",
    "optimizer": "optimizer update",
    "overhead": "launch overhead",
}


def text(plans: Sequence[tuple[RunSpec, SearchResult]], top: int) -> str:
    """Return a table of the best layouts for each number of GPUs, then why the best is best and what was left out."""
    rows = [tuple(_HEAD.split())]
    for spec, result in plans:
        rows += [_row(spec, candidate) for candidate in result.fitting[:top]]
    spec, result = plans[0]
    lines = [_question(spec, result), ""]
    if len(rows) > 1:
        lines += [columns(rows), ""]
    if len(plans) == 1:
        return "\n".join([*lines, *_best(spec, result), *_left_out(spec, result)])
    return "\n".join(lines + [f"{spec.resources.world_size} GPUs: {_one_line(spec, result)}" for spec, result in plans])


def _question(spec: RunSpec, result: SearchResult) -> str:
    work, gpu = result.workload, result.gpu
    return (
        f"{parameters(work.shape) / 1e9:.2f}B parameters, {work.rows:,} rows of at most {work.seq_length:,} tokens a "
        f"step, on {gpu.name} ({gpu.memory_gib:.1f} GiB) of cluster {spec.cluster.name}, "
        f"{spec.resources.gpus_per_node} a node"
    )


def _row(spec: RunSpec, candidate: Candidate) -> tuple[str, ...]:
    topology, cost = candidate.layout.topology, run_cost(spec, candidate)
    name, share = _most_of_the_rest(candidate)
    return (
        f"{topology.world_size}",
        f"{topology.tensor_parallel}",
        f"{topology.pipeline_parallel}",
        f"{topology.virtual_pipeline}",
        f"{topology.data_parallel}",
        f"{topology.expert_parallel}x{topology.expert_tensor_parallel}" if candidate.has_experts else "-",
        f"{topology.micro_batch_size}",
        candidate.layout.recompute,
        f"{candidate.memory.total:.1f}",
        f"{candidate.time.total:.2f}",
        f"{candidate.tokens_per_second:,.0f}",
        f"{candidate.mfu:.1%}",
        "-" if cost is None else f"{cost.gpu_hours:,.1f}",
        "-" if cost is None or cost.price is None else f"{cost.price:,.2f}",
        f"{name} {share:.0%}",
    )


def _most_of_the_rest(candidate: Candidate) -> tuple[str, float]:
    """Return name and share of the step's largest part beside matrix products."""
    return next((part for part in candidate.time.shares() if part[0] != "matmul"), ("matmul", 1.0))


def _one_line(spec: RunSpec, result: SearchResult) -> str:
    if not result.fitting:
        return nothing_fits(spec, result)
    best = result.fitting[0]
    return f"{best.layout.describe()}; {_shares(best)}"


def _shares(candidate: Candidate) -> str:
    return ", ".join(
        f"{_NAMES.get(name, name)} {share:.0%}" for name, share in candidate.time.shares() if share >= 0.005
    )


def _best(spec: RunSpec, result: SearchResult) -> list[str]:
    if not result.fitting:
        return [f"nothing fits: {nothing_fits(spec, result)}"]
    best = result.fitting[0]
    lines = [f"best       {best.layout.describe()}", f"time       {_shares(best)}", *_bubble(result, best)]
    rows = [tuple(_STAGE_HEAD.split())]
    stages = pipeline_memory(result.workload, best.layout, CURRENT)
    shown = {stages[0], stages[1], max(stages, key=lambda one: one.total), stages[-1]} if len(stages) > 4 else stages
    for stage in sorted(shown, key=lambda one: one.stage):
        values = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.logits, stage.overhead)
        layers = "+".join(str(len(chunk)) for chunk in best.layout.topology.layers_of(stage.stage))
        rows.append((str(stage.stage), layers, *(f"{value:.1f}" for value in values), f"{stage.total:.1f}"))
    lines += ["", columns(rows), ""]
    lines += _why_best(result)
    cost = run_cost(spec, best)
    lines += [f"run        {cost.describe()}"] if cost else []
    return [*lines, f"use it     {override_words(spec, best)}   (or topology: auto)"]


def _bubble(result: SearchResult, best: Candidate) -> list[str]:
    """Return the layers of each stage, and the part of a step in which the slowest one waits, with its arithmetic."""
    topology, waiting = best.layout.topology, best.time.pipeline_bubble
    stages, virtual = topology.pipeline_parallel, topology.virtual_pipeline
    if stages == 1:
        return []
    chunks = f" / {virtual} chunks" if virtual > 1 else ""
    count = result.workload.micro_batches(topology)
    passes = f"({stages} - 1) stages{chunks} = {(stages - 1) / virtual:.3g}"
    return [
        f"pipeline   {topology.describe_stages()}; bubble: {passes} beside {count} micro-batches, "
        f"{waiting / best.time.total:.0%} of the step"
    ]


def _why_best(result: SearchResult) -> list[str]:
    """Compare the best layout with the fastest one of another tp, and with the fastest one of another pp."""
    best, lines = result.fitting[0], []
    for name, size in (("tp", "tensor_parallel"), ("pp", "pipeline_parallel")):
        mine = getattr(best.layout.topology, size)
        other = next((one for one in result.fitting if getattr(one.layout.topology, size) != mine), None)
        if other is None:
            continue
        ours = dict(best.time.parts())
        slower = sorted(((seconds - ours[part], part) for part, seconds in other.time.parts()), reverse=True)
        more = ", ".join(f"{_NAMES.get(part, part)} +{seconds:.2f} s" for seconds, part in slower[:2] if seconds > 0)
        loss = 1 - other.tokens_per_second / best.tokens_per_second
        lines.append(
            f"why        {name}{getattr(other.layout.topology, size)} at its best ({other.layout.describe()}) is "
            f"{loss:.1%} slower: {more or 'the same time'}"
        )
    return lines


def _left_out(spec: RunSpec, result: SearchResult) -> list[str]:
    lines = []
    if result.too_large and result.fitting:
        speed = max(result.too_large, key=lambda candidate: candidate.tokens_per_second)
        lines.append(
            f"left out   {len(result.too_large)} layouts that keep the rules need more than {HEADROOM:.0%} of the "
            f"memory; the fastest of them, {speed.layout.describe()}, {speed.memory.total:.1f} GiB"
        )
    lines += [f"left out   {sizes}: {rule}" for sizes, rule in result.broken[:4]]
    if len(result.broken) > 4:
        lines.append(f"left out   {len(result.broken) - 4} more that break a rule (--json lists them)")
    return lines
