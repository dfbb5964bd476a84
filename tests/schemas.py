"""Holds real outputs to the schemas that the package ships: every `--json` output and every run directory of the tests.

Shipped schemas allow fields that they do not know, since a later version may add some; here such a field is an error,
because this version's page would not have it.
"""

from __future__ import annotations

import json
import os
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema

from launcher.api.answers import ANSWERS
from launcher.contract.forms.schemas import Schema, read_schema
from launcher.contract.rundir import RunPaths, read_lines

_OPEN = {"metrics"}
"""Forms whose fields a run names itself."""
_RENEW = "describe it in launcher/contract/forms/ (files) or in its dataclass (answers), then run scripts/schemas"


def problems(name: str, value: object) -> list[str]:
    """Return what is wrong with a value that the schema `name` describes."""
    found = sorted(_validator(name, _variant(name, value)).iter_errors(value), key=lambda error: len(error.path))
    return [f"{name}{_place(error)}: {error.message[:300]}; {_RENEW}" for error in found]


def problems_of_run(root: Path) -> list[str]:
    """Return what is wrong with the files of a run directory."""
    return [f"{root.name}: {problem}" for name, value in _records(RunPaths(root)) for problem in problems(name, value)]


def runs_below(folder: Path) -> Iterator[Path]:
    """Run directories that a submission or the ranks themselves have made."""
    for place, folders, files in os.walk(folder):
        if {"config.yaml", "events.jsonl"} <= set(files):
            folders.clear()
            yield Path(place)


def problems_of_answer(value: object, text: str) -> list[str]:
    """Return what is wrong with what `print_json` prints of dataclasses."""
    names = [name for name, form in ANSWERS.items() if _is_of(value, form)]
    assert names or isinstance(value, dict), f"{type(value)} is in no form of launcher.api.answers"
    return problems(names[0], json.loads(text)) if names else []


def _is_of(value: object, form: object) -> bool:
    kinds = typing.get_args(form) or (form,)
    if isinstance(value, list | tuple):
        return typing.get_origin(form) is tuple and all(isinstance(item, kinds[0]) for item in value)
    return typing.get_origin(form) is not tuple and isinstance(value, tuple(kinds))


def checked_output(words: Sequence[str], text: str) -> None:
    """Hold the output of `launcher WORDS` in a process of its own to its schema, if it is JSON."""
    if "--json" in words and text:
        found = problems("why" if "--why" in words else words[0], json.loads(text))
        assert not found, "\n".join(found)


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
    """Return the one form of an event, so that a message is about that form and not about all of them."""
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
    """Return the schema with no other fields than those that it names."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    return {**closed, "additionalProperties": False} if isinstance(node.get("properties"), dict) else closed
