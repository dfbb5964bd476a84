"""Which versions a run has, and which are refused."""

from __future__ import annotations

import configparser
import json
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract import versions
from launcher.contract.config.checks.run import spec_problems
from launcher.contract.errors import ConfigError
from launcher.contract.spec import RunSpec, RuntimeSpec
from launcher.contract.versions import (
    BOUNDS,
    check_versions,
    describe_versions,
    installed_versions,
    parse_version,
    ranks_versions,
    version_problems,
)

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("0.16.1", (0, 16, 1)),
        ("0.19.2+1a2b3c4", (0, 19, 2)),
        ("5", (5,)),
        ("2.9.0a0+git12", (2, 9)),
        ("unknown", ()),
    ],
)
def test_numbers_of_a_version(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


def test_versions_that_do_not_work() -> None:
    good = {"python": "3.12.1", "torch": "2.13.0+cu128", "megatron-core": "0.16.1", "transformers": "absent"}
    assert version_problems(good) == []
    found = version_problems({"python": "3.12.1", "torch": "2.7.1", "megatron-core": "0.99.0"})
    assert found[0].startswith("torch 2.7.1 is too old: matrix products of bf16")
    assert found[0].endswith("; install torch>=2.8")
    assert found[1].startswith("megatron-core 0.99.0 is newer than what is known to work; install megatron-core>=0.16")


@pytest.mark.parametrize(
    ("megatron", "triton", "problem"),
    [("0.16.1", "absent", False), ("0.19.2", "absent", True), ("0.19.2", "3.7", False)],
)
def test_newer_megatron_core_needs_triton(megatron: str, triton: str, problem: bool) -> None:
    found = version_problems({"megatron-core": megatron, "triton": triton})
    assert any("imports triton, which is absent" in text for text in found) is problem


def test_bounds_are_those_that_pip_keeps_to() -> None:
    settings = configparser.ConfigParser()
    settings.read(CHECKOUT / "setup.cfg")
    required = settings["options.extras_require"]["sft"].splitlines()
    for name, bounds in BOUNDS.items():
        wanted = f">={bounds.first}{f',<{bounds.before}' if bounds.before else ''}"
        if name == "python":
            assert settings["options"]["python_requires"] == wanted
        else:
            assert f"{name}{wanted}" in required


def test_this_python_is_described() -> None:
    text = describe_versions(installed_versions())
    assert text.startswith("python 3.")
    assert ", megatron-core " in text
    check_versions()


def test_the_ranks_python_is_asked_only_where_it_is_this_one() -> None:
    assert ranks_versions(RuntimeSpec()) == installed_versions()
    assert ranks_versions(RuntimeSpec(kind="venv", path="/env")) is None
    assert ranks_versions(RuntimeSpec(python="/other/python")) is None


def test_wrong_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed_versions", lambda: {"torch": "2.1.0"})
    with pytest.raises(ConfigError, match=r"torch 2\.1\.0 is too old: .*; install torch>=2\.8 \(in /"):
        check_versions()
    assert any("torch 2.1.0 is too old" in str(problem) for problem in spec_problems(RunSpec()))


def test_validate_says_the_versions(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml"]) == 0
    assert f"\nversions   {describe_versions(installed_versions())}\nvalid\n" in capsys.readouterr().out
    assert main(["validate", "cfg.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"] == installed_versions()
    assert main(["validate", "cfg.yaml", "cluster.runtime.python=/other/python"]) == 0
    assert "\nversions   those of the ranks' Python, which preflight checks\n" in capsys.readouterr().out
