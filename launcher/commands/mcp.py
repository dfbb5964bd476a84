"""mcp: the commands as tools for agents."""

from __future__ import annotations

import argparse
import importlib.util

from launcher.commands.arguments import Subcommands, command, run_root_option
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    about = "offer plan, validate, submit, status and more as tools for agents (MCP), over standard input and output"
    parser = command(commands, "mcp", _mcp, about)
    run_root_option(parser)
    parser.add_argument(
        "--allow-actions",
        action="store_true",
        help="also tools that make and end jobs and write reports; without it they are refused",
    )


def _mcp(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("mcp") is None:
        raise ConfigError("launcher mcp needs the package mcp: pip install 'slurm-sft-launcher[mcp]'")
    from launcher.mcp.server import Desk, serve

    serve(Desk(root=options.run_root, may_act=options.allow_actions))
    return int(ExitCode.OK)
