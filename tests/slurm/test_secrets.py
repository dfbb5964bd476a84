"""A canary: a secret reaches every rank, and nothing else that a run leaves behind or shows while it is at work."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import make_workbench

pytestmark = pytest.mark.slurm

MARK = f"hf_{secrets.token_hex(8)}"
CANARY = f"{MARK}'$(id)"

PYTHON = """\
#!/bin/bash
printf %s "$HF_TOKEN" | sha256sum >>"$(dirname "$0")/seen-$3"
[ "$3" != train ] || until [ -e "$(dirname "$0")/go-on" ]; do sleep 0.1; done
"""


def test_canary(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    bench = make_workbench(tmp_path / "bench", slurm)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    private = tmp_path / "private"
    run = bench.submit(
        "canary", f"cluster.runtime.python={python}", "env_from=[HF_TOKEN]", f"cluster.secrets_dir={private}"
    )
    ranks = tmp_path / "seen-train"
    wait_until(lambda: ranks.exists() and len(ranks.read_text().splitlines()) == 4, "four ranks", timeout=120)
    digest = hashlib.sha256(CANARY.encode()).hexdigest()
    assert {line.split()[0] for line in ranks.read_text().splitlines()} == {digest}
    job = bench.status(run)["job"]
    shown = slurm.run(["scontrol", "show", "job", "-dd", job]).stdout
    script = slurm.run(["scontrol", "write", "batch_script", job, "-"]).stdout
    assert f"JobId={job}" in shown
    assert CANARY not in shown + script + "".join(command_lines())
    assert [path.parent for path in holders(tmp_path)] == [private]
    assert holders(slurm.root) == []  # spool and state: what Slurm keeps of a job
    (tmp_path / "go-on").touch()
    bench.wait_for_state(run, "COMPLETED")
    assert holders(tmp_path) == holders(slurm.root) == []
    assert (tmp_path / "seen-export").exists()


def holders(folder: Path) -> list[Path]:
    """Files that hold the secret, as it is or as a shell quotes it."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and MARK.encode() in path.read_bytes():
            found.append(path)
    return found


def command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_text(errors="replace")
        except OSError:
            continue
