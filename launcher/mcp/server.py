"""The server: the tools over standard input and output, through the package `mcp`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jsonschema
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.stdio import stdio_server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    ToolAnnotations,
)
from mcp_types import Tool as ToolForm

from launcher import __version__
from launcher.contract.config.reference import key_reference
from launcher.contract.errors import ConfigError, LauncherError
from launcher.contract.exit_codes import ExitCode
from launcher.mcp.redact import redacted
from launcher.mcp.tools import TOOLS, Tool

_ABOUT = (
    "Fine-tunes language models on a cluster from one YAML file. `validate` a config before `submit`. Where a run "
    "failed, ask `why`: it has the cause, the first error and `remedies`, keys with values to hand to `resubmit` as "
    "KEY=VALUE overrides. `explain` tells what a key means. An error names its config keys in `keys`."
)
_KEY = re.compile(r"\b[a-z_]+(?:\.[A-Za-z_]\w*)+|\b[a-z_]{3,}\b")


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What one server may do."""

    root: Path | None = None
    """Where runs are; by default as for commands."""
    may_act: bool = False
    """Whether tools may make and end jobs, and write files."""

    def tools(self) -> list[ToolForm]:
        """Return the tools as clients see them, those that act only where they may."""
        return [
            ToolForm(
                name=tool.name,
                description=tool.about,
                input_schema=tool.input_schema,
                output_schema=tool.output_schema,
                annotations=ToolAnnotations(read_only_hint=not tool.acts, destructive_hint=tool.name == "cancel"),
            )
            for tool in TOOLS
            if self.may_act or not tool.acts
        ]

    def call(self, name: str, arguments: Mapping[str, object]) -> CallToolResult:
        """Call a tool and return its answer, or its error as an answer that says what to change."""
        try:
            tool = self._tool(name)
            problems = list(jsonschema.Draft202012Validator(tool.input_schema).iter_errors(dict(arguments)))
            if problems:
                raise ConfigError([_argument_problem(problem) for problem in problems])
            return _result(tool.answer(arguments, self.root))
        except LauncherError as error:
            return _result(_error(error), is_error=True)
        except OSError as error:
            return _result(_error(LauncherError(str(error))), is_error=True)

    def _tool(self, name: str) -> Tool:
        tool = next((tool for tool in TOOLS if tool.name == name), None)
        if tool is None:
            raise ConfigError(f"no tool {name!r}; there are: {', '.join(tool.name for tool in TOOLS)}")
        if tool.acts and not self.may_act:
            raise ConfigError(f"{name}: this server only reads; a person can start it with --allow-actions")
        return tool


def _argument_problem(problem: jsonschema.ValidationError) -> str:
    where = ".".join(map(str, problem.path))
    return f"argument {where}: {problem.message}" if where else f"arguments: {problem.message}"


def _error(error: LauncherError) -> dict[str, object]:
    """Return an error with the config keys that it names, and whether the same call may succeed later."""
    problems = list(error.problems) if isinstance(error, ConfigError) else [str(error)]
    known = {row.key for row in key_reference()}
    named = dict.fromkeys(word for problem in problems for word in _KEY.findall(problem) if word in known)
    return {
        "problems": problems,
        "keys": list(named),
        "exit_code": int(error.exit_code),
        "meaning": ExitCode(error.exit_code).meaning,
    }


def _result(answer: object, *, is_error: bool = False) -> CallToolResult:
    clean = redacted(answer)
    text = json.dumps(clean, ensure_ascii=False)
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=clean, is_error=is_error)


def serve(desk: Desk) -> None:
    """Answer a client on standard input and output until it goes away."""

    async def list_tools(_: ServerRequestContext, params: PaginatedRequestParams | None) -> ListToolsResult:
        return ListToolsResult(tools=desk.tools())

    async def call_tool(_: ServerRequestContext, params: CallToolRequestParams) -> CallToolResult:
        return await asyncio.to_thread(desk.call, params.name, params.arguments or {})

    async def run() -> None:
        server: Server = Server(
            "slurm-sft-launcher",
            version=__version__,
            instructions=_ABOUT,
            on_list_tools=list_tools,
            on_call_tool=call_tool,
        )
        async with stdio_server() as (received, sent):
            await server.run(received, sent, server.create_initialization_options())

    asyncio.run(run())
