"""Write docs/reference/json.md from the schemas: a table for each form, a row for each field."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.contract.forms.schemas import VERSION, Schema, read_schema

_INTRO = f"""# JSON

What programs may rely on: the output of commands with `--json`, and the JSON files of a run. `launcher reference json`
prints this page, which is made from the schemas, and `launcher schema NAME` a schema (JSON Schema, draft 2020-12).

This is version {VERSION}, which is in the `$id` of each schema. Fields may be added to it; fields that exist keep name
and meaning. So a program should pass over fields that it does not know. Numbers that JSON does not have (NaN,
infinity) are null in the output of commands. From Python, [`launcher.api`](api.md) has the same as dataclasses.

`state` is one of `PENDING`, `HELD`, `REQUEUED`, `RUNNING`, `SUSPENDED`, `COMPLETING`, `COMPLETED`, `FAILED`,
`CANCELLED`, `INTERRUPTED` (stopped on request with a complete checkpoint), `TIMEOUT`, `OUT_OF_MEMORY`, `NODE_FAIL`,
`PREEMPTED`, `UNKNOWN` (nobody who would know has answered).
"""
_COMMANDS = {
    "validate": "`launcher validate --json`: of a config for one run, or of a sweep.",
    "explain": "`launcher explain --json`: a list, with an entry for each key of a section.",
    "plan": "`launcher plan --json`: a list, with an entry for each number of GPUs.",
    "submit": "`launcher submit --json`: of one run, or of a sweep.",
    "resubmit": "`launcher resubmit --json`: of one run, or of the failed runs of a sweep.",
    "status": "`launcher status --json`: a list, with an entry for each run. Numbers are those of the newest attempt.",
    "why": "`launcher status --why --json`: a list, with an entry for each run.",
    "logs": "`launcher logs --json`: the end of the logs.",
    "list": "`launcher list --json`: a list, with an entry for each run.",
    "stacks": "`launcher stacks --json`: where the ranks of a run stand now.",
    "usage": "`launcher usage --json`.",
    "results": "`launcher results --json`: a list, with an entry for each run of the sweep.",
    "report": "`launcher report --json`: where the page is.",
    "cancel": "`launcher cancel --json`.",
    "nodes": "`launcher nodes --json`: a list, with an entry for each piece of evidence.",
    "cluster": "`launcher cluster init --json`, `launcher cluster check --json`.",
}
_FILES = {
    "progress": "progress.json",
    "manifest": "manifest.json",
    "metrics": "metrics.jsonl",
    "error": "error.json",
    "hang": "hang.json",
    "preflight": "preflight",
    "notification": "notify",
}
_OTHERS = """
### bad_steps.jsonl, generations.jsonl, samples.jsonl

They are for people, and have no schema.

| file | fields |
|---|---|
| `bad_steps.jsonl` | `step`, `reason`, `loss`, `grad_norm`, `examples`: ids such as `17`, or `math:17` of a source |
| `generations.jsonl` | `step`, `prompt`, `output` |
| `samples.jsonl` | `label` (`before` or `after`), `prompt`, `answer` |
"""
_MOST_VALUES = 14
"""Values that are listed where a field has a fixed set of them; the states are listed once for all."""
_ELSEWHERE = "RunSpec"
"""The config's own form, which has a page of its own."""


def json_reference() -> str:
    """Return the whole page."""
    parts = [_INTRO, "\n## Output of commands\n"]
    for name, about in _COMMANDS.items():
        parts += [f"\n### {name}\n\n{about}\n", *_tables(read_schema(name))]
    parts += ["\n## Files of a run\n", *_events(read_schema("events"))]
    for name, title in _FILES.items():
        schema = read_schema(name)
        parts += [f"\n### {title}\n\n{_about(schema)}\n", *_tables(schema)]
    return "".join([*parts, _OTHERS])


def _events(schema: Schema) -> Iterator[str]:
    yield (
        "\n### events.jsonl\n\nOne object a line, with `time` (seconds since the epoch) and `event`. Events of an "
        "attempt carry `attempt`, its name.\n\n| `event` | when | further fields |\n|---|---|---|\n"
    )
    for variant in _variants(schema):
        name = variant["properties"]["event"]["const"]
        skipped = {"time", "event", *({"attempt"} if "attempt" in variant["required"] else set())}
        fields = [_field(*row) for row in _rows(variant, schema) if row[0] not in skipped]
        yield f"| `{name}` | {variant['description'].removesuffix('.')} | {'<br>'.join(fields)} |\n"


def _field(key: str, kind: str, said: str) -> str:
    """Return a field in one line, with its values where they are a fixed set."""
    values = f" ({kind})" if kind.startswith("`") else ""
    return f"`{key}`{values}: {said[:1].lower()}{said[1:]}".removesuffix(".")


def _tables(schema: Schema) -> Iterator[str]:
    """Yield a table for each form that the schema allows."""
    for variant in _variants(schema):
        yield "\n| field | value | meaning |\n|---|---|---|\n"
        for key, kind, said in _rows(variant, schema):
            yield f"| `{key}` | {kind} | {said} |\n"


def _about(schema: Schema) -> str:
    return str(_variants(schema)[0].get("description", ""))


def _variants(schema: Schema) -> list[Schema]:
    """Return the objects that a schema allows, of a list those of its entries."""
    node = _target(schema.get("items", schema), schema)
    several = node.get("anyOf") or node.get("oneOf") or [node]
    return [_target(item, schema) for item in several]


def _target(node: Schema, schema: Schema) -> Schema:
    reference = node.get("$ref")
    return dict(schema["$defs"][reference.rpartition("/")[2]]) if reference else node


def _rows(variant: Schema, schema: Schema, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield dotted key, kind of value and meaning of every field, those of inner objects behind them."""
    for name, node in variant["properties"].items():
        key = f"{prefix}{name}"
        said = str(node.get("description", "")) or str(_inner(node, schema)[0].get("description", ""))
        yield key, _kind(node, schema), said.replace("|", "\\|")
        below, brackets = _inner(node, schema)
        if "properties" in below and not _is_elsewhere(node):
            yield from _rows(below, schema, f"{key}{brackets}.")


def _inner(node: Schema, schema: Schema) -> tuple[Schema, str]:
    """Return the object that a field holds, and what its key has behind it where it holds several."""
    for option in (node, *node.get("anyOf", ())):
        if "$ref" in option:
            return _target(option, schema), ""
        if "$ref" in option.get("items", {}):
            return _target(option["items"], schema), "[]"
    return {}, ""


def _is_elsewhere(node: Schema) -> bool:
    return str(node.get("$ref", "")).endswith(f"/{_ELSEWHERE}")


def _kind(node: Schema, schema: Schema) -> str:
    """Return what a value is, in words."""
    if _is_elsewhere(node):
        return "object: [config](../config.md)"
    if "$ref" in node:
        return _kind(_target(node, schema), schema)
    if "anyOf" in node:
        return " or ".join(_kind(option, schema) for option in node["anyOf"])
    if "const" in node or "enum" in node:
        values = node.get("enum", [node.get("const")])
        return "text" if len(values) > _MOST_VALUES else ", ".join(f"`{value}`" for value in values)
    if node.get("type") == "array":
        return f"list of {_kind(node['items'], schema)}" if "items" in node else "list"
    if node.get("type") == "object":
        held = node.get("additionalProperties")
        return f"mapping to {_kind(held, schema)}" if isinstance(held, dict) and held else "object"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}
    return words.get(str(node.get("type")), "any value")
