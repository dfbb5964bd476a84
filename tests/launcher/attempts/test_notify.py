"""Notifications at the end of an attempt: what they say, and that failing ones neither harm the run nor leak."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.attempts import notify
from launcher.contract.config.checks import spec_problems
from launcher.contract.rundir import RunPaths, write_json
from launcher.contract.spec import NotifySpec, RunSpec, to_yaml
from tests.launcher.conftest import Commands


@dataclass
class Hook:
    """A web server that keeps what is posted to it."""

    address: str
    posted: list[dict[str, Any]] = field(default_factory=list)
    code: int = 204


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            kept.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(kept.code)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    kept = Hook(f"http://127.0.0.1:{server.server_port}/secret-path")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("HOOK", kept.address)
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "demo")
    paths.root.mkdir()
    write_json(paths.progress, {"step": 5, "max_steps": 9, "loss": 1.5, "checkpoint": "step-00000005"})
    return paths


def tell(paths: RunPaths, exit_code: int, **settings: Any) -> None:
    paths.config.write_text(to_yaml(RunSpec(name="demo", notify=NotifySpec(**settings))))
    assert notify.main([str(paths.root), "--attempt", "7.0", "--exit-code", str(exit_code)]) == 0


def test_webhook(run: RunPaths, hook: Hook) -> None:
    tell(run, 1, webhook_env="HOOK")
    (message,) = hook.posted
    assert message["text"] == "run demo failed at step 5 of 9 with exit code 1 (attempt 7.0)"
    assert (message["run"], message["exit_code"], message["loss"]) == ("demo", 1, 1.5)
    assert (message["checkpoint"], message["directory"]) == ("step-00000005", str(run.root))


def test_outcomes(run: RunPaths, hook: Hook) -> None:
    for code in (0, 75, 76):
        tell(run, code, webhook_env="HOOK")
    tell(run, 0, webhook_env="HOOK", on="failure")
    assert [message["outcome"] for message in hook.posted] == ["completed", "interrupted", "failed"]


def test_email_and_command(run: RunPaths, commands: Commands) -> None:
    commands.add("sendmail", f"cat >{commands.folder}/letter")
    commands.add("tell-me", f"cat >{commands.folder}/object")
    tell(run, 0, email="me@example.org", command=["tell-me", "$(touch canary)", "; b"])
    letter = (commands.folder / "letter").read_text()
    assert "Subject: run demo completed at step 5 of 9 (attempt 7.0)\n" in letter
    assert "To: me@example.org\n" in letter
    assert commands.calls("sendmail") == ["-i -- me@example.org"]
    assert commands.calls("tell-me") == ["$(touch canary) ; b"]
    assert json.loads((commands.folder / "object").read_text())["outcome"] == "completed"
    assert not list(run.root.rglob("canary"))


def test_what_does_not_work_is_said_and_the_rest_is_sent(
    run: RunPaths, hook: Hook, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    hook.code = 403
    commands.add("broken", "exit 3")
    commands.add("sendmail", f"cat >{commands.folder}/letter")
    tell(run, 1, webhook_env="HOOK", command=["broken"], email="me@example.org")
    assert capsys.readouterr().err.splitlines() == [
        "no notification by webhook HOOK: HTTP 403",
        "no notification by command broken: exit code 3",
    ]
    assert (commands.folder / "letter").exists()


@pytest.mark.parametrize(
    "address", ["", "file:///etc/passwd", "http://127.0.0.1:1/secret", "http://se cret\x7f/", "https://"]
)
def test_addresses_that_do_not_work_are_not_printed(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], address: str
) -> None:
    monkeypatch.setenv("HOOK", address)
    tell(run, 1, webhook_env="HOOK")
    said = capsys.readouterr().err
    assert said.startswith("no notification by webhook HOOK: ")
    assert not address or address not in said
    assert "secret" not in said
    assert "passwd" not in said


def test_unreadable_run_does_not_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notify.main([str(tmp_path), "--attempt", "1.0", "--exit-code", "1"]) == 0
    assert capsys.readouterr().err.startswith("no notification: ")


def test_settings_are_checked() -> None:
    spec = RunSpec(notify=NotifySpec(email="-oQ/tmp me@x", webhook_env="https://hooks"))
    problems = dict(spec_problems(spec))
    assert {"notify.email", "notify.webhook_env"} <= problems.keys()
    assert RunSpec(notify=NotifySpec(webhook_env="HOOK")).secret_names == ("HOOK",)
