"""`launcher plan`: the layouts that fit and how fast they are predicted to be."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.cost_model.memory import pipeline_memory
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.flops import parameters
from launcher.contract.spec import RunSpec
from launcher.planning.choice import Plan
from launcher.planning.run_plan import broken_rules, counted_gpus, override_words, run_cost
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


def text(plans: Sequence[Plan], top: int) -> str:
    """Return a table of the best layouts for each number of GPUs, what `auto` takes, why, and what was left out."""
    rows = [tuple(_HEAD.split())]
    for plan in plans:
        rows += [_row(plan.spec, candidate) for candidate in plan.result.fitting[:top]]
    lines = [_question(plans[0].spec, plans[0].result), ""]
    if len(rows) > 1:
        lines += [columns(rows), ""]
    if len(plans) == 1:
        return "\n".join([*lines, *_best(plans[0]), *_left_out(plans[0].result)])
    return "\n".join(lines + [f"{counted_gpus(plan.spec)}: {_one_line(plan)}" for plan in plans])


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
        candidate.layout.recompute_words,
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


def _one_line(plan: Plan) -> str:
    if isinstance(plan.choice, str):
        return plan.choice
    return f"auto takes {plan.choice.taken.layout.describe()}: {plan.choice.why}"


def _shares(candidate: Candidate) -> str:
    return ", ".join(
        f"{_NAMES.get(name, name)} {share:.0%}" for name, share in candidate.time.shares() if share >= 0.005
    )


def _best(plan: Plan) -> list[str]:
    """Return what `auto` takes, beside the fastest by prediction, with its time, its memory and how to set it."""
    choice, result = plan.choice, plan.result
    if isinstance(choice, str):
        return [f"{'auto       ' if result.fitting else 'nothing fits: '}{choice}"]
    best, fastest = choice.taken, result.fitting[0]
    other = (
        "" if fastest.layout == choice.fastest.layout else f"; the config sets {' and '.join(choice.kept)} otherwise"
    )
    lines = [
        f"fastest    {fastest.layout.describe()}, by prediction{other}",
        f"best       {best.layout.describe()}: what topology: auto takes, {choice.why}",
        *_own(plan, fastest),
        f"time       {_shares(best)}",
        *_bubble(result, best),
        "",
        columns(_stages(result, best)),
        "",
        *_why_not_others(result, best),
    ]
    cost = run_cost(plan.spec, best)
    lines += [f"run        {cost.describe()}"] if cost else []
    return [*lines, f"use it     {override_words(plan.spec, best)}   (or topology: auto)"]


def _own(plan: Plan, fastest: Candidate) -> list[str]:
    """Return what is predicted of the config's own sizes, if it has any in place of `auto`."""
    own = plan.own
    if own is None:
        return []
    if isinstance(own, str):
        return [f"config     cannot run as it is: {own}"]
    loss = 1 - own.tokens_per_second / fastest.tokens_per_second
    fits = f"{own.memory.total:.1f} GiB" + (f", {own.missing:.1f} too much" if own.missing > 0 else "")
    return [f"config     {own.layout.describe()}: {abs(loss):.1%} {'slower' if loss >= 0 else 'faster'}, {fits}"]


def _stages(result: SearchResult, best: Candidate) -> list[tuple[str, ...]]:
    """Return the memory of the first stages, the fullest and the last one, as rows of a table."""
    rows = [tuple(_STAGE_HEAD.split())]
    stages = pipeline_memory(result.workload, best.layout, result.implementation)
    shown = {stages[0], stages[1], max(stages, key=lambda one: one.total), stages[-1]} if len(stages) > 4 else stages
    for stage in sorted(shown, key=lambda one: one.stage):
        values = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.logits, stage.overhead)
        layers = "+".join(str(len(chunk)) for chunk in best.layout.topology.layers_of(stage.stage))
        rows.append((str(stage.stage), layers, *(f"{value:.1f}" for value in values), f"{stage.total:.1f}"))
    return rows


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


def _why_not_others(result: SearchResult, best: Candidate) -> list[str]:
    """Compare a layout with the fastest one of another tp, and with the fastest one of another pp."""
    lines = []
    for name, size in (("tp", "tensor_parallel"), ("pp", "pipeline_parallel")):
        mine = getattr(best.layout.topology, size)
        other = next((one for one in result.fitting if getattr(one.layout.topology, size) != mine), None)
        if other is None:
            continue
        ours = dict(best.time.parts())
        slower = sorted(((seconds - ours[part], part) for part, seconds in other.time.parts()), reverse=True)
        more = ", ".join(
            f"{_NAMES.get(part, part)} +{seconds:.2f} s" for seconds, part in slower[:2] if seconds >= 0.005
        )
        loss = 1 - other.tokens_per_second / best.tokens_per_second
        lines.append(
            f"why        {name}{getattr(other.layout.topology, size)} at its best ({other.layout.describe()}) is "
            f"{abs(loss):.1%} {'slower' if loss >= 0 else 'faster'}: {more or 'no part takes longer'}"
        )
    return lines


def _left_out(result: SearchResult) -> list[str]:
    lines = []
    if result.too_large and result.fitting:
        speed = max(result.too_large, key=lambda candidate: candidate.tokens_per_second)
        lines.append(
            f"left out   {len(result.too_large)} layouts that keep the rules need more than {HEADROOM:.0%} of the "
            f"memory; the fastest of them, {speed.layout.describe()}, {speed.memory.total:.1f} GiB"
        )
    if not (result.fitting or result.too_large):
        return lines  # said already
    rules = broken_rules(result)
    lines += [f"left out   {rule}" for rule in rules[:4]]
    if len(rules) > 4:
        lines.append(f"left out   more by {len(rules) - 4} other rules (--json lists them)")
    return lines
