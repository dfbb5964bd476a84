"""submit, render, validate: from a config to a job, or to what would become one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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
    from launcher.contract.rundir import RunPaths
    from launcher.submission.submission import Submission
    from launcher.sweeps.groups import Group
    from launcher.sweeps.sweep import Sweep


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
    submit.add_argument("--follow", action="store_true", help="show the logs until the run has ended")


def _submit(options: argparse.Namespace) -> int:
    from launcher.sweeps.sweep import read_sweep

    sweep = read_sweep(options.config)
    if sweep is not None:
        return _submit_sweep(options, sweep)
    return _submit_run(options)


def _submit_sweep(options: argparse.Namespace, sweep: Sweep) -> int:
    from launcher.contract.errors import ConfigError
    from launcher.submission.summary import run_root_words, summary
    from launcher.sweeps.submit import submit_group, sweep_submissions

    if options.follow or options.test_only:
        raise ConfigError("--follow and --test-only are for single runs, and the config has a sweep section")
    group, submissions = sweep_submissions(options.config, sweep, options.overrides, options.cluster)
    if options.dry_run:
        print(f"{summary(submissions[0])}\n{_points(group)}")
        return int(ExitCode.OK)
    _confirm(submissions, options.yes)
    jobs = [job.id.text for job in submit_group(group, submissions, sweep, options.command_line)]
    if options.json:
        print_json({"group": group.name, "runs": dict(zip(group.points, jobs, strict=True))})
        return int(ExitCode.OK)
    print(_points(group, jobs))
    print(f"submitted  {len(jobs)} runs")
    where = run_root_words(group.root)
    print(f"next       launcher status {group.name}{where}\n           launcher results {group.name}{where}")
    return int(ExitCode.OK)


def _points(group: Group, jobs: Sequence[str] = ()) -> str:
    """Return a line for each run: its job, where it has one, and what the sweep sets for it."""
    from launcher.views.text import columns

    keys = list(dict.fromkeys(key for point in group.points.values() for key in point))
    rows = [[run, *(point.get(key, "-") for key in keys)] for run, point in group.points.items()]
    if not jobs:
        return columns([["RUN", *keys], *rows])
    return columns([["RUN", "JOB", *keys], *([run, job, *rest] for (run, *rest), job in zip(rows, jobs, strict=True))])


def _submit_run(options: argparse.Namespace) -> int:
    from launcher.submission.script import script_of
    from launcher.submission.submit import submit
    from launcher.submission.summary import next_steps, outline, summary

    submission, parent = _submission(options)
    if options.dry_run:
        print(f"{summary(submission)}\n\n{script_of(submission)}", end="")
        return int(ExitCode.OK)
    if options.test_only:
        print(f"{summary(submission)}\n{_expected_start(submission)}")
        return int(ExitCode.OK)
    _confirm([submission], options.yes)
    job = submit(submission, options.command_line, parent)
    if options.json:
        print_json({"run": submission.paths.name, "directory": str(submission.paths.root), "job": job.id.text})
    else:
        print(f"{outline(submission)}\n{next_steps(submission, job)}", flush=True)
    return _follow(submission.paths) if options.follow else int(ExitCode.OK)


def _swept(options: argparse.Namespace) -> tuple[Group, list[Submission]] | None:
    """Return the checked runs of a config with a sweep section, or None where it has none."""
    from launcher.sweeps.sweep import read_sweep

    sweep = read_sweep(options.config)
    if sweep is None:
        return None
    from launcher.sweeps.submit import sweep_submissions

    return sweep_submissions(options.config, sweep, options.overrides, options.cluster)


def _confirm(submissions: Sequence[Submission], yes: bool) -> None:
    """Ask before runs that are costly together. Raise ConfigError where nobody can answer, or the answer is not yes."""
    from launcher.contract.errors import ConfigError
    from launcher.planning.run_plan import run_cost

    limit = submissions[0].spec.resources.gpu_hour_limit
    costs = [
        cost for submission in submissions if (cost := run_cost(submission.spec, submission.prediction)) is not None
    ]
    hours = sum(cost.gpu_hours for cost in costs)
    if yes or limit is None or hours <= limit:
        return
    what = f"{len(submissions)} runs take up to {hours:,.1f} GPU hours"
    if len(submissions) == 1:
        what = f"the run takes up to {costs[0].describe()}"
    what += f"; resources.gpu_hour_limit is {limit:,.1f}"
    if not sys.stdin.isatty():
        raise ConfigError(f"{what}; submit with --yes if that is meant")
    print(f"{what}\nsubmit it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ConfigError("not submitted")


def _submission(options: argparse.Namespace) -> tuple[Submission, str | None]:
    """Return the submission of a config, or of a run's lockfile together with the run that it was made by."""
    from launcher.submission.lockfile import code_note, is_lockfile, submission_of_lockfile
    from launcher.submission.submission import make_submission

    if not is_lockfile(options.config):
        return make_submission(options.config, options.overrides, options.cluster), None
    note = code_note(options.config)
    if note:
        print(note, file=sys.stderr)
    return submission_of_lockfile(options.config, options.overrides, options.cluster)


def _expected_start(submission: Submission) -> str:
    from launcher.scheduler.factory import scheduler_of
    from launcher.submission.script import script_of

    scheduler = scheduler_of(submission.spec.cluster.scheduler)
    clusters = scheduler.clusters_of(submission.spec.resources)
    return f"start      {scheduler.expected_start(script_of(submission), clusters)}"


def _render(options: argparse.Namespace) -> int:
    from launcher.submission.script import script_of

    swept = _swept(options)
    submission = swept[1][0] if swept else _submission(options)[0]
    if swept:
        print(f"of the sweep's {len(swept[1])} runs the first, {submission.spec.name}:", file=sys.stderr)
    print(script_of(submission) if options.diff is None else _diff(options, submission), end="")
    return int(ExitCode.OK)


def _diff(options: argparse.Namespace, submission: Submission) -> str:
    from launcher.contract.errors import ConfigError
    from launcher.runs.find import find_run
    from launcher.submission.script_diff import against_cluster, against_run
    from launcher.submission.submission import make_submission

    if options.diff:
        return against_run(submission, find_run(options.diff, options.run_root or submission.paths.root.parent))
    if not options.cluster:
        raise ConfigError("--diff: name the RUN to compare with, or another cluster by --cluster")
    return against_cluster(make_submission(options.config, options.overrides), submission)


def _validate(options: argparse.Namespace) -> int:
    import dataclasses

    from launcher.contract.versions import describe_versions, ranks_versions
    from launcher.submission.summary import summary

    swept = _swept(options)
    if swept:
        group, submissions = swept
        if options.json:
            print_json({"group": group.name, "runs": group.points})
        else:
            print(f"{summary(submissions[0])}\n{_points(group)}\nvalid")
        return int(ExitCode.OK)
    submission, _ = _submission(options)
    if options.json:
        print_json(
            {
                "config": dataclasses.asdict(submission.spec),
                "sources": submission.config.sources,
                "topology": dataclasses.asdict(submission.topology),
                "versions": ranks_versions(submission.spec.cluster.runtime),
            }
        )
    else:
        versions = ranks_versions(submission.spec.cluster.runtime)
        known = describe_versions(versions) if versions else "those of the ranks' Python, which preflight checks"
        print(f"{summary(submission)}\nversions   {known}\nvalid")
    return int(ExitCode.OK)


def _follow(paths: RunPaths) -> int:
    from launcher.views.log_files import Choice

    return follow_run(paths, Choice())
