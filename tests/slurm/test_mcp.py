"""A bad node, repaired with the tools of `launcher mcp` alone on a real Slurm; the others are in tests/launcher/mcp."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mcp", reason="the extra mcp is not installed")

from tests.launcher.mcp.client import Agent, as_agent
from tests.slurm.cluster import SlurmCluster
from tests.slurm.matrix import TWO_RANKS
from tests.slurm.runs import make_workbench
from tests.slurm.test_faults import PYTHON_WITH_A_BAD_NODE

pytestmark = [pytest.mark.slurm, pytest.mark.slow]  # two attempts with preflight; test_faults has the fault itself


def test_bad_node(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_workbench(tmp_path / "bench", slurm)
    python = tmp_path / "python"
    python.write_text(PYTHON_WITH_A_BAD_NODE)
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, {**os.environ, **slurm.env}[name])
    look = ("preflight.enabled=auto", "preflight.min_shm_mib=64", "preflight.timeout_seconds=240")
    words = [*TWO_RANKS, *look, "restart.how=none", f"cluster.runtime.python={python}", "name=bad", "train.max_steps=4"]

    async def act(agent: Agent) -> dict[str, Any]:
        await agent("submit", config=str(bench.config), overrides=words, confirm=True)
        assert (await agent.state("bad"))["exit_code"] == 77
        told = await agent.why("bad")
        assert told["decisions"][-1]["cause"] == "bad_node"
        (found,) = told["remedies"]
        assert found["key"] == "resources.exclude"
        child = await agent("resubmit", run="bad", overrides=[f"{found['key']}={found['value']}"], confirm=True)
        return await agent.state(child["run"])

    row = as_agent(act, "--allow-actions", f"--run-root={bench.root / 'runs'}", XDG_STATE_HOME=str(tmp_path / "state"))
    assert row["state"] == "COMPLETED"
