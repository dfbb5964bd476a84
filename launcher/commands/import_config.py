"""import: a config of NeMo 1.x, TRL, axolotl or LLaMA-Factory in our keys."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.arguments import Subcommands, command
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.contract.nemo.convert import Conversion


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(
        commands,
        "import",
        _import,
        "print a config of NeMo, TRL, axolotl or LLaMA-Factory in this launcher's keys; says what became of each key",
    )
    parser.add_argument("config", type=Path, metavar="OTHER.yaml", help="a YAML file of one of these trainers")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs that the file's batch per GPU is meant for; NeMo's file says it"
    )
    parser.add_argument(
        "--model-dir", type=Path, help="write the config.json that a NeMo file spells out, to train from scratch"
    )


def _import(options: argparse.Namespace) -> int:
    from launcher.contract.config.text import read_text
    from launcher.contract.errors import ConfigError
    from launcher.contract.nemo.convert import describe, to_yaml

    path: Path = options.config
    conversion = _converted(read_text(path), path, options.gpus)
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


def _converted(text: str, path: Path, gpus: int | None) -> Conversion:
    """Return the config in our keys, by the trainer that its keys belong to."""
    from launcher.contract.errors import ConfigError
    from launcher.contract.nemo import convert as nemo
    from launcher.contract.trainers import convert as trainers
    from launcher.contract.yaml_document import top_level_keys
    from launcher.nemo.topology import check_topology

    trainer = trainers.recognised(text)
    if trainer is not None:
        if gpus is not None and gpus < 1:
            raise ConfigError(f"--gpus {gpus}: at least 1")
        return trainers.convert(text, str(path), trainer, gpus or 1)
    keys = top_level_keys(text, str(path))
    if not keys:
        raise ConfigError(f"{path}: no keys in it; a config of NeMo 1.x, TRL, axolotl or LLaMA-Factory is meant")
    if "trainer" not in keys and keys & {"cluster", "data", "train", "topology", "checkpoint"}:
        raise ConfigError(f"{path}: a config of the launcher's own keys already; `launcher validate {path}` checks it")
    if gpus is not None:
        raise ConfigError(f"{path}: --gpus is for TRL, axolotl and LLaMA-Factory, and this is none of their configs")
    conversion = nemo.convert(text, str(path))
    if conversion.model is not None:
        check_topology(conversion)
    return conversion
