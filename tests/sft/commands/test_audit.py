"""The audit: numbers of the caches, roles and examples of a sample, one safe HTML file, and limits that refuse."""

from __future__ import annotations

import dataclasses
import html.parser
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from launcher.contract.errors import ConfigError, DataError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import DataSpec, LoggingSpec, ModelSpec, RunSpec, to_yaml
from sft.__main__ import main
from sft.commands.audit import audit, coloured, read_config
from sft.data.audit import audit as measures
from sft.data.audit.audit import Sample, Segment, audit_data, summary
from sft.data.audit.html import write_report
from sft.data.prepared.data_sets import training_sets
from tests.hub_server import serve
from tests.tiny_model import make_chat_rows, make_tiny_model, make_tokenizer, write_jsonl

EVIL = '<script>alert(1)</script>\x1b[31m & "quotes"'


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def spec_of(tmp_path: Path, rows: list[dict[str, Any]], **data: Any) -> RunSpec:
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    values = {"train": [str(train)], "cache_dir": str(tmp_path / "cache"), "workers": 1, **data}
    return RunSpec(name="looked-at", data=DataSpec(**values), logging=LoggingSpec(progress_bar=False))


def row(*contents: str, **weights: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    turns[-1].update(weights)
    return {"messages": turns}


def test_numbers_are_those_of_the_caches(tmp_path: Path, tokenizer_dir: Path) -> None:
    rows = make_chat_rows(30, 1)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [*make_chat_rows(5, 2), rows[3], rows[3]])
    spec = spec_of(tmp_path, [*rows, rows[0], rows[1]], validation=[str(held_out)])
    train, validation = audit_data(spec, tokenizer_dir)
    assert (train.duplicates, validation.duplicates) == (2, 1)
    assert (train.held_out_in_train, validation.held_out_in_train) == (0, 2)
    assert 0.5 < train.packing <= 1.0
    assert train.cache.counts.answers == train.cache.counts.terminators
    text = "\n".join(summary(validation))
    counts = validation.cache.counts
    assert f"{counts.answers} of {counts.answers} answers end with a trained end token" in text
    assert "leaked: 2 held-out examples" in text


def test_roles_and_weights_of_the_sample(tmp_path: Path, tokenizer_dir: Path) -> None:
    (found,) = audit_data(spec_of(tmp_path, [row("hi", "yo"), row("who?", "me", weight=0.5)]), tokenizer_dir)
    assert set(found.roles) == {"user", "assistant"}
    assert found.roles["user"][1] == 0
    assert found.roles["assistant"][1] == found.cache.counts.supervised_tokens
    assert sum(tokens for tokens, _ in found.roles.values()) == found.cache.counts.tokens
    first, second = found.samples
    assert [(s.role, s.weight, s.text) for s in first.segments] == [
        ("user", 0.0, "<|im_start|>user\nhi<|im_end|>\n"),
        ("assistant", 0.0, "<|im_start|>assistant\n"),
        ("assistant", 1.0, "yo<|im_end|>\n"),
    ]
    assert second.segments[-1].weight == 0.5
    assert second.where == f"{tmp_path}/train.jsonl:2"


@pytest.mark.parametrize(
    ("line", "options", "roles"),
    [
        ({"text": "hello"}, {}, {"prompt", "trained"}),
        ({"prompt": "a", "completion": "b"}, {"chat_template": "none"}, {"prompt", "trained"}),
        ({"prompt": "a", "completion": "b"}, {}, {"user", "assistant"}),
        ({"input_ids": [5, 6, 2], "labels": [-100, 6, 2]}, {}, {"prompt", "trained"}),
    ],
)
def test_every_format_can_be_looked_at(
    tmp_path: Path, tokenizer_dir: Path, line: dict[str, Any], options: dict[str, Any], roles: set[str]
) -> None:
    (found,) = audit_data(spec_of(tmp_path, [line] * 3, **options), tokenizer_dir)
    assert set(found.roles) == roles
    assert found.duplicates == 2


def test_the_sample_is_spread_over_the_files_and_always_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "SAMPLED_ROWS", 10)
    rows = [{"text": f"{n:04}"} for n in range(1000)]
    data = spec_of(tmp_path, rows).data
    picked = [int(str(example.text)) for example in measures._sampled(training_sets(data)[0])]
    assert 10 <= len(picked) <= 11
    assert np.diff(picked).min() > 50
    table = tmp_path / "a.csv"
    table.write_text("text\n" + "".join(f"{n:04}\n" for n in range(1000)))
    data = dataclasses.replace(data, train=[str(table)])
    again = [measures._sampled(training_sets(data)[0]) for _ in range(2)]
    assert again[0] == again[1]
    assert len(again[0]) == 10
    assert max(int(str(example.text)) for example in again[0]) > 500


class Page(html.parser.HTMLParser):
    """Tags of a page, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_runs_and_fetches_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to fail with one text left unescaped."""
    spec = spec_of(tmp_path, [row(EVIL, EVIL), row("hi", "yo", weight=0.5)])
    page = tmp_path / "page.html"
    write_report(audit_data(spec, tokenizer_dir), dataclasses.replace(spec, name="a&b"), page)
    text = page.read_text(encoding="utf-8")
    parser = Page()
    parser.feed(text)
    assert parser.open == []
    assert "script" not in parser.tags
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\u241b[31m &amp; &quot;quotes&quot;" in text
    assert '<mark class="part" title="weight 0.5">yo&lt;|im_end|&gt;\u21b5' in text
    assert [path.name for path in tmp_path.glob("*page*")] == ["page.html"]


def test_the_terminal_gets_no_control_characters() -> None:
    """Seen to fail with the text as it is."""
    sample = Sample("a.jsonl:1", 2, 1, (Segment("user", 0.0, EVIL), Segment("assistant", 1.0, "yo\x07")))
    plain = coloured([sample], colours=False)
    assert plain == 'a.jsonl:1:\n<script>alert(1)</script>\\x1b[31m & "quotes"[[yo\\x07]]'
    assert coloured([sample], colours=True).endswith("\x1b[32myo\\x07\x1b[0m")


def written_config(tmp_path: Path, **data: Any) -> Path:
    model = make_tiny_model(tmp_path / "model", layers=1)
    train = write_jsonl(tmp_path / "train.jsonl", make_chat_rows(20, 1))
    config = tmp_path / "cfg.yaml"
    values = {"train": [str(train)], "cache_dir": str(tmp_path / "cache"), **data}
    config.write_text(
        yaml.safe_dump({"name": "a", "model": {"path": str(model)}, "data": values, "train": {"max_steps": 1}})
    )
    return config


def test_a_users_config_is_audited_and_the_report_is_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written_config(tmp_path)
    assert main(["audit", str(config)]) == ExitCode.OK
    printed = capsys.readouterr().out
    assert "train: 20 examples" in printed
    assert "[[" in printed
    assert f"report: {tmp_path}/cfg.audit.html" in printed
    assert (tmp_path / "cfg.audit.html").is_file()


def test_a_runs_config_is_audited_too(tmp_path: Path) -> None:
    spec = RunSpec(name="r", model=ModelSpec(path="/m"), data=DataSpec(train=["/d"]))
    (tmp_path / "config.yaml").write_text(to_yaml(spec))
    assert read_config(tmp_path / "config.yaml") == spec
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read_config(tmp_path / "absent.yaml")


def test_limits_refuse_once_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail (no report to look at) with the limit checked where the cache is opened."""
    config = written_config(tmp_path, seq_length=40, max_lost_percent=1.0)
    report = tmp_path / "elsewhere.html"
    assert main(["audit", str(config), "--output", str(report)]) == ExitCode.BAD_INPUT
    assert "data.max_lost_percent 1 allows no more" in capsys.readouterr().err
    assert report.is_file()
    config = written_config(tmp_path, seq_length=512, ignore_keys=["contxt"])
    assert main(["audit", str(config)]) == ExitCode.BAD_INPUT
    assert "data.ignore_keys: no row has a key 'contxt'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"cannot be written: .*; name another file with --output"):
        audit(config, tmp_path / "no" / "folder.html")


def test_data_without_terminators_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    template = tmp_path / "no-end.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match="would never learn to stop"):
        audit_data(spec_of(tmp_path, make_chat_rows(3, 1), chat_template=str(template)), tokenizer_dir)


def test_data_and_model_of_the_hub_are_looked_at_without_the_weights(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)
    model = make_tiny_model(tmp_path / "model")
    rows = write_jsonl(tmp_path / "train.jsonl", make_chat_rows(8, 1))
    Path("cfg.yaml").write_text(
        "name: x\nmodel: {path: org/model}\ndata: {train: ['org/rows:train']}\ntrain: {max_steps: 1}\n"
    )
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.model("org/model", {path.name: path.read_bytes() for path in model.iterdir()})
        hub.data_set("org/rows", {"train.jsonl": rows.read_bytes()})
        assert main(["audit", "cfg.yaml"]) == 0
        assert "model.safetensors" not in hub.fetched()
    assert "train: 8 examples" in capsys.readouterr().out


def test_a_disk_without_room_for_the_cache_ends_with_the_code_of_a_disk(tmp_path: Path) -> None:
    """It was 1, which is for bugs, with a traceback."""
    config, errors = written_config(tmp_path), tmp_path / "errors"
    errors.touch()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.stderr = errors.open("a", encoding="utf-8")
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, resource.RLIM_INFINITY))
            code = main(["audit", str(config)])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ExitCode.IO_ERROR
    assert errors.read_text().startswith("error: [Errno 27] File too large")
    assert "Traceback" not in errors.read_text()
