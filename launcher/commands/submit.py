"""submit, render, validate: from a config to a job, or to what would become one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    command,
    config_argument,
    json_option,
    override_arguments,
    print_json,
    run_root_option,
)
from launcher.commands.logs import follow_run
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.api.checked import CheckedRun, CheckedSweep
    from launcher.sweeps.groups import Group


def add(commands: Subcommands) -> None:
    """Declare the commands."""
    submit = command(commands, "submit", _submit, "check a config, create its run directory and submit it")
    render = command(commands, "render", _render, "print the batch script; submits nothing, writes nothing")
    validate = command(commands, "validate", _validate, "check a config and print what would run")
    for parser in (submit, render, validate):
        config_argument(parser)
        override_arguments(parser)
    json_option(submit)
    json_option(validate)
    submit.add_argument("--dry-run", action="store_true", help="print summary and script, write nothing")
    submit.add_argument("--test-only", action="store_true", help="ask Slurm when and where it would start, no more")
    run_root_option(render)
    render.add_argument(
        "--diff",
        nargs="?",
        const="",
        metavar="RUN",
        help="what would change: against the script of RUN, or with --cluster against the config's own cluster",
    )
    submit.add_argument("--yes", action="store_true", help="do not ask before a run above resources.gpu_hour_limit")
    submit.add_argument(
        "--first-of",
        metavar="A,B,...",
        help="submit to each of these clusters or partitions; the first job to start has the run, the others end",
    )
    submit.add_argument("--follow", action="store_true", help="show the logs until the run has ended")


def _submit(options: argparse.Namespace) -> int:
    from launcher.api.checked import CheckedSweep

    _check_options(options)
    checked = _checked(options)
    return _submit_sweep(options, checked) if isinstance(checked, CheckedSweep) else _submit_run(options, checked)


def _check_options(options: argparse.Namespace) -> None:
    """Raise ConfigError for options of which one would be ignored."""
    from launcher.contract.errors import ConfigError

    kinds = {"--dry-run": options.dry_run, "--test-only": options.test_only, "--follow": options.follow}
    given = [word for word, on in kinds.items() if on]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} exclude each other; leave one out")
    if options.json and given:
        more = "; `launcher validate --json` checks and submits nothing" if options.dry_run else ""
        raise ConfigError(f"{given[0]} prints text, and no JSON; leave one of {given[0]} and --json out{more}")


def _checked(options: argparse.Namespace) -> CheckedRun | CheckedSweep:
    """Return the config with every check behind it."""
    from launcher.api.checked import CheckedRun, validate

    words = getattr(options, "first_of", None)
    first_of = words.split(",") if words else ()
    checked = validate(options.config, options.overrides, cluster=options.cluster, first_of=first_of)
    if isinstance(checked, CheckedRun) and checked.note:
        print(checked.note, file=sys.stderr)
    return checked


def _submit_sweep(options: argparse.Namespace, checked: CheckedSweep) -> int:
    from launcher.api.jobs import submit
    from launcher.contract.errors import ConfigError
    from launcher.submission.summary import run_root_words, summary

    if options.follow or options.test_only:
        raise ConfigError("--follow and --test-only are for single runs, and the config has a sweep section")
    group = checked.group
    if options.dry_run:
        print(f"{summary(checked.submissions[0])}\n{_points(group)}")
        return int(ExitCode.OK)
    jobs = submit(checked, accept_cost=_accepted(checked, options.yes), command=options.command_line)
    if options.json:
        print_json(jobs)
        return int(ExitCode.OK)
    print(_points(group, jobs.runs))
    print(f"submitted  {len(jobs.runs)} runs")
    where = run_root_words(group.root)
    print(f"next       launcher status {group.name}{where}\n           launcher results {group.name}{where}")
    return int(ExitCode.OK)


def _points(group: Group, jobs: Mapping[str, str] | None = None) -> str:
    """Return a line for each run: its job, where it has one, and what the sweep sets for it."""
    from launcher.views.text import columns

    keys = list(dict.fromkeys(key for point in group.points.values() for key in point))
    rows = [[run, *(point.get(key, "-") for key in keys)] for run, point in group.points.items()]
    if jobs is None:
        return columns([["RUN", *keys], *rows])
    return columns([["RUN", "JOB", *keys], *([run, jobs[run], *rest] for run, *rest in rows)])


def _submit_run(options: argparse.Namespace, checked: CheckedRun) -> int:
    from launcher.api.jobs import submit
    from launcher.submission.summary import next_steps, outline, summary
    from launcher.views.log_files import Choice

    submission = checked.submission
    if options.dry_run:
        scripts = "\n".join(one.script for one in checked.each())
        print(f"{summary(submission)}\n\n{scripts}", end="")
        return int(ExitCode.OK)
    if options.test_only:
        print(summary(submission))
        for one in checked.each():
            on = f"{one.submission.candidate}: " if one.submission.candidate else ""
            print(f"start      {on}{one.expected_start()}")
        return int(ExitCode.OK)
    job = submit(checked, accept_cost=_accepted(checked, options.yes), command=options.command_line)
    if options.json:
        print_json(job)
    else:
        raced = "".join(f"raced      job {text} on {name}\n" for name, text in job.candidates.items())
        print(f"{outline(submission)}\n{raced}{next_steps(submission, job.job_id)}", flush=True)
    return follow_run(submission.paths, Choice()) if options.follow else int(ExitCode.OK)


def _accepted(checked: CheckedRun | CheckedSweep, yes: bool) -> bool:
    """Ask before runs that are costly together, if somebody is there. Raise ConfigError where the answer is not yes."""
    from launcher.api.jobs import cost_above_limit
    from launcher.contract.errors import ConfigError

    if yes or not sys.stdin.isatty() or (excess := cost_above_limit(checked.submissions)) is None:
        return yes
    print(f"{excess}\nsubmit it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("not submitted")
    return True


def _render(options: argparse.Namespace) -> int:
    from launcher.api.checked import CheckedSweep
    from launcher.contract.errors import ConfigError

    if options.run_root is not None and not options.diff:
        raise ConfigError("--run-root says where the RUN of --diff is; the run's own place is set by run_root=DIR")
    checked = _checked(options)
    if isinstance(checked, CheckedSweep):
        first, count = checked.submissions[0].spec.name, len(checked.submissions)
        print(f"of the sweep's {count} runs the first, {first}:", file=sys.stderr)
        checked = checked.first()
    print(checked.script if options.diff is None else _diff(options, checked), end="")
    return int(ExitCode.OK)


def _diff(options: argparse.Namespace, checked: CheckedRun) -> str:
    from launcher.contract.errors import ConfigError
    from launcher.runs.find import find_run
    from launcher.submission.script_diff import against_cluster, against_run
    from launcher.submission.submission import make_submission

    submission = checked.submission
    if options.diff:
        return against_run(submission, find_run(options.diff, options.run_root or submission.paths.root.parent))
    if not options.cluster:
        raise ConfigError("--diff: name the RUN to compare with, or another cluster by --cluster")
    return against_cluster(make_submission(options.config, options.overrides), submission)


def _validate(options: argparse.Namespace) -> int:
    from launcher.api.checked import CheckedSweep
    from launcher.contract.versions import describe_versions, ranks_versions
    from launcher.submission.summary import summary

    checked = _checked(options)
    one = checked.first() if isinstance(checked, CheckedSweep) else checked
    for candidate in one.each():
        _ = candidate.script  # what `submit` would write: raises TemplateError where it cannot be rendered
    if options.json:
        print_json(checked.answer())
        return int(ExitCode.OK)
    if isinstance(checked, CheckedSweep):
        print(f"{summary(checked.submissions[0])}\n{_points(checked.group)}\nvalid")
        return int(ExitCode.OK)
    versions = ranks_versions(checked.submission.spec.cluster.runtime)
    known = describe_versions(versions) if versions else "those of the ranks' Python, which preflight checks"
    print(f"{summary(checked.submission)}\nversions   {known}\nvalid")
    return int(ExitCode.OK)
