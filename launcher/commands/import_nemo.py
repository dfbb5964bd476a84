"""import: a NeMo 1.x config in our keys."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher.commands.arguments import Subcommands, command
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(
        commands, "import", _import, "print a NeMo config in this launcher's keys; says what became of each key"
    )
    parser.add_argument("config", type=Path, metavar="NEMO.yaml", help="a config with trainer, exp_manager and model")
    parser.add_argument(
        "--model-dir", type=Path, help="write the config.json that the file spells out, to train from scratch"
    )


def _import(options: argparse.Namespace) -> int:
    from launcher.contract.config.text import read_text
    from launcher.contract.errors import ConfigError
    from launcher.contract.nemo.convert import convert, describe, to_yaml
    from launcher.nemo.topology import check_topology

    path: Path = options.config
    conversion = convert(read_text(path), str(path))
    if conversion.model is not None:
        check_topology(conversion)
    more: dict[str, object] = {}
    if options.model_dir is not None:
        if conversion.model is None:
            raise ConfigError(f"{path}: --model-dir: the file does not spell its model out (no model.num_layers)")
        options.model_dir.mkdir(parents=True, exist_ok=True)
        (options.model_dir / "config.json").write_text(json.dumps(conversion.model, indent=2) + "\n", encoding="utf-8")
        more = {"model.path": str(options.model_dir), "model.init": "random"}
    print(f"# from {path.name}; still to give: a cluster, model.path and data.train where they are not below")
    print(to_yaml(conversion, more), end="")
    print(describe(conversion), file=sys.stderr)
    return int(ExitCode.OK)
