"""Holds real outputs to the schemas that the package ships: every `--json` output and every run directory of the tests.

Shipped schemas allow fields that they do not know, since a later version may add some; here such a field is an error,
because this version's page would not have it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from launcher.contract.forms.schemas import Schema, read_schema
from launcher.contract.rundir import RunPaths, read_lines

_OPEN = {"metrics"}
"""Forms whose fields a run names itself."""
_RENEW = "describe it in launcher/contract/forms/ (files) or in its dataclass (answers), then run scripts/schemas"


def problems(name: str, value: object) -> list[str]:
    """What is wrong with a value that the schema `name` describes."""
    found = sorted(_validator(name, _variant(name, value)).iter_errors(value), key=lambda error: len(error.path))
    return [f"{name}{_place(error)}: {error.message[:300]}; {_RENEW}" for error in found]


def problems_of_run(root: Path) -> list[str]:
    """What is wrong with the files of a run directory."""
    return [f"{root.name}: {problem}" for name, value in _records(RunPaths(root)) for problem in problems(name, value)]


def runs_below(folder: Path) -> Iterator[Path]:
    """Run directories that a submission or the ranks themselves have made."""
    return (config.parent for config in folder.rglob("config.yaml") if (config.parent / "events.jsonl").is_file())


def _records(paths: RunPaths) -> Iterator[tuple[str, object]]:
    yield from (("events", event) for event in read_lines(paths.events))
    yield from (("metrics", line) for line in read_lines(paths.metrics))
    yield from _files("progress", [paths.progress])
    yield from _files("manifest", [paths.manifest])
    yield from _files("error", paths.logs.glob("*/error.json"))
    yield from _files("hang", paths.logs.glob("*/hang.json"))
    yield from _files("preflight", (paths.root / "preflight").glob("*.json"))


def _files(name: str, files: Any) -> Iterator[tuple[str, object]]:
    yield from ((name, json.loads(file.read_text(encoding="utf-8"))) for file in files if file.is_file())


def _place(error: jsonschema.ValidationError) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.path)


def _variant(name: str, value: object) -> str:
    """The one form of an event, so that a message is about that form and not about all of them."""
    return str(value.get("event")) if name == "events" and isinstance(value, dict) else ""


@cache
def _validator(name: str, variant: str) -> jsonschema.Draft202012Validator:
    schema = read_schema(name)
    if name not in _OPEN:
        schema = _closed(schema)
    if variant:
        forms = [form for form in schema["$defs"].values() if _event_of(form) == variant]
        schema = {"$defs": schema["$defs"], **(forms[0] if forms else {"not": {}, "description": "an unknown event"})}
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def _event_of(form: Schema) -> object:
    return form.get("properties", {}).get("event", {}).get("const")


def _closed(node: Any) -> Any:
    """The schema with no other fields than those that it names."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    return {**closed, "additionalProperties": False} if isinstance(node.get("properties"), dict) else closed
