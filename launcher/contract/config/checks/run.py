"""All checks of a run, and those of keys at its top."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.config.checks.cluster import environment_problems, runtime_problems, scheduler_problems
from launcher.contract.config.checks.data import batch_problems, order_problems, source_problems, template_problems
from launcher.contract.config.checks.evaluation import evaluation_problems
from launcher.contract.config.checks.train import (
    bad_step_problems,
    fp8_problems,
    graph_problems,
    length_problems,
    lora_problems,
    number_problems,
    optimizer_problems,
    recompute_problems,
)
from launcher.contract.logger_packages import missing_loggers
from launcher.contract.rundir import runs_of_group
from launcher.contract.spec import NotifySpec, RunSpec, read_resolved
from launcher.contract.spec.fields import Problem, path_fields, rule_problems
from launcher.contract.versions import ranks_versions, version_problems

_SHELL_VARIABLE = re.compile(r"/\$(?P<name>[A-Za-z_]\w*)(?=/|$)")
"""A part of a path that a shell would have replaced."""


def spec_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield everything wrong with the values themselves, without a look at any file."""
    yield from rule_problems(spec)
    yield from source_problems(spec)
    yield from length_problems(spec)
    yield from optimizer_problems(spec)
    yield from number_problems(spec)
    yield from bad_step_problems(spec)
    yield from template_problems(spec)
    yield from batch_problems(spec)
    yield from order_problems(spec)
    yield from lora_problems(spec)
    yield from fp8_problems(spec)
    yield from recompute_problems(spec)
    yield from graph_problems(spec)
    yield from environment_problems(spec)
    yield from scheduler_problems(spec)
    yield from runtime_problems(spec)
    yield from evaluation_problems(spec)
    if spec.cluster.runtime.kind == "none" and spec.cluster.runtime.python is None:  # ranks run in this environment
        yield from missing_loggers(spec)
    for problem in version_problems(ranks_versions(spec.cluster.runtime) or {}):
        yield "cluster.runtime", problem
    if spec.notify.on != NotifySpec().on and not spec.notify.any:
        yield "notify.on", f"{spec.notify.on}, and nobody is told; give notify.webhook_env, email or command"
    if spec.logging.prompts and not spec.checkpoint.export:
        yield "logging.prompts", "answers need checkpoint.export: true"


_LONGEST_SHOWN = 200
"""Characters of a path that a message shows."""


def file_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield the files that are named and absent. Paths must be absolute and globs expanded."""
    for field in path_fields(spec):
        variable = _SHELL_VARIABLE.search(field.path)
        if variable is not None:
            name = variable["name"]
            yield field.key, f"{field.path}: ${name} is not expanded in a config; write ${{oc.env:{name}}}"
            continue
        try:
            problem = field.rule.problem(field.path, field.section)
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            problem = f"{field.path[:_LONGEST_SHOWN]} cannot be looked at: {error.strerror}"
        if problem is not None and field.rule.may_come_later and spec.comes_later(field.path):
            problem = _never_written(spec, Path(field.path))
        if problem is not None:
            yield field.key, f"{field.name}: {problem}" if field.name else problem
    if spec.after_directory is not None and not (spec.after_directory / "manifest.json").is_file():
        of_sweep = runs_of_group(Path(spec.run_root), spec.after or "")
        why = f"is a sweep; name one of its runs: {', '.join(of_sweep)}" if of_sweep else ""
        yield "after", f"{spec.after} {why or f'is not a run in {spec.run_root}, nor a directory of one'}"


def _never_written(spec: RunSpec, path: Path) -> str | None:
    """Return why the run before this one will not write `path`, which is missing yet, or None where it may."""
    directory = spec.after_directory
    if directory is None or not (directory / "config.yaml").is_file():
        return None
    part = (*path.relative_to(directory).parts, "")[0]
    if part == "checkpoints" or (part == "export" and read_resolved(directory / "config.yaml").checkpoint.export):
        return None
    because = "its checkpoint.export is false" if part == "export" else "it writes export and checkpoints"
    return f"{path} does not exist, and run {spec.after} will not write it: {because}"
