"""cluster init, cluster check: a file that describes a cluster, and whether it is right."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import Subcommands, command, json_option, print_json
from launcher.commands.completion import CLUSTER, completed
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(commands, "cluster", _cluster, "write a first file that describes this cluster, or check one")
    parser.add_argument(
        "action", choices=("init", "check"), help="init: write a first file from what Slurm reports; check: test a file"
    )
    completed(parser.add_argument("name", metavar="NAME", help="the cluster's name"), CLUSTER)
    json_option(parser)


def _cluster(options: argparse.Namespace) -> int:
    if options.action == "init":
        from launcher.clusters.init import FirstFile, write_first

        path = write_first(options.name)
        if options.json:
            print_json(FirstFile(cluster=options.name, file=str(path)))
        else:
            print(f"wrote {path}:\n\n{path.read_text(encoding='utf-8')}\nnext  launcher cluster check {options.name}")
        return int(ExitCode.OK)
    from launcher.clusters.check import CheckedCluster, cluster_problems

    elsewhere = _elsewhere(options)
    if elsewhere is not None:
        return elsewhere
    problems = cluster_problems(options.name)
    if options.json:
        print_json(CheckedCluster(cluster=options.name, problems=problems))
        return int(ExitCode.BAD_INPUT if problems else ExitCode.OK)
    if problems:
        raise ConfigError(problems)
    print(f"cluster {options.name}: nothing is wrong")
    return int(ExitCode.OK)


def _elsewhere(options: argparse.Namespace) -> int | None:
    """Check on the cluster's host and return the exit code, or None where the file names no host or is damaged."""
    from launcher.contract.config.cluster_file import load_cluster
    from launcher.remote.hand_over import run_on

    try:
        cluster = load_cluster(options.name)
    except ConfigError:
        return None
    return run_on(cluster, options.command_line[1:])
