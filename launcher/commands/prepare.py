"""prepare: fetch what a config names of the hub, before it is submitted."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import Subcommands, command, config_argument, override_arguments
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    about = "check a config, and fetch the models and data sets that it names by their ids on the Hugging Face hub"
    parser = command(commands, "prepare", _prepare, about)
    config_argument(parser)
    override_arguments(parser)


def _prepare(options: argparse.Namespace) -> int:
    from launcher.contract.config.load import load_config
    from launcher.submission.early_refusal import fetch_and_check

    config = load_config(options.config, options.overrides, options.cluster)
    for note in config.notes:
        print(note, flush=True)
    fetch_and_check(config.spec, config.fetches)
    print("all files of the hub are in the cache" if config.notes else "the config names nothing of the hub")
    return int(ExitCode.OK)
