"""The JSON schemas that the package ships: of what commands print with --json, and of the files of a run.

`scripts/schemas` writes them. Fields may be added to a version; one that goes or changes its meaning makes a new one.
"""

from __future__ import annotations

import json
from pathlib import Path

from launcher.contract.errors import ConfigError, did_you_mean
from launcher.contract.rundir import JsonObject

VERSION = 1
FOLDER = Path(__file__).parents[1] / "schemas" / f"v{VERSION}"

Schema = JsonObject
"""A JSON schema of draft 2020-12."""


def identity(name: str) -> str:
    """Return the `$id` of a schema, which has its version."""
    return f"urn:slurm-sft-launcher:v{VERSION}:{name}"


def schema_names() -> list[str]:
    """Return the names of all schemas."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_schema(name: str) -> Schema:
    """Return a schema, or raise ConfigError where there is none of this name."""
    known = schema_names()
    if name not in known:
        raise ConfigError(f"no schema {name!r}{did_you_mean(name, known)}; there are: {', '.join(known)}")
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
