"""explain: what a config key, an exit code or a cause means."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import Subcommands, command, json_option, print_json
from launcher.commands.completion import KEY, completed
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(commands, "explain", _explain, "tell what a config key, a section, an exit code or a cause means")
    word = parser.add_argument("word", metavar="WORD", help="e.g. train.micro_batch_size, topology, 76, out_of_memory")
    completed(word, KEY)
    json_option(parser)


def _explain(options: argparse.Namespace) -> int:
    from launcher.api.meanings import explain

    found = explain(options.word)
    if options.json:
        print_json(found)
        return int(ExitCode.OK)
    for one in found:
        about = f" ({one.value}; default {one.default})" if one.value else ""
        print(f"{one.word}{about}: {one.meaning}")
    return int(ExitCode.OK)
