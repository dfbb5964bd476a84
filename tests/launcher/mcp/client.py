"""A real MCP client over stdio: what an agent has, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

CHECKOUT = Path(__file__).parents[3]
_Result = TypeVar("_Result")


class Refused(Exception):
    """An error that a tool answered with."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("\n".join(answer["problems"]))
        self.keys: list[str] = answer["keys"]
        self.exit_code: int = answer["exit_code"]


class Agent:
    """Calls tools. The client itself holds each answer to the tool's schema."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.said: list[str] = []
        """Every answer as text."""

    async def __call__(self, tool: str, **arguments: Any) -> dict[str, Any]:
        result = await self._client.call_tool(tool, arguments)
        (content,) = result.content
        self.said.append(content.text)  # type: ignore[union-attr]
        answer: dict[str, Any] = result.structured_content
        assert json.loads(self.said[-1]) == answer
        if result.is_error:
            raise Refused(answer)
        return answer

    async def tools(self) -> dict[str, Any]:
        return {tool.name: tool for tool in (await self._client.list_tools()).tools}

    async def state(self, run: str) -> dict[str, Any]:
        """The run's row once it has ended."""
        deadline = time.monotonic() + 90
        while True:
            (row,) = (await self("status", runs=[run]))["runs"]
            if row["state"] in ("COMPLETED", "FAILED", "INTERRUPTED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"):
                return dict(row)
            assert time.monotonic() < deadline, row
            await asyncio.sleep(0.1)

    async def why(self, run: str) -> dict[str, Any]:
        (told,) = (await self("why", runs=[run]))["runs"]
        return dict(told)


def as_agent(act: Callable[[Agent], Awaitable[_Result]], *options: str, **variables: str) -> _Result:
    """Return what `act` returns with a server in the current directory, started with `options` and our PATH."""
    kept = ("PATH", "HOME", "SFT_SCHEDULER_CACHE_SECONDS", "OMP_NUM_THREADS", "SLURM_CONF")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "launcher", "mcp", *options],
        env={**environment, "PYTHONPATH": str(CHECKOUT), **variables},
        cwd=Path.cwd(),
    )

    async def run() -> _Result:
        with Path("server.log").open("w") as log:
            async with Client(stdio_client(server, log)) as client:
                return await act(Agent(client))

    return asyncio.run(run())
