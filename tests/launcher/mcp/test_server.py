"""launcher mcp, by a real client: what it offers, what it refuses, and what it never says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("mcp", reason="the extra mcp is not installed")

from launcher.__main__ import main
from launcher.mcp.redact import redacted
from tests.launcher.mcp.client import Agent, Refused, as_agent

SECRET = "correct horse battery"


def test_it_only_reads_by_default(workdir: Path, fake_python: str) -> None:
    async def act(agent: Agent) -> tuple[set[str], list[str]]:
        refused = []
        calls: dict[str, dict[str, Any]] = {
            "submit": {"config": "cfg.yaml", "confirm": True},
            "resubmit": {"run": "first", "confirm": True},
            "cancel": {"runs": ["first"], "confirm": True},
            "report": {"run": "first"},
        }
        for tool, arguments in calls.items():
            with pytest.raises(Refused, match="this server only reads") as caught:
                await agent(tool, **arguments)
            refused.append(str(caught.value))
        return set(await agent.tools()), refused

    tools, refused = as_agent(act)
    assert tools == {"validate", "plan", "explain", "status", "why", "logs"}
    assert len(refused) == 4
    assert not Path("runs").exists()


def test_nothing_is_submitted_without_confirm(workdir: Path, fake_python: str) -> None:
    async def act(agent: Agent) -> dict[str, Any]:
        for given in ({}, {"confirm": False}, {"confirm": "yes"}):
            with pytest.raises(Refused, match="confirm"):
                await agent("submit", config="cfg.yaml", overrides=[fake_python], **given)
        with pytest.raises(Refused, match="confirm"):
            await agent("cancel", runs=["first"])
        assert not Path("runs").exists()
        with pytest.raises(Refused, match="'sudo' was unexpected"):
            await agent("submit", config="cfg.yaml", confirm=True, sudo=True)
        await agent("submit", config="cfg.yaml", overrides=[fake_python], confirm=True)
        row = await agent.state("first")
        assert (await agent("report", run="first"))["file"].endswith("/first/report.html")
        tools = await agent.tools()
        assert tools["status"].annotations.read_only_hint
        assert not tools["submit"].annotations.read_only_hint
        return row

    assert as_agent(act, "--allow-actions")["state"] == "COMPLETED"


def test_answers_have_the_schemas_of_the_commands(workdir: Path) -> None:
    async def act(agent: Agent) -> None:
        for name, tool in (await agent.tools()).items():
            for schema in (tool.input_schema, tool.output_schema):
                jsonschema.Draft202012Validator.check_schema(schema)
                assert schema["type"] == "object", name
        assert (await agent("validate", config="cfg.yaml"))["topology"]["pipeline_parallel"] == 2
        (meaning,) = (await agent("explain", word="train.micro_batch_size"))["meanings"]
        assert meaning["value"] == "an integer, at least 1"
        assert (await agent("status"))["runs"] == []
        with pytest.raises(Refused, match=r"did you mean 'train\.max_steps'") as caught:
            await agent("explain", word="train.max_step")
        assert caught.value.exit_code == 2
        with pytest.raises(Refused, match="no tool"):
            await agent("rm")

    as_agent(act)


def test_a_secret_is_in_no_answer(workdir: Path, commands: Any, fake_python: str) -> None:
    """Not even where a program that runs in the job writes it into its log and into its error."""
    python = commands.add("talking-python", 'echo "token is $MY_TOKEN at https://me:pw12@host/x"; exit 3')
    words = [f"cluster.runtime.python={python}", "env_from=[MY_TOKEN]", "notify.webhook_env=MY_WEBHOOK"]

    async def act(agent: Agent) -> list[str]:
        await agent("submit", config="cfg.yaml", overrides=words, confirm=True)
        await agent.state("first")
        await agent("validate", config="cfg.yaml", overrides=words)
        for choice in ({"batch": True}, {"failed": True}, {}):
            await agent("logs", run="first", **choice)
        await agent.why("first")
        with pytest.raises(Refused):
            await agent("explain", word=SECRET)
        return agent.said

    said = as_agent(act, "--allow-actions", MY_TOKEN=SECRET, MY_WEBHOOK="https://hooks.example/T0K3N")
    everything = "\n".join(said)
    assert "token is <MY_TOKEN> at https://<password>@host/x" in everything
    assert SECRET not in everything
    assert "pw12" not in everything
    assert "T0K3N" not in everything


def test_tokens_of_known_forms_are_redacted() -> None:
    texts = ["hf_" + "a" * 20, "ghp_" + "B" * 30, "sk-" + "c" * 40, "AKIA" + "D" * 16]
    assert redacted({"a": [f"it is {text}." for text in texts]}) == {"a": ["it is <token>."] * 4}
    assert redacted("step-00000010 of hf_home, task-1") == "step-00000010 of hf_home, task-1"


def test_without_the_package_the_command_says_what_to_install(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["mcp"]) == 2
    assert "pip install 'slurm-sft-launcher[mcp]'" in capsys.readouterr().err
