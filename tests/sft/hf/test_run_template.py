"""The template that a run's data were written with is that of its export."""

from __future__ import annotations

from pathlib import Path

from launcher.contract.named_templates import named_template
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import DataSpec, RunSpec
from sft.hf.run_template import record_template, recorded_template


def test_a_template_that_is_edited_after_training_is_not_that_of_the_export(tmp_path: Path) -> None:
    """Seen to be."""
    file, paths = tmp_path / "own.jinja", RunPaths(tmp_path)
    spec = RunSpec(data=DataSpec(chat_template=str(file)))
    file.write_bytes(b"as trained\r\n")
    record_template(paths, spec)
    file.write_bytes(b"edited")
    assert recorded_template(paths, spec) == b"as trained\r\n"
    file.unlink()
    assert recorded_template(paths, spec) == b"as trained\r\n"


def test_templates_that_are_no_files(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    named = RunSpec(data=DataSpec(chat_template="chatml"))
    assert recorded_template(paths, named) == named_template("chatml").encode()  # of an earlier version's run
    record_template(paths, named)
    assert paths.chat_template.read_text() == named_template("chatml")
    record_template(paths, RunSpec())
    assert recorded_template(paths, RunSpec()) is None
