"""plan: which layouts a run could have, before one is queued."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import (
    Subcommands,
    command,
    config_argument,
    json_option,
    override_arguments,
    print_json,
)
from launcher.contract.argument_types import count
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    plan = command(commands, "plan", _plan, "list the layouts that fit, by predicted speed, memory and cost")
    config_argument(plan)
    override_arguments(plan)
    plan.add_argument(
        "--gpus", metavar="N|A..B", help="plan for N GPUs, or for A, 2A, 4A... up to B; default the config's own"
    )
    plan.add_argument("--top", type=count, metavar="K", help="layouts to list of each number of GPUs (default 5, or 1)")
    json_option(plan)


def _plan(options: argparse.Namespace) -> int:
    from launcher.api.plans import plan
    from launcher.views.plan_report import text

    found = plan(options.config, options.overrides, cluster=options.cluster, gpus=options.gpus, top=options.top)
    if options.json:
        print_json(found.answer())
    else:
        print(text(found.searches, found.top))
    return int(ExitCode.OK if found.fits else ExitCode.BAD_INPUT)
