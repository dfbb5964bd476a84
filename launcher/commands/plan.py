"""plan: which layouts a run could have, before one is queued."""

from __future__ import annotations

import argparse
import re

from launcher.commands.arguments import (
    Subcommands,
    command,
    config_argument,
    json_option,
    override_arguments,
    print_json,
)
from launcher.contract.exit_codes import ExitCode

_MOST_GPUS = 1_000_000


def add(commands: Subcommands) -> None:
    """Declare the command."""
    plan = command(commands, "plan", _plan, "list the layouts that fit, by predicted speed, memory and cost")
    config_argument(plan)
    override_arguments(plan)
    plan.add_argument(
        "--gpus", metavar="N|A..B", help="plan for N GPUs, or for A, 2A, 4A... up to B; default the config's own"
    )
    plan.add_argument(
        "--top", type=_count, metavar="K", help="layouts to list of each number of GPUs (default 5, or 1)"
    )
    json_option(plan)


def _plan(options: argparse.Namespace) -> int:
    from launcher.contract.config.load import load_config
    from launcher.contract.errors import ConfigError
    from launcher.planning.run_plan import gpu_of, unknown_gpu
    from launcher.planning.search import search_layouts, with_gpus
    from launcher.submission.submission import model_shape_of
    from launcher.views.plan_report import as_json, text

    spec = load_config(options.config, options.overrides, options.cluster).spec
    shape, gpu = model_shape_of(spec), gpu_of(spec)
    if gpu is None:
        raise ConfigError(unknown_gpu(spec))
    sizes = _sizes(options.gpus) if options.gpus else [spec.resources.world_size]
    specs = [with_gpus(spec, size) for size in sizes]
    plans = [(variant, search_layouts(variant, shape, gpu)) for variant in specs]
    top = options.top or (5 if len(plans) == 1 else 1)
    if options.json:
        print_json([as_json(variant, result, top) for variant, result in plans])
    else:
        print(text(plans, top))
    return int(ExitCode.OK if any(result.fitting for _, result in plans) else ExitCode.BAD_INPUT)


def _count(word: str) -> int:
    """Return a whole number above 0, or raise ArgumentTypeError."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def _sizes(words: str) -> list[int]:
    """Return the numbers in `16` or in `8..1024`, which doubles."""
    from launcher.contract.errors import ConfigError

    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", words)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= _MOST_GPUS:
        raise ConfigError(f"--gpus {words}: give a number, or a range such as 8..1024, up to {_MOST_GPUS:,}")
    sizes = []
    while first <= last:
        sizes.append(first)
        first *= 2
    return sizes
