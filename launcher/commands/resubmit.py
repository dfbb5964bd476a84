"""resubmit, cancel: go on with a run, or end it."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands.arguments import (
    Subcommands,
    cluster_option,
    command,
    json_option,
    override_arguments,
    print_json,
    run_argument,
    runs_argument,
)
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the commands."""
    resubmit = command(commands, "resubmit", _resubmit, "go on with a run from its newest complete checkpoint")
    run_argument(resubmit)
    override_arguments(resubmit)
    resubmit.add_argument("--failed", action="store_true", help="of a group: every run that has failed")
    cancel = command(commands, "cancel", _cancel, "end the jobs of runs")
    runs_argument(cancel, "+")
    json_option(resubmit)
    json_option(cancel)
    cluster_option(cancel)


def _resubmit(options: argparse.Namespace) -> int:
    from launcher.api.jobs import resubmit
    from launcher.contract.arrival import other_cluster

    if options.failed:
        return _resubmit_failed(options)
    if options.overrides or other_cluster(options.cluster):
        return _submit_child(options)
    job = resubmit(options.run, root=options.run_root)
    if options.json:
        print_json(job)
    else:
        print(f"submitted  run {job.run} again as job {job.job_id}")
    return int(ExitCode.OK)


def _submit_child(options: argparse.Namespace) -> int:
    from launcher.api.jobs import check_child, submit_run
    from launcher.contract.arrival import other_cluster
    from launcher.contract.rundir import RunPaths
    from launcher.contract.spec import read_resolved
    from launcher.submission.summary import changes, next_steps, outline

    cluster = other_cluster(options.cluster)
    child = check_child(options.run, options.overrides, root=options.run_root, cluster=cluster)
    job = submit_run(child, options.command_line)
    if options.json:
        print_json(job)
    else:
        changed = changes(read_resolved(RunPaths(Path(child.parent_run or "")).config), child.submission)
        print(f"{outline(child.submission)}\n{changed}\n{next_steps(child.submission, job.job_id)}")
    return int(ExitCode.OK)


def _resubmit_failed(options: argparse.Namespace) -> int:
    from launcher.api.jobs import resubmit_failed
    from launcher.contract.arrival import other_cluster
    from launcher.contract.errors import ConfigError

    if options.overrides or other_cluster(options.cluster):
        raise ConfigError("--failed goes on with runs as they are; settings can be changed one run at a time")
    jobs = resubmit_failed(options.run, root=options.run_root)
    if options.json:
        print_json(jobs)
    else:
        lines = [f"submitted  run {run} again as job {job}" for run, job in jobs.runs.items()]
        print("\n".join(lines) or "no run has failed")
    return int(ExitCode.OK)


def _cancel(options: argparse.Namespace) -> int:
    from launcher.api.jobs import cancel

    done = cancel(options.runs, root=options.run_root)
    if options.json:
        print_json(done)
    else:
        print("\n".join(done.lines))
    return int(ExitCode.OK)
