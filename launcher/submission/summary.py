"""What `submit`, `validate` and `--dry-run` print about a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from launcher.contract.config.load import value_at
from launcher.contract.job import JobId
from launcher.contract.rundir import default_run_root
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec
from launcher.contract.steps import warmup_remark
from launcher.contract.topology import describe_batch
from launcher.planning.run_plan import run_cost
from launcher.runs import excluded_nodes
from launcher.scheduler.factory import scheduler_of
from launcher.submission.submission import Submission
from launcher.submission.unused import unused_settings


def outline(submission: Submission) -> str:
    """Return what will run, in numbers."""
    spec, topology = submission.spec, submission.topology
    resources = spec.resources
    device = f"{resources.gpus_per_node} GPUs" if resources.gpus_per_node else "CPU"
    spare = f" and {resources.spare_nodes} spare" if resources.spare_nodes else ""
    chosen = " (topology: auto)" if "plan" in submission.config.sources.values() else ""
    return "\n".join(
        [
            f"run        {spec.name} on cluster {spec.cluster.name} ({spec.cluster.scheduler})",
            f"nodes      {resources.nodes} x {resources.ranks_per_node} ranks ({device}){spare}",
            f"topology   {topology.describe()}{chosen}",
            *_stages(submission),
            f"batch      {describe_batch(spec, topology)}",
            *_predicted(submission),
            *_excluded(submission),
            *_unused(submission),
            *_schedule(submission),
            *(f"hub        {note}" for note in submission.config.notes),
            f"directory  {submission.paths.root}",
        ]
    )


def _stages(submission: Submission) -> list[str]:
    """Return how many layers each pipeline stage has, if there are several."""
    topology = submission.topology
    if topology.pipeline_parallel == 1 or not topology.layers_per_stage:
        return []
    by = "topology.layers_per_stage" if submission.spec.topology.layers_per_stage else "balanced by cost"
    return [f"stages     {topology.describe_stages()} ({by})"]


def summary(submission: Submission) -> str:
    """Return the outline, and where each value that is not a default came from."""
    rows = submission.config.changed()
    return f"{outline(submission)}\nvalues that are not defaults:\n{_table(rows)}"


def changes(parent: RunSpec, submission: Submission) -> str:
    """Return what a child run has that its parent had not."""
    rows = []
    for key in submission.config.sources:
        before, after = _value(parent, key), _value(submission.spec, key)
        if before != after:
            rows.append((key, after, f"before: {_short(before)}"))
    return f"changed:\n{_table(rows)}"


def _value(spec: RunSpec, key: str) -> object:
    try:
        return value_at(spec, key)
    except KeyError:  # a data source that only the other one has
        return None


def _table(values: Iterable[tuple[str, object, str]]) -> str:
    rows = [(key, _short(value), note) for key, value, note in values]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    return "\n".join([f"  {key:<{key_width}}  {value:<{value_width}}  ({source})" for key, value, source in rows])


def _excluded(submission: Submission) -> list[str]:
    cluster = submission.spec.cluster
    if not CAPABILITIES[cluster.scheduler].allocates_nodes:
        return []
    hosts = excluded_nodes.hosts_to_exclude(cluster)
    return [f"excluded   {', '.join(hosts)} (see `launcher nodes --cluster {cluster.name}`)"] if hosts else []


def _unused(submission: Submission) -> list[str]:
    """Return which settings have no effect, each group with its reason."""
    return [f"unused     {', '.join(names)}: {why}" for names, why in unused_settings(submission.spec) if names]


def _schedule(submission: Submission) -> list[str]:
    """Return what is odd about the learning rate's schedule, where the config says how long the run is."""
    train = submission.spec.train
    remark = None if train.max_steps is None else warmup_remark(train.optimizer, train.max_steps)
    return [] if remark is None else [f"schedule   {remark}"]


def _predicted(submission: Submission) -> list[str]:
    best = submission.prediction
    if best is None:
        return []
    speed = f"{best.time.total:.2f} s a step, {best.tokens_per_second:,.0f} tokens/s at most, {best.mfu:.0%} MFU"
    memory = f"{best.memory.total:.1f} of {best.memory.total - best.missing:.1f} GiB a GPU"
    cost = run_cost(submission.spec, best)
    return [f"predicted  {memory}; {speed}", *([f"cost       {cost.describe()}"] if cost else [])]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def run_root_words(root: Path) -> str:
    """Return the option by which a command finds the runs in `root`. It is empty where commands look there anyway."""
    return "" if root == default_run_root().absolute() else f" --run-root {shlex.quote(str(root))}"


def next_steps(submission: Submission, job: JobId) -> str:
    """Return the lines that name the job and the commands to type next."""
    name, where = submission.paths.name, run_root_words(submission.paths.root.parent)
    return (
        f"submitted  {scheduler_of(job.scheduler).noun} {job}, script {submission.paths.script}\n"
        f"next       launcher status {name}{where}\n"
        f"           launcher logs -f {name}{where}"
    )
