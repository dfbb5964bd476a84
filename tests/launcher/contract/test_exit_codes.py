"""Exit codes are written down once; pages and docstrings that show them agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract import errors
from launcher.contract.exit_codes import ExitCode, exit_code_reference


def test_page_is_up_to_date() -> None:
    """Renew it with `python -m launcher reference exit-codes > docs/exit-codes.md`."""
    assert (Path(__file__).parents[3] / "docs" / "exit-codes.md").read_text() == exit_code_reference()


def test_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reference", "exit-codes"]) == 0
    assert capsys.readouterr().out == exit_code_reference()


def test_help_says_what_each_means(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert all(f"{code.value}  {code.meaning}" in lines for code in ExitCode)


def test_codes_are_found_by_number() -> None:
    assert ExitCode(75) is ExitCode.REQUEUE == 75


def test_tree_of_errors_is_true() -> None:
    drawn = re.findall(r"^(?:\W*\+-- )?(\w+Error) +exit +(\d+)", errors.__doc__ or "", re.MULTILINE)
    assert {name for name, _ in drawn} == {name for name in vars(errors) if name.endswith("Error")}
    for name, code in drawn:
        assert getattr(errors, name).exit_code == int(code)
