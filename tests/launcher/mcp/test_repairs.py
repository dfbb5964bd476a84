"""Failures that were seeded, each repaired with the tools alone: what to set is taken from the tools' answers.

The bad node, which needs nodes, is in tests/slurm/test_mcp.py, with failures of a real training.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="the extra mcp is not installed")

from tests.launcher.conftest import Commands
from tests.launcher.mcp.client import Agent, Refused, as_agent

RANKS = Path(__file__).parent / "seeded_rank.py"


@pytest.fixture
def python(workdir: Path, commands: Commands) -> str:
    """The override of a Python in which ranks are tests/launcher/mcp/seeded_rank.py, and all else is real."""
    body = f"""
[ "$2" = sft ] || exec {sys.executable} "$@"
[ "$3" = train ] || exit 0
exec {sys.executable} {RANKS} "$4"
"""
    return f"cluster.runtime.python={commands.add('seeded-python', body)}"


async def refused(agent: Agent, *overrides: str) -> Refused:
    """What validate says is wrong."""
    with pytest.raises(Refused) as caught:
        await agent("validate", config="cfg.yaml", overrides=list(overrides))
    return caught.value


async def submitted(agent: Agent, *overrides: str) -> dict[str, Any]:
    """The run's row at its end."""
    await agent("submit", config="cfg.yaml", overrides=list(overrides), confirm=True)
    return await agent.state("first")


async def remedy(agent: Agent, run: str, cause: str) -> str:
    """The first remedy with a value that `why` names, as an override; the cause must be as expected."""
    told = await agent.why(run)
    assert told["decisions"][-1]["cause"] == cause, told
    found = [f"{remedy['key']}={remedy['value']}" for remedy in told["remedies"] if remedy["value"] is not None]
    return found[0]


async def repaired(agent: Agent, run: str, *overrides: str) -> None:
    """Go on with other settings, which must now succeed."""
    child = await agent("resubmit", run=run, overrides=list(overrides), confirm=True)
    assert (await agent.state(child["run"]))["state"] == "COMPLETED"


def test_bad_topology(python: str) -> None:
    async def act(agent: Agent) -> dict[str, Any]:
        problem = await refused(agent, python, "topology.tensor_parallel=3")
        assert "topology.tensor_parallel" in problem.keys
        valid = re.search(r"topology\.tensor_parallel 3 .* valid here: ([\d, ]+)", str(problem))
        assert valid is not None
        return await submitted(agent, python, f"topology.tensor_parallel={valid[1].split(', ')[0]}")

    assert as_agent(act, "--allow-actions")["state"] == "COMPLETED"


@pytest.mark.slow  # a server and a run of its own; out_of_memory stands for it
def test_missing_file(python: str) -> None:
    Path("chat.jsonl").write_text(Path("a.jsonl").read_text())

    async def act(agent: Agent) -> dict[str, Any]:
        problem = await refused(agent, python, "data.train=[chats.jsonl]")
        assert problem.keys == ["data.train"]
        near = re.search(r"did you mean '?([^'\s]+)'?\?", str(problem))
        assert near is not None, str(problem)
        return await submitted(agent, python, f"data.train=[{near[1]}]")

    assert as_agent(act, "--allow-actions")["state"] == "COMPLETED"


def test_wrong_column(python: str) -> None:
    Path("a.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "4"}) + "\n")

    async def act(agent: Agent) -> dict[str, Any]:
        problem = await refused(agent, python)
        assert problem.keys == ["data.columns"]
        found = re.search(r"no format fits the keys '(\w+)', '(\w+)'; a row needs (\w+) and (\w+);", str(problem))
        assert found is not None, str(problem)
        first, second, prompt, completion = found.groups()
        return await submitted(agent, python, f"data.columns={{{prompt}: {first}, {completion}: {second}}}")

    assert as_agent(act, "--allow-actions")["state"] == "COMPLETED"


def test_out_of_memory(python: str) -> None:
    async def act(agent: Agent) -> None:
        row = await submitted(agent, python, "train.micro_batch_size=2", "restart.how=none")
        assert row["state"] == "FAILED"
        assert "CUDA out of memory" in (await agent("logs", run="first", failed=True))["text"]
        await repaired(agent, "first", await remedy(agent, "first", "out_of_memory"))

    as_agent(act, "--allow-actions")


@pytest.mark.slow  # a server and a run of its own; out_of_memory stands for it
def test_code_error(python: str) -> None:
    Path("asked.json").write_text('{"prompt": "a"}\n')
    words = [python, "evaluation.metric=my.metrics:score", "evaluation.prompts=asked.json", "train.eval_every=1"]

    async def act(agent: Agent) -> None:
        await submitted(agent, *words)
        told = await agent.why("first")
        assert told["decisions"][-1]["cause"] == "user_code"
        key, _, said = told["error"]["message"].partition(": ")
        assert said == "my.metrics:score raised ZeroDivisionError: division by zero"
        (meaning,) = (await agent("explain", word=key))["meanings"]
        assert meaning["default"] == "unset"
        await repaired(agent, "first", f"{key}=null")

    as_agent(act, "--allow-actions")


@pytest.mark.slow  # a server and a run of its own; out_of_memory stands for it
def test_full_disk(python: str) -> None:
    async def act(agent: Agent) -> None:
        await submitted(agent, python, "checkpoint.keep_last=9")
        await repaired(agent, "first", await remedy(agent, "first", "disk_full"))

    as_agent(act, "--allow-actions")


@pytest.mark.slow  # a server and a run of its own; out_of_memory stands for it
def test_expired_time(python: str) -> None:
    async def act(agent: Agent) -> None:
        row = await submitted(agent, python, "resources.time=0:03:00")
        assert row["exit_code"] == 75
        await repaired(agent, "first", await remedy(agent, "first", "timeout"))

    as_agent(act, "--allow-actions")


def test_wrong_account(python: str, commands: Commands) -> None:
    """sbatch refuses as the real one does; sacctmgr names the user's own accounts."""
    refusal = "Batch job submission failed: Invalid account or account/partition combination specified"
    commands.add("srun", "")
    commands.add("sinfo", "")
    commands.add("squeue", "")
    commands.add("sacctmgr", "echo physics; echo chemistry")
    commands.add(
        "sbatch",
        f'file="${{@: -1}}"; grep -q -e "--account=chemistry" "$file" && echo 7 && exit 0\n'
        f'echo "sbatch: error: {refusal}" >&2; exit 1',
    )

    async def act(agent: Agent) -> dict[str, Any]:
        call: dict[str, Any] = {"config": "cfg.yaml", "cluster": "slurm-dev", "confirm": True}
        with pytest.raises(Refused, match="Invalid account") as caught:
            await agent("submit", overrides=[python, "resources.account=physic"], **call)
        key, _, values = str(caught.value).rpartition("set ")[2].partition(" to one of ")
        assert (key, caught.value.keys, caught.value.exit_code) == ("resources.account", ["resources.account"], 3)
        return await agent("submit", overrides=[python, f"{key}={values.split(', ')[0]}"], **call)

    assert as_agent(act, "--allow-actions")["job"] == "7"


@pytest.mark.slow  # a server and a run of its own; out_of_memory stands for it
def test_damaged_checkpoint(python: str) -> None:
    async def act(agent: Agent) -> None:
        await submitted(agent, python)
        newest = Path("runs/first/checkpoints/step-00000002")
        (newest / "damaged").touch()
        child = await agent("resubmit", run="first", overrides=["train.max_steps=9"], confirm=True)
        assert (await agent.state(child["run"]))["state"] == "FAILED"
        told = await agent.why(child["run"])
        assert str(newest) in told["error"]["message"]
        (found,) = told["remedies"]
        assert found["value"].endswith("/first/checkpoints/step-00000001")
        await repaired(agent, child["run"], f"{found['key']}={found['value']}")

    as_agent(act, "--allow-actions")
