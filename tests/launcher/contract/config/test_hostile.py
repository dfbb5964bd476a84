"""A config, a cluster file or a lockfile is data: nothing in it is run, and it reads no variable of the shell."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode

TAGS = ("!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system ''", "!!python/module:os ''")


@pytest.mark.parametrize("tag", TAGS)
def test_yaml_makes_no_objects(workdir: Path, capsys: pytest.CaptureFixture[str], tag: str) -> None:
    config = Path("cfg.yaml").read_text()
    Path("cfg.yaml").write_text(f"{config}env_from: {tag}\n")
    assert main(["validate", "cfg.yaml"]) == ExitCode.BAD_INPUT
    Path("cfg.yaml").write_text(config)
    assert main(["validate", "cfg.yaml", f"env_from={tag}"]) == ExitCode.BAD_INPUT
    Path("cluster_configs").mkdir()
    Path("cluster_configs/evil.yaml").write_text(f"scheduler: local\nenv_from: {tag}\n")
    assert main(["validate", "cfg.yaml", "--cluster", "evil"]) == ExitCode.BAD_INPUT
    Path("run.lock.yaml").write_text(f"{config}lock: {tag}\n")
    assert main(["validate", "run.lock.yaml"]) == ExitCode.BAD_INPUT
    assert not Path("ran").exists()
    assert "a bug" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["${oc.env:A_TOKEN}", "${env:A_TOKEN}", "$A_TOKEN", "{{ env.A_TOKEN }}"])
def test_a_value_reads_no_secret_of_the_environment(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Or a shared config could have a secret of whoever submits it written into the run directory."""
    monkeypatch.setenv("A_TOKEN", "correct-horse")
    config = Path("cfg.yaml")
    config.write_text(config.read_text().replace("seq_length: 128", f"seq_length: 128, cache_dir: '/c/{text}'"))
    for words in (["validate", "cfg.yaml", "--json"], ["submit", "cfg.yaml", "--dry-run"]):
        main(words)
        shown = capsys.readouterr()
        assert "A_TOKEN" in shown.out + shown.err
        assert "correct-horse" not in shown.out + shown.err


def test_of_thousands_of_unknown_keys_some_are_told(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of 60,000 took a minute, and printed as many lines."""
    path = workdir / "cfg.yaml"
    path.write_text(path.read_text() + "".join(f"key{number}: 1\n" for number in range(2000)))
    assert main(["validate", "cfg.yaml"]) == ExitCode.BAD_INPUT
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 51
    assert told[-1] == "cfg.yaml:1: the document has 1,950 more unknown keys; is this the config of a run?"


@pytest.mark.parametrize("line", ["key{}: 1\n", '"key{}":1,\n', "k{}: {{k{}: 1}}\n"])
@pytest.mark.parametrize("command", ["validate", "submit"])
def test_a_data_file_is_no_config_and_not_read_as_yaml(
    workdir: Path, capsys: pytest.CaptureFixture[str], line: str, command: str
) -> None:
    """60,000 keys were walked for ten seconds, twice."""
    path = workdir / "cfg.yaml"
    path.write_text(path.read_text() + "".join(line.format(number, number) for number in range(30_000)) + "sweep: {}\n")
    begin = time.process_time()
    assert main([command, "cfg.yaml"]) == ExitCode.BAD_INPUT
    assert time.process_time() - begin < 2
    assert "keys, and at most 10,000 are read; is this the config of a run?" in capsys.readouterr().err
