"""A new path-valued key is one annotated line: everything that treats files finds it by its annotation."""

from __future__ import annotations

import dataclasses
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest

from launcher.contract.config.checks import file_problems, spec_problems
from launcher.contract.config.reference import _value
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, DataSpec, ModelSpec, RunSpec, RuntimeSpec, SourceSpec
from launcher.contract.spec.fields import path_fields, with_absolute_paths
from launcher.contract.spec.paths import ExistingFile, Files
from launcher.contract.spec.rules import FUNCTION, SHELL_VARIABLE
from launcher.contract.topology import build_topology
from launcher.remote.hand_over import sent_paths
from launcher.submission.code_snapshot import take_snapshot
from launcher.submission.lockfile import fingerprints
from launcher.submission.render_script import render


@dataclass(frozen=True, kw_only=True, slots=True)
class WiderData(DataSpec):
    """The section with more keys."""

    glossary: Annotated[str | None, ExistingFile()] = None
    dictionaries: Annotated[dict[str, str], Files()] = field(default_factory=dict)
    clean: Annotated[str | None, FUNCTION] = None
    password_env: Annotated[str | None, SHELL_VARIABLE] = None


def wider_run(glossary: str, **dictionaries: str) -> RunSpec:
    runtime = RuntimeSpec(kind="apptainer", image="a.sif")
    data = WiderData(glossary=glossary, dictionaries=dictionaries, train=["rows/*.jsonl"])
    return RunSpec(name="wide", data=data, cluster=ClusterSpec(runtime=runtime))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("words/glossary.txt", "lists/a.txt", "lists/b.txt", "rows/2.jsonl", "rows/1.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_made_absolute(folder: Path) -> None:
    data = with_absolute_paths(wider_run("words/../words/glossary.txt", short="lists/*.txt")).data
    assert isinstance(data, WiderData)
    assert data.glossary == f"{folder}/words/glossary.txt"
    assert data.dictionaries == {"short": f"{folder}/lists/*.txt"}
    assert data.train == [f"{folder}/rows/1.jsonl", f"{folder}/rows/2.jsonl"]


def test_checked(folder: Path) -> None:
    assert list(file_problems(with_absolute_paths(wider_run("words/glossary.txt", short="lists/a.txt")))) == []
    misspelled = with_absolute_paths(wider_run("words/glosary.txt", short="lists/a.text"))
    assert list(file_problems(misspelled)) == [
        ("data.glossary", f"{folder}/words/glosary.txt is not a file; did you mean 'glossary.txt'?"),
        ("data.dictionaries", f"short: no file matches {folder}/lists/a.text; did you mean 'a.txt'?"),
    ]
    wrong = with_absolute_paths(wider_run("words", short="lists/c*"))
    assert list(file_problems(wrong)) == [
        ("data.glossary", f"{folder}/words is not a file"),
        ("data.dictionaries", f"short: no file matches {folder}/lists/c*"),
    ]


def test_hashed(folder: Path) -> None:
    files = fingerprints(with_absolute_paths(wider_run("words/glossary.txt", short="lists/*.txt")))
    assert list(files["data.glossary"]) == [f"{folder}/words/glossary.txt"]
    assert list(files["data.dictionaries"]) == [f"{folder}/lists/a.txt", f"{folder}/lists/b.txt"]


def test_mounted(folder: Path) -> None:
    spec = with_absolute_paths(wider_run("words/glossary.txt", short="lists/*.txt"))
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, max_steps=1))
    script = render(spec, build_topology(spec, None), RunPaths(folder / "runs" / "wide"), "/usr/bin/python3")
    assert f"--bind {folder}/words:{folder}/words" in script
    assert f"--bind {folder}/lists:{folder}/lists" in script


def test_sent(folder: Path) -> None:
    """As it is written: paths of a config for another machine are that machine's, but for those that are here."""
    assert sent_paths(wider_run("words/glossary.txt", short="lists/*.txt")) == ["words/glossary.txt"]


def test_documented() -> None:
    assert _value(WiderData, "glossary") == "a string: an existing file"
    assert _value(WiderData, "dictionaries") == "a mapping of names to strings, each an existing file or a glob"


def test_code_and_secrets_are_found_the_same_way(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "cleaning.py").write_text("def strip(text): return text")
    monkeypatch.syspath_prepend(folder)
    spec = RunSpec(data=WiderData(clean="cleaning:strip", password_env="DATA_PASSWORD"), env_from=["HF_TOKEN"])
    assert spec.secret_names == ("HF_TOKEN", "DATA_PASSWORD")
    take_snapshot(spec, folder / "code.zip")
    assert zipfile.ZipFile(folder / "code.zip").read("cleaning.py") == (folder / "cleaning.py").read_bytes()
    wrong = dataclasses.replace(spec, cluster=ClusterSpec(env={"DATA_PASSWORD": "x"}))
    assert ("data.password_env", "DATA_PASSWORD is set by cluster.env; drop one") in set(spec_problems(wrong))


def test_words_are_no_paths() -> None:
    spec = RunSpec(after="before", model=ModelSpec(path="package:name/file"), data=DataSpec(chat_template="none"))
    assert with_absolute_paths(spec) == dataclasses.replace(spec, run_root=str(Path("runs").absolute()))
    assert {field.key for field in path_fields(spec)} == {"run_root", "model.path"}


def test_keys_of_named_sections() -> None:
    spec = RunSpec(data=DataSpec(sources={"chat": SourceSpec(files=["/a", "/b"])}))
    found = [(field.key, field.mapped_by, field.path) for field in path_fields(spec) if field.mapped_by]
    assert found == [("data.sources.chat.files", "data.sources", path) for path in ("/a", "/b")]
