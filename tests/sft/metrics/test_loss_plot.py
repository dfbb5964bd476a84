"""The loss curve's picture: what is drawn, also of a run without held-out losses or without any step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from launcher.contract.rundir import RunPaths, append_line
from sft.metrics.loss_plot import plot_loss

TRAINING = [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
HELD_OUT = [{"step": 2, "eval_loss": 2.5}]


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([*TRAINING, *HELD_OUT], {"training": ((1, 2, 3), (3.0, 2.0, 1.0)), "held-out": ((2,), (2.5,))}),
        (TRAINING, {"training": ((1, 2, 3), (3.0, 2.0, 1.0))}),
        ([], {}),
    ],
)
def test_curves(
    records: list[dict[str, float]], expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.touch()
    for record in records:
        append_line(paths.metrics, record)
    drawn = {}
    plot = Axes.plot

    def spy(axes: Axes, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        drawn[kwargs["label"]] = (x, y)
        return plot(axes, x, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    plot_loss(paths)
    assert drawn == expected
    assert paths.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.glob("*.png")] == [paths.loss_plot.name]
