"""submit, render, validate: from a config to a job, or to what would become one."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from launcher.commands import command, config_argument, json_option, override_arguments, print_json
from launcher.commands.logs import exit_with
from launcher.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.plan import Plan


def add(commands: Any) -> None:
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
    submit.add_argument("--follow", action="store_true", help="show the logs until the run has ended")


def _submit(options: argparse.Namespace) -> int:
    from launcher.submit import next_steps, script_of, submit, summary

    plan, parent = _plan(options)
    if options.dry_run:
        print(f"{summary(plan)}\n\n{script_of(plan)}", end="")
        return int(ExitCode.OK)
    attempt = submit(plan, options.command_line, parent)
    if options.json:
        print_json({"run": plan.paths.name, "directory": str(plan.paths.root), "job": attempt.job_id})
    else:
        print(f"{summary(plan)}\n{next_steps(plan, attempt)}", flush=True)
    return _follow(plan.paths) if options.follow else int(ExitCode.OK)


def _plan(options: argparse.Namespace) -> tuple[Plan, str | None]:
    """The plan of a config, or of a run's lock file, and then the run it comes from."""
    from launcher.lockfile import code_note, is_lock, plan_of_lock
    from launcher.plan import make_plan

    if not is_lock(options.config):
        return make_plan(options.config, options.overrides, options.cluster), None
    note = code_note(options.config)
    if note:
        print(note, file=sys.stderr)
    return plan_of_lock(options.config, options.overrides, options.cluster)


def _render(options: argparse.Namespace) -> int:
    from launcher.submit import script_of

    plan, _ = _plan(options)
    print(script_of(plan), end="")
    return int(ExitCode.OK)


def _validate(options: argparse.Namespace) -> int:
    import dataclasses

    from launcher.submit import summary

    plan, _ = _plan(options)
    if options.json:
        print_json(
            {
                "config": dataclasses.asdict(plan.spec),
                "sources": plan.config.sources,
                "topology": dataclasses.asdict(plan.topology),
            }
        )
    else:
        print(f"{summary(plan)}\nvalid")
    return int(ExitCode.OK)


def _follow(paths: Any) -> int:
    from launcher.logs import Choice, follow

    return exit_with(follow(paths, Choice()))
