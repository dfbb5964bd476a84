"""All checks of a run, and those of keys at its top."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.contract.config.checks.cluster import environment_problems, runtime_problems, scheduler_problems
from launcher.contract.config.checks.data import batch_problems, order_problems, source_problems
from launcher.contract.config.checks.evaluation import evaluation_problems
from launcher.contract.config.checks.train import fp8_problems, length_problems, lora_problems, optimizer_problems
from launcher.contract.logger_packages import missing_loggers
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import Problem, path_fields, rule_problems
from launcher.contract.versions import ranks_versions, version_problems


def spec_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield everything wrong with the values themselves, without a look at any file."""
    yield from rule_problems(spec)
    yield from source_problems(spec)
    yield from length_problems(spec)
    yield from optimizer_problems(spec)
    yield from batch_problems(spec)
    yield from order_problems(spec)
    yield from lora_problems(spec)
    yield from fp8_problems(spec)
    yield from environment_problems(spec)
    yield from scheduler_problems(spec)
    yield from runtime_problems(spec)
    yield from evaluation_problems(spec)
    if spec.cluster.runtime.kind == "none" and spec.cluster.runtime.python is None:  # ranks run in this environment
        yield from missing_loggers(spec)
    for problem in version_problems(ranks_versions(spec.cluster.runtime) or {}):
        yield "cluster.runtime", problem
    if spec.logging.prompts and not spec.checkpoint.export:
        yield "logging.prompts", "answers need checkpoint.export: true"


def file_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield the files that are named and absent. Paths must be absolute and globs expanded."""
    for field in path_fields(spec):
        if field.rule.may_come_later and spec.comes_later(field.path):
            continue
        problem = field.rule.problem(field.path, field.section)
        if problem is not None:
            yield field.key, f"{field.name}: {problem}" if field.name else problem
    if spec.after_directory is not None and not (spec.after_directory / "manifest.json").is_file():
        yield "after", f"{spec.after} is not a run in {spec.run_root}, nor a run's directory"
