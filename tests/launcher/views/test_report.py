"""The HTML page of a run: complete, self-contained, everything escaped."""

from __future__ import annotations

import html.parser
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.__main__ import main
from launcher.contract.manifest import read_manifest, write_manifest
from launcher.contract.rundir import COMPLETE, RunPaths, append_event, append_line, write_json
from launcher.contract.spec import RunSpec, TrainSpec, to_yaml
from launcher.views.report import write_report
from launcher.views.svg import Series, line_chart, ticks
from launcher.views.timeline import bars
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import ended, make_run, started

EVIL = "<script>alert('x')</script>&\"'"


@pytest.fixture
def run(tmp_path: Path, commands: Commands) -> RunPaths:
    """A child run that was preempted once and resumed."""
    FakeSlurm(commands).submit("child", first=7)
    parent = make_run(tmp_path / "runs", "parent")
    parent.config.write_text(to_yaml(RunSpec(name="parent", train=TrainSpec(max_steps=10))))
    paths = make_run(tmp_path / "runs", "child")
    write_manifest(paths, _with_parent(paths, parent))
    paths.config.write_text(to_yaml(RunSpec(name="child", train=TrainSpec(max_steps=20, seed=7))))
    for attempt, first, code in (("7.0", 0, 75), ("7.1", 5, None)):
        started(paths, attempt)
        append_event(paths, "training_started", attempt=attempt, step=first, max_steps=20)
        append_event(paths, "restart_decided", attempt=attempt, cause=EVIL)
        if code is not None:
            ended(paths, code, attempt)
    for step in range(1, 11):
        line = {"step": step, "loss": 3.0 / step, "grad_norm": 1.0, "lr": 1e-5, "tokens_per_second": 100.0}
        append_line(paths.metrics, line | ({"grad_norm": math.nan} if step == 3 else {}))
    for step, loss in ((0, 3.5), (10, 1.25)):
        append_line(paths.metrics, {"step": step, "eval_loss": loss, f"eval_loss/{EVIL}": loss})
    write_json(paths.progress, {"step": 10, "max_steps": 20, "loss": 0.3})
    paths.checkpoint(5).mkdir(parents=True)
    (paths.checkpoint(5) / COMPLETE).write_text("x" * 2048)
    return paths


def _with_parent(paths: RunPaths, parent: RunPaths):  # type: ignore[no-untyped-def]
    import dataclasses

    return dataclasses.replace(read_manifest(paths), parent_run=str(parent.root), submitter=EVIL)


class _Page(html.parser.HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(value) for name, value in attributes if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.handmade_records
def test_page_holds_everything_and_asks_for_nothing(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "report", str(run.root)]) == 0
    assert capsys.readouterr().out.strip() == str(run.root / "report.html")
    text = (run.root / "report.html").read_text()
    page = _Page(text)
    shown = " ".join(" ".join(page.words).split())
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert page.tags.count("svg") == 4
    for words in (
        "PENDING",
        "held-out loss 3.5000 → 1.2500",
        "Config against its parent parent",
        "train.max_steps 10 20",
        "train.seed 1234 7",
        "exit code 75",
        "no end recorded",
        "step-00000005 2 KiB",
        "tp2 = 2 ranks",
        "restart decided",
    ):
        assert words in shown, words


@pytest.mark.handmade_records
def test_curves_of_experts(run: RunPaths) -> None:
    """Only of models that have some: the page above has none of them."""
    names = ("expert_load", "rank_load", "entropy", "aux_loss", "dead_experts", "max_logit")
    for step in (11, 12):
        append_line(run.metrics, {"step": step, "loss": 1.0} | {f"router/{name}": step * 1.5 for name in names})
    write_report(run, run.root / "report.html")
    page = _Page((run.root / "report.html").read_text())
    assert page.tags.count("svg") == 4 + 4
    shown = " ".join(" ".join(page.words).split())
    for words in ("largest load over the mean experts ranks", "entropy, 1 if even", "largest router logit"):
        assert words in shown, words


@pytest.mark.handmade_records
def test_text_stays_text(run: RunPaths) -> None:
    write_report(run, run.root / "report.html")
    text = (run.root / "report.html").read_text()
    assert EVIL in "".join(_Page(text).words)
    assert "<script" not in text


def test_run_that_has_not_started(tmp_path: Path, commands: Commands) -> None:
    FakeSlurm(commands)
    paths = make_run(tmp_path, "young")
    paths.config.write_text(to_yaml(RunSpec(name="young")))
    write_report(paths, tmp_path / "page.html")
    assert "none has started" in (tmp_path / "page.html").read_text()


@pytest.mark.handmade_records
def test_unwritable_target_is_said(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    (run.root / "file").touch()
    assert main(["report", str(run.root), "--output", str(run.root / "file" / "page.html")]) == 4
    assert "page.html cannot be written: " in capsys.readouterr().err


_NUMBER = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.tuples(st.integers(0, 10**6).map(float), _NUMBER), max_size=30))
def test_any_numbers_make_a_chart(points: list[tuple[float, float]]) -> None:
    text = line_chart([Series("a", points, "red")], marks=[5.0])
    assert text.startswith("<svg ") == any(abs(y) < 1e30 for _, y in points)
    assert "nan" not in text
    assert "inf" not in text


def test_long_curves_are_thinned_and_keep_their_end() -> None:
    text = line_chart([Series("a", [(float(step), float(step)) for step in range(10_001)], "red")])
    places = text.split('polyline points="')[1].split('"')[0].split()
    assert 500 < len(places) <= 801
    assert places[-1] == "548.0,24.0"  # the upper right corner


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (1, 1, [1.0, 1.02]),
        (1e-9, 5e-9, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9]),
        (-3, 4, [-4, -2, 0, 2, 4]),
        (0, 0, [0.0, 0.02]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def attempt_event(name: str, attempt: str, moment: float, **fields: object) -> dict[str, object]:
    return {"time": moment, "event": name, "attempt": attempt, **fields}


def test_attempts_show_the_steps_they_trained_and_why_they_ended() -> None:
    """With keep_best the export is of step 200, which the attempt that exports it has not trained."""
    events = [
        attempt_event("attempt_started", "7.0", 10.0, host="n1", nodes="n[1-2]"),
        attempt_event("training_started", "7.0", 11.0, step=0),
        attempt_event("checkpoint_saved", "7.0", 12.0, step=200),
        attempt_event("stop_requested", "7.0", 13.0, step=445),
        attempt_event(
            "restart_decided", "7.0", 14.0, cause="node_failure", detail="n2 is gone", decision="requeue", step=445
        ),
        attempt_event("attempt_ended", "7.0", 15.0, exit_code=75),
        attempt_event("attempt_started", "7.1", 20.0, host="n3", nodes=""),
        attempt_event("training_started", "7.1", 21.0, step=445),
        attempt_event("training_finished", "7.1", 22.0, step=600),
        attempt_event("exported", "7.1", 23.0, step=200),
        attempt_event("attempt_started", "8.0", 30.0, host="n4"),
        attempt_event("attempt_ended", "8.0", 31.0, exit_code=1, detail="module load cuda failed"),
        attempt_event("attempt_started", "9.0", 40.0, host="n4"),
        attempt_event("training_started", "9.0", 41.0, step=600),
    ]
    shown = [(bar.attempt, bar.steps, bar.nodes, bar.why) for bar in bars(events, 0.0, 607)]
    assert shown == [
        ("7.0", "0 to 445", "n[1-2]", "node failure: n2 is gone → requeue"),
        ("7.1", "445 to 600", "n3", ""),
        ("8.0", "-", "n4", "module load cuda failed"),
        ("9.0", "600 to 607", "n4", ""),  # under way: by the last step that was logged
    ]


def test_axes_have_units_and_labels_of_their_own() -> None:
    chart = line_chart([Series("lr", [(1.0, 0.0), (10.0, 2e-5)], "red")], unit="learning rate")
    assert ">step</text>" in chart
    assert ">learning rate</text>" in chart
    assert ">1.5e-05</text>" in chart
