"""init: write a first config."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launcher.commands.arguments import Subcommands, command
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    about = "write a first config for a model, data, a cluster and a number of GPUs; asks for what no option gives"
    parser = command(commands, "init", _init, about)
    parser.add_argument("--model", help="a model directory, or an id on the hub (ORG/NAME)")
    parser.add_argument("--data", nargs="+", help="data files, or an id on the hub (ORG/NAME:SPLIT)")
    parser.add_argument("--cluster", dest="on", metavar="NAME", help="a file in cluster_configs/; local: this machine")
    parser.add_argument("--gpus", type=int, help="GPUs in all; 0 trains on CPU ranks")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora", type=int, nargs="?", const=-1, metavar="RANK", help="train adapters (rank 16)")
    kind.add_argument("--full", action="store_true", help="train all weights (the default)")
    parser.add_argument("--name", help="name of the run; default that of model and data")
    parser.add_argument("--output", type=Path, default=Path("cfg.yaml"), help="the file to write (default cfg.yaml)")


def _init(options: argparse.Namespace) -> int:
    from launcher.contract.config.cluster_file import load_cluster
    from launcher.first_config.answers import DEFAULT_RANK, Answers
    from launcher.first_config.write import write_first_config

    model = options.model or _ask("model", "a model directory, or an id on the hub (ORG/NAME)")
    data = options.data or _ask("data", "data files, or an id on the hub (ORG/NAME:SPLIT)").split()
    cluster = options.on or _ask("cluster", f"cluster ({', '.join(_clusters())})", "local")
    described = load_cluster(cluster)
    if described.host is not None:
        raise ConfigError(f"cluster {cluster} is behind ssh, and its files are there: run `launcher init` on it")
    gpus = options.gpus
    if gpus is None:
        each = described.resources.gpus_per_node
        gpus = _number("gpus", _ask("gpus", "GPUs in all; 0 trains on CPU ranks", str(each)))
    rank = options.lora
    if rank is None and not options.full and sys.stdin.isatty():
        answer = _ask("lora", "all weights (full), or adapters (lora)", "full")
        rank = -1 if answer.lower().startswith("l") else None
    if gpus < 0 or rank == 0 or (rank is not None and rank < -1):
        raise ConfigError("--gpus must be at least 0, and the rank of --lora at least 1")
    answers = Answers(
        model=model,
        data=tuple(data),
        cluster=cluster,
        gpus=gpus,
        lora_rank=DEFAULT_RANK if rank == -1 else rank,
        name=options.name,
    )
    submission = write_first_config(answers, options.output)
    print(options.output.read_text(encoding="utf-8"))
    for note in submission.config.notes:
        print(f"hub    {note}")
    print(f"wrote  {options.output}")
    print(f"next   python -m sft audit {options.output}     # which tokens will be trained")
    print(f"       launcher submit {options.output}")
    return int(ExitCode.OK)


def _ask(option: str, what: str, default: str = "") -> str:
    """Return the user's answer, or raise ConfigError where nobody can answer and there is no default."""
    if not sys.stdin.isatty():
        if default:
            return default
        raise ConfigError(f"--{option} is missing: {what}")
    shown = f" [{default}]" if default else ""
    while True:
        print(f"{what}{shown}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            raise ConfigError(f"--{option} is missing: {what}")
        answer = line.strip() or default
        if answer:
            return answer


def _number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--{option} {text}: not a whole number")
    return int(text)


def _clusters() -> list[str]:
    from launcher.contract.resources import search_path

    return sorted({path.stem for folder in search_path("cluster_configs") for path in folder.glob("*.yaml")})
