"""Commands for a cluster behind ssh, through a real sshd with the local scheduler on its far side."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import describe_source, read_manifest
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec
from launcher.submission import code_snapshot
from tests.launcher.conftest import CONFIG, FAKE_PYTHON, MODEL
from tests.slurm.processes import pids_with, wait_until
from tests.ssh_server import SshServer, close_connections, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

CHECKOUT = Path(__file__).parents[3]
CANARY = "-".join(["canary", "5b1f"])  # in one piece it would be in the code that is sent
NASTY = "$(touch pwned)`touch pwned`;touch pwned' \"\n* é"


class Site:
    """A laptop with cluster files, and a login node with a model, data and a directory for runs."""

    def __init__(self, root: Path, server: SshServer) -> None:
        self.server = server
        self.laptop = root / "laptop"
        self.directory = server.home / "it's $HOME"
        self.settings: dict[str, Any] = {
            "scheduler": "local",
            "host": "login",
            "host_directory": "~/it's $HOME",
            "host_python": str(root / "python"),
            "host_options": server.options,
            "runtime": {"python": str(root / "rank-python")},
        }
        for folder in (self.directory / "model", self.laptop, root / "run"):
            folder.mkdir(parents=True)
        (self.directory / "model" / "config.json").write_text(json.dumps(MODEL))
        (self.directory / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (self.laptop / "cfg.yaml").write_text(CONFIG)
        self.words = root / "words"
        wrapper = f'#!/bin/bash\nprintf "%s\\n" "$@" >>{self.words}\nexec {sys.executable} "$@"\n'
        ranks = f'#!/bin/bash\n[ "${{TOKEN-}}" != {CANARY} ] || echo the token is here\n{FAKE_PYTHON}'
        for name, text in (("python", wrapper), ("rank-python", ranks)):
            (root / name).write_text(text)
            (root / name).chmod(0o755)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SFT_", "XDG_"))}
        self.env |= {"HOME": str(self.laptop), "XDG_RUNTIME_DIR": str(root / "run"), "PYTHONPATH": str(CHECKOUT)}
        self.sockets = root / "run"
        self.write("far", {})
        (server.home / ".config").mkdir()
        there = self.cluster_file(server.home, "far")
        there.parent.mkdir(parents=True)
        there.write_text(yaml.safe_dump({name: self.settings[name] for name in ("scheduler", "runtime")}))

    def cluster_file(self, home: Path, name: str) -> Path:
        return home / ".config" / "slurm-sft-launcher" / "cluster_configs" / f"{name}.yaml"

    def write(self, name: str, changes: dict[str, Any]) -> None:
        """A cluster file on the laptop."""
        file = self.cluster_file(self.laptop, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(self.settings | changes))

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "launcher", *words]

    def __call__(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command typed on the laptop."""
        return self._run(words, self.laptop, {**self.env, **variables})

    def over_there(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The same typed on the login node."""
        return self._run(words, self.directory, {**self.env, **self.server.env})

    def _run(self, words: tuple[str, ...], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words),
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def submit(self, name: str, *words: str, **variables: str) -> RunPaths:
        done = self("submit", "cfg.yaml", f"name={name}", "--cluster", "far", *words, **variables)
        assert done.returncode == 0, done.stderr
        return RunPaths(self.directory / "runs" / name)

    def at_work(self) -> list[int]:
        """Processes on the login node that carry out a command."""
        found = []
        for pid in pids_with({"HOME": str(self.server.home)}):
            with contextlib.suppress(OSError):
                if b"launcher/arrived.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("ssh")
    (root / "server").mkdir()
    env = {"PATH": os.environ["PATH"], "SFT_SCHEDULER_CACHE_SECONDS": "0", "FAKE_TICKS": "1"}
    with SshServer(root / "server", env) as server:
        made = Site(root, server)
        made("status", "--cluster", "far")  # brings the code, and says so
        yield made
        close_connections(made.sockets)


def test_what_is_typed_here_is_as_if_typed_there(site: Site) -> None:
    """Output, errors and exit codes; the words have everything in them that a shell would act on."""
    (site.directory / "cfg.yaml").write_text(CONFIG)
    site.submit("same")
    assert site("wait", "same", "--timeout", "60").returncode == 0
    for words in (
        ["submit", "--dry-run", "cfg.yaml", "train.max_steps=7", "--cluster", "far"],
        ["validate", "cfg.yaml", "data.train=[missing.jsonl]", f"model.path={NASTY}", "--cluster", "far"],
        ["submit", "cfg.yaml", "name=same", "--cluster", "far"],
        ["status", "same"],
        ["list", "--json", "--cluster", "far"],
        ["logs", "same"],
        ["report", "same"],
        ["resubmit", "same"],
    ):
        here, there = site(*words), site.over_there(*words)
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr), words
    nobody = site("logs", NASTY, "--cluster", "far")
    assert (nobody.returncode, f"no run {NASTY!r} in {site.directory}/runs" in nobody.stderr) == (4, True)
    assert site("cluster", "check", "far").stdout == "cluster far: nothing is wrong\n"
    assert not list(site.laptop.rglob("pwned")) and not list(site.directory.rglob("pwned"))
    assert site.server.logins() == 1  # in all: whoever has to answer for it does so once


def test_the_run_has_the_code_and_the_history_of_this_checkout(site: Site) -> None:
    run = site.submit("code")
    for name in ("launcher/remote/deposit.py", "sft/commands/prepare.py", "templates/local.sh.j2", "setup.cfg"):
        assert zipfile.ZipFile(run.code).read(name) == (CHECKOUT / name).read_bytes()
    assert str(run.code).replace("'", "'\"'\"'") in run.script.read_text()
    assert list(read_manifest(run).source) == list(describe_source()[0])
    assert yaml.safe_load(run.config.read_text())["cluster"]["host"] is None


def test_small_files_of_the_config_are_sent_and_kept(site: Site) -> None:
    for name, text in (("chat.jinja", "{{ messages }}"), ("prompts.jsonl", '{"prompt": "a"}\n')):
        (site.laptop / name).write_text(text)
    run = site.submit("files", "data.chat_template=chat.jinja", "evaluation.prompts=prompts.jsonl")
    (site.laptop / "chat.jinja").write_text("changed")
    config = yaml.safe_load(run.config.read_text())
    assert Path(config["data"]["chat_template"]).read_text() == "{{ messages }}"
    assert Path(config["evaluation"]["prompts"]).read_text() == '{"prompt": "a"}\n'
    assert not (site.directory / "chat.jinja").exists()


def test_secrets_travel_by_stdin(site: Site) -> None:
    run = site.submit("secret", "env_from=[TOKEN]", TOKEN=CANARY)
    assert site("wait", "secret", "--timeout", "60").returncode == 0
    assert "the token is here" in run.rank_log("local-1", 0).read_text()
    assert CANARY not in site.words.read_text()
    holders = [path for path in site.server.home.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert holders == [] and not list(Path("/tmp").glob(f"slurm-sft-launcher-{os.getuid()}-request-*"))
    again = site("submit", "cfg.yaml", "name=secret2", "env_from=[TOKEN]", "--cluster", "far")
    assert (again.returncode, "TOKEN is not set in this shell" in again.stderr) == (ExitCode.BAD_INPUT, True)


def test_a_run_is_found_where_it_was_sent(site: Site) -> None:
    site.submit("known", "env_from=[TOKEN]", "train.max_steps=4", TOKEN=CANARY)
    assert site("wait", "known", "--timeout", "60").returncode == 0
    assert site("status", "known", "--json").stdout == site("status", "known", "--json", SFT_CLUSTER="far").stdout
    assert site("status", "unknown").stderr == site("status", "unknown", SFT_CLUSTER="local").stderr
    child = site("resubmit", "known", "train.max_steps=9", "name=child", "--json", TOKEN=CANARY)
    assert (child.returncode, child.stderr) == (0, "")
    assert json.loads(child.stdout)["directory"] == str(site.directory / "runs" / "child")
    assert site("wait", "known", "child", "--timeout", "60", SFT_CLUSTER="far").returncode == 0


@pytest.mark.parametrize("how", ["interrupt", "kill", "terminal"])
def test_the_far_end_of_logs_ends_with_the_near_one(site: Site, how: str) -> None:
    name = f"long-{how}"
    site.submit(name, "env_from=[FAKE_TICKS]", FAKE_TICKS="2000")
    words = site.command("logs", "-f", name, "--cluster", "far")
    if how == "terminal":
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(site.laptop)
            os.execve(words[0], words, site.env)
        seen = b""
        while b"train 0" not in seen:
            seen += os.read(terminal, 4096)
        os.write(terminal, b"\x03")
        with contextlib.suppress(OSError):  # EIO is a terminal's end
            while os.read(terminal, 4096):
                pass
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(terminal)
    else:
        with subprocess.Popen(
            words,
            cwd=site.laptop,
            env=site.env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            next(line for line in process.stdout if b"train 0" in line)
            assert len(site.at_work()) == 1
            if how == "interrupt":
                os.killpg(process.pid, signal.SIGINT)
            else:
                process.kill()
        code = process.returncode
    assert code == (-signal.SIGKILL if how == "kill" else ExitCode.INTERRUPTED)
    wait_until(lambda: not site.at_work(), "the command on the login node to end", timeout=30)
    assert site("cancel", name).returncode == 0


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"host": "-oProxyCommand=touch pwned"}, ExitCode.BAD_INPUT, "'-oProxyCommand=touch pwned' is not a host name"),
        ({"host_directory": None}, ExitCode.BAD_INPUT, "cluster.host_directory: missing"),
        (
            {"host_directory": "/no/where"},
            ExitCode.BAD_INPUT,
            "host_directory: /no/where is not a directory of",
        ),
        ({"host_python": "no-such-python"}, ExitCode.BAD_INPUT, "cluster.host_python: 'no-such-python' did not run on"),
        (
            {"host": "127.0.0.1", "host_options": ["-F", "none", "-p", "1"]},
            ExitCode.SCHEDULER,
            "ssh could not connect to",
        ),
    ],
)
def test_the_way_there_is_wrong(site: Site, changes: dict[str, Any], code: ExitCode, said: str) -> None:
    site.write("wrong", changes)
    done = site("validate", "cfg.yaml", "--cluster", "wrong")
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    assert not list(site.laptop.rglob("pwned"))


def test_runs_of_two_clusters_are_not_named_together(site: Site) -> None:
    site.write("second", {})
    site.submit("one")
    done = site("submit", "cfg.yaml", "name=two", "--cluster", "second")
    assert done.returncode == 0, done.stderr
    both = site("status", "one", "two")
    assert (both.returncode, "far and second" in both.stderr) == (ExitCode.BAD_INPUT, True)


def test_an_installed_launcher_travels_as_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages"
    for name in ("launcher/d.py", "launcher/templates/a.j2", "launcher/cluster_configs/b.yaml", "sft/c.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    monkeypatch.setattr(code_snapshot, "checkout_root", lambda: None)
    monkeypatch.setattr(code_snapshot, "__file__", str(package / "launcher" / "submission" / "code_snapshot.py"))
    found = sorted(code_snapshot.travelling_code(RunSpec()))
    assert found == ["cluster_configs/b.yaml", "launcher/d.py", "sft/c.py", "templates/a.j2"]
