"""The command line itself: start-up, help, errors, completion."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import launcher
from launcher.__main__ import main
from launcher.commands.arguments import print_json
from launcher.contract.exit_codes import ExitCode

CHECKOUT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "pytorch_lightning", "megatron", "numpy", "safetensors"}


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded once `code` has run in a fresh interpreter."""
    tell = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", tell], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_no_module_of_the_launcher_imports_torch() -> None:
    root = Path(launcher.__file__).parent
    modules = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py") if path.stem != "__init__"]
    names = [".".join(("launcher", *module.parts)) for module in modules]
    assert "launcher.submission.render_script" in names
    assert not modules_after("\n".join(f"import {name}" for name in names)) & HEAVY


def test_status_starts_light() -> None:
    assert not modules_after("import launcher.__main__, launcher.runs.state") & {"omegaconf", "jinja2", "submitit"}
    assert not modules_after("import launcher.__main__") & {"yaml", "subprocess", "dataclasses"}


def test_ranks_need_only_yaml_of_the_contract() -> None:
    names = ("errors", "exit_codes", "spec", "topology", "rundir")
    contract = "\n".join(f"import launcher.contract.{name}" for name in names)
    assert not modules_after(contract) & {"omegaconf", "jinja2", "submitit", "argparse"}


def test_help_tells_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    codes = [line.split()[0] for line in capsys.readouterr().out.partition("exit codes:")[2].splitlines() if line]
    assert [int(code) for code in codes if code.isdigit()] == [code.value for code in ExitCode]


def test_errors_are_one_block_and_debug_shows_more(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml", "foo", "bar"]) == ExitCode.BAD_INPUT
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (
        "",
        "error: override 'foo': expected key=value\noverride 'bar': expected key=value\n",
    )
    for words in (["--debug", "validate"], ["validate", "--debug"]):
        with pytest.raises(Exception, match="expected key=value"):
            main([*words, "cfg.yaml", "foo"])


def test_unforeseen_faults_and_interruption(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("launcher.submission.submission.make_submission", fail)
    assert main(["validate", "cfg.yaml"]) == ExitCode.FAILURE
    assert capsys.readouterr().err == "error: ZeroDivisionError: oh (a bug; --debug shows the traceback)\n"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.submission.submission.make_submission", interrupt)
    assert main(["validate", "cfg.yaml"]) == ExitCode.INTERRUPTED


def test_words_after_options(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml", "train.seed=1", "--cluster", "slurm-dev", "train.max_steps=9"]) == 0
    out = capsys.readouterr().out
    assert "train.seed " in out
    assert "train.max_steps " in out
    for words in (["validate", "cfg.yaml", "--nope"], ["logs", "a", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == ExitCode.BAD_INPUT


def test_reader_that_goes_away(workdir: Path) -> None:
    command = f"{sys.executable} -m launcher reference | head -n 1; exit ${{PIPESTATUS[0]}}"
    environment = {"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "# Config reference\n", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "resubmit" in script
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_no_runs_yet(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().err == f"no runs in {workdir}/runs\n"
    assert main(["status", "--json"]) == 0
    assert capsys.readouterr().out == "[]\n"
    assert main(["status", "first"]) == ExitCode.CONFLICT


def test_config_on_standard_input(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(Path("cfg.yaml").read_text()))
    assert main(["validate", "-", "train.max_steps=9"]) == 0
    assert capsys.readouterr().out.endswith("valid\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("name: a\nnode: 3\n"))
    assert main(["validate", "-"]) == ExitCode.BAD_INPUT
    assert "-:2: unknown key 'node'" in capsys.readouterr().err


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": float("nan"), "deep": [(float("inf"), 1.5)], "text": "NaN"})
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert shown == {"loss": None, "deep": [[None, 1.5]], "text": "NaN"}


def test_deleted_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f"cd {folder} && rmdir {folder} && exec {sys.executable} -m launcher status"
    environment = {"PYTHONPATH": str(CHECKOUT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == ExitCode.BAD_INPUT
    assert done.stderr == "error: the working directory was deleted; change to one that exists\n"


def test_no_home_directory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a container under a number that no user has."""
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert main(["status"]) == ExitCode.BAD_INPUT
    assert (
        capsys.readouterr().err == "error: this user has no home directory here; set HOME to a folder that is yours\n"
    )


def test_completion_of_runs_keys_clusters_and_states(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a real bash, which looks for runs by itself."""
    for file in ("runs/alpha/manifest.json", "runs/.groups/swept.json", "runs/not-a-run/x"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    assert main(["completion", "bash"]) == 0
    Path("completion.sh").write_text(capsys.readouterr().out)

    def offered(*words: str) -> set[str]:
        program = (
            'source ./completion.sh; COMP_WORDS=(launcher "$@"); COMP_CWORD=$#; _shtab_launcher\n'
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert {"alpha", "swept"} <= offered("status", "")
    assert "not-a-run" not in offered("status", "")
    assert offered("logs", "al") == {"alpha"}
    assert offered("resubmit", "alpha", "train.see") == {"train.seed="}
    assert "local" in offered("submit", "cfg.yaml", "--cluster", "")
    assert offered("status", "--state", "runn") == {"running"}
