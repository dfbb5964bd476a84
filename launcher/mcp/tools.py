"""The tools: a function of `launcher.api` each, with the schemas of what goes in and of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import api
from launcher.contract.forms.schemas import Schema, read_schema
from launcher.contract.jsonable import jsonable
from launcher.views.log_files import Choice, parse_ranks

Arguments = Mapping[str, object]

_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
_CONFIG: Schema = {
    "config": {**_TEXT, "description": "Path of the run's YAML file."},
    "overrides": {**_TEXTS, "description": "KEY=VALUE words that win over the file's settings."},
    "cluster": {**_TEXT, "description": "Another cluster than the config's: a file in cluster_configs/."},
}
_RUN: Schema = {"run": {**_TEXT, "description": "The run's name, or its directory."}}
_RUNS: Schema = {"runs": {**_TEXTS, "description": "Names or directories of runs, or names of sweeps."}}
_CONFIRM: Schema = {
    "confirm": {"const": True, "description": "Must be true: the call makes or ends jobs, which cost what they cost."}
}
_LINES = 100
_MOST_LINES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One tool."""

    name: str
    about: str
    call: Callable[[Arguments, Path | None], object]
    """Takes checked arguments and where runs are, and returns dataclasses."""
    arguments: Schema
    """Schemas of the arguments by their names."""
    required: tuple[str, ...] = ()
    acts: bool = False
    """Whether it makes or ends jobs, or writes files."""
    listed_as: str = ""
    """Name of the field that holds the answer where that is a list, since a tool answers with an object."""

    @property
    def input_schema(self) -> Schema:
        """The schema of the arguments, of which no others are taken."""
        required = [*self.required, *(["confirm"] if "confirm" in self.arguments else [])]
        return {
            "type": "object",
            "properties": dict(self.arguments),
            "required": required,
            "additionalProperties": False,
        }

    @property
    def output_schema(self) -> Schema:
        """The schema of the answer, an object."""
        schema = _without_config({key: value for key, value in read_schema(self.name).items() if key != "$id"})
        if not self.listed_as:
            return {"type": "object", **schema}
        inner = {key: value for key, value in schema.items() if key in ("type", "items")}
        outer = {key: value for key, value in schema.items() if key not in inner}
        return {**outer, "type": "object", "properties": {self.listed_as: inner}, "required": [self.listed_as]}

    def answer(self, arguments: Arguments, root: Path | None) -> object:
        """Call the tool and return its answer as JSON has it."""
        answer = jsonable(self.call(arguments, root))
        return {self.listed_as: answer} if self.listed_as else answer


def _without_config(schema: Schema) -> Schema:
    """Return a schema that says nothing of single config keys: of those `explain` tells, and there are hundreds."""
    forms = schema.get("$defs", {})
    if "RunSpec" not in forms:
        return schema
    kept = {name: form for name, form in forms.items() if not name.endswith("Spec")}
    return {**schema, "$defs": {**kept, "RunSpec": {"type": "object", "description": "Every key of the config."}}}


def _text(arguments: Arguments, name: str) -> str | None:
    value = arguments.get(name)
    return None if value is None else str(value)


def _texts(arguments: Arguments, name: str) -> list[str]:
    value = arguments.get(name)
    return [str(item) for item in value] if isinstance(value, list) else []


def _validate(arguments: Arguments, root: Path | None) -> object:
    checked = api.validate(
        str(arguments["config"]), _texts(arguments, "overrides"), cluster=_text(arguments, "cluster")
    )
    return checked.answer()


def _plan(arguments: Arguments, root: Path | None) -> object:
    top = arguments.get("top")
    return api.plan(
        str(arguments["config"]),
        _texts(arguments, "overrides"),
        cluster=_text(arguments, "cluster"),
        gpus=_text(arguments, "gpus"),
        top=top if isinstance(top, int) else None,
    ).answer()


def _explain(arguments: Arguments, root: Path | None) -> object:
    return api.explain(str(arguments["word"]))


def _submit(arguments: Arguments, root: Path | None) -> object:
    config, overrides = str(arguments["config"]), _texts(arguments, "overrides")
    return api.submit(
        config,
        overrides,
        cluster=_text(arguments, "cluster"),
        accept_cost=arguments.get("accept_cost") is True,
        command=["launcher", "mcp", "submit", config, *overrides],
    )


def _status(arguments: Arguments, root: Path | None) -> object:
    return api.status(_texts(arguments, "runs"), root=root).rows


def _why(arguments: Arguments, root: Path | None) -> object:
    return api.why(_texts(arguments, "runs"), root=root)


def _logs(arguments: Arguments, root: Path | None) -> object:
    ranks, lines = _text(arguments, "ranks"), arguments.get("lines")
    choice = Choice(
        ranks=parse_ranks(ranks) if ranks else (),
        batch=arguments.get("batch") is True,
        failed=arguments.get("failed") is True,
        attempt=_text(arguments, "attempt"),
    )
    tail = min(lines if isinstance(lines, int) else _LINES, _MOST_LINES)
    return api.logs(str(arguments["run"]), choice, root=root).text(tail)


def _report(arguments: Arguments, root: Path | None) -> object:
    return api.report(str(arguments["run"]), root=root)


def _resubmit(arguments: Arguments, root: Path | None) -> object:
    run, overrides = str(arguments["run"]), _texts(arguments, "overrides")
    command = ["launcher", "mcp", "resubmit", run, *overrides]
    return api.resubmit(run, overrides, root=root, cluster=_text(arguments, "cluster"), command=command)


def _cancel(arguments: Arguments, root: Path | None) -> object:
    return api.cancel(_texts(arguments, "runs"), root=root)


TOOLS = (
    Tool(
        name="validate",
        about="Check a config. Returns every value and the layout, or all that is wrong with keys and valid values.",
        call=_validate,
        arguments=_CONFIG,
        required=("config",),
    ),
    Tool(
        name="plan",
        about="List the layouts of the config's model that fit on its GPUs, fastest first, with memory and cost.",
        call=_plan,
        arguments={
            **_CONFIG,
            "gpus": {**_TEXT, "description": "A number of GPUs, or a range A..B for A, 2A, 4A ... B."},
            "top": {"type": "integer", "minimum": 1, "description": "Layouts to list of each number."},
        },
        required=("config",),
        listed_as="sizes",
    ),
    Tool(
        name="explain",
        about="Tell what a config key, a section, an exit code or a cause means, and what a key may be set to.",
        call=_explain,
        arguments={"word": {**_TEXT, "description": "E.g. train.micro_batch_size, topology, 76, out_of_memory."}},
        required=("word",),
        listed_as="meanings",
    ),
    Tool(
        name="submit",
        about="Check a config, make its run directory and submit it as one job.",
        call=_submit,
        arguments={
            **_CONFIG,
            "accept_cost": {"type": "boolean", "description": "Submit above resources.gpu_hour_limit, too."},
            **_CONFIRM,
        },
        required=("config",),
        acts=True,
    ),
    Tool(
        name="status",
        about="State and progress of runs, by default of all.",
        call=_status,
        arguments=_RUNS,
        listed_as="runs",
    ),
    Tool(
        name="why",
        about="How each attempt of runs ended, what was decided, the first error, and what to set before the next try.",
        call=_why,
        arguments=_RUNS,
        required=("runs",),
        listed_as="runs",
    ),
    Tool(
        name="logs",
        about="The last lines of a run's logs: of rank 0, other ranks, the batch script, or the first that failed.",
        call=_logs,
        arguments={
            **_RUN,
            "failed": {"type": "boolean", "description": "The last words of the rank that failed first."},
            "batch": {"type": "boolean", "description": "The batch script's log: prepare, export, how ranks ended."},
            "ranks": {**_TEXT, "description": "For example 0,3-5."},
            "attempt": {**_TEXT, "description": "By default the newest."},
            "lines": {"type": "integer", "minimum": 1, "maximum": _MOST_LINES},
        },
        required=("run",),
    ),
    Tool(
        name="report",
        about="Write the run as one HTML page, RUN/report.html.",
        call=_report,
        arguments=_RUN,
        required=("run",),
        acts=True,
    ),
    Tool(
        name="resubmit",
        about="Go on with a run from its newest checkpoint; with overrides, as a child run with other settings.",
        call=_resubmit,
        arguments={**_RUN, "overrides": _CONFIG["overrides"], "cluster": _CONFIG["cluster"], **_CONFIRM},
        required=("run",),
        acts=True,
    ),
    Tool(
        name="cancel",
        about="Have runs stop with a checkpoint, and end their jobs.",
        call=_cancel,
        arguments={**_RUNS, **_CONFIRM},
        required=("runs",),
        acts=True,
    ),
)
"""Every tool. Those that act are refused unless the server was started with --allow-actions."""
