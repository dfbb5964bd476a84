"""resubmit, cancel: go on with a run, or end it."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import (
    Subcommands,
    chosen_run,
    chosen_runs,
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
    from launcher.contract.arrival import other_cluster
    from launcher.contract.spec import read_resolved
    from launcher.submission.resubmit import child_submission, same_run
    from launcher.submission.submit import submit
    from launcher.submission.summary import changes, next_steps, outline

    if options.failed:
        return _resubmit_failed(options)
    paths, cluster = chosen_run(options), other_cluster(options.cluster)
    if options.overrides or cluster:
        submission = child_submission(paths, options.overrides, cluster)
        job = submit(submission, options.command_line, parent_run=str(paths.root))
        changed = changes(read_resolved(paths.config), submission)
        run, text = submission.paths, f"{outline(submission)}\n{changed}\n{next_steps(submission, job)}"
    else:
        job = same_run(paths)
        run, text = paths, f"submitted  run {paths.name} again as job {job.id}"
    if options.json:
        print_json({"run": run.name, "directory": str(run.root), "job": job.id.text})
    else:
        print(text)
    return int(ExitCode.OK)


def _resubmit_failed(options: argparse.Namespace) -> int:
    from launcher.contract.arrival import other_cluster
    from launcher.contract.errors import ConfigError
    from launcher.runs.find import default_run_root
    from launcher.submission.resubmit import failed_of, same_run
    from launcher.sweeps.groups import find_runs

    if options.overrides or other_cluster(options.cluster):
        raise ConfigError("--failed goes on with runs as they are; settings can be changed one run at a time")
    runs = failed_of(find_runs(options.run, options.run_root or default_run_root()))
    jobs = {paths.name: same_run(paths).id.text for paths in runs}
    if options.json:
        print_json({"runs": jobs})
    else:
        print("\n".join(f"submitted  run {run} again as job {job}" for run, job in jobs.items()) or "no run has failed")
    return int(ExitCode.OK)


def _cancel(options: argparse.Namespace) -> int:
    from launcher.submission.cancel import active_of, cancel

    runs = chosen_runs(options)
    of_groups = len(runs) > len(options.runs)  # of a group's runs some may have ended: the others are meant
    lines = cancel(active_of(runs) or runs if of_groups else runs)
    if options.json:
        print_json({"cancelled": options.runs})
    else:
        print("\n".join(lines))
    return int(ExitCode.OK)
