"""The curves of a report, out of the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.rundir import JsonObject
from launcher.views.svg import Point, Series, line_chart

_BLUE, _ORANGE, _GREEN, _PURPLE = "#2f6fde", "#e07b28", "#2a9d66", "#8a56c8"
_OTHERS = ("#c2415d", "#4f9da6", "#7a7a2e", "#555")  # of further held-out data sets

_UNITS = {
    "loss": "nats per trained token",
    "tokens/s": "tokens per second, all ranks together",
    "gradient norm": "norm before clipping",
    "MFU": "fraction of the GPUs' peak FLOP/s",
}
"""Title of a chart -> the unit of its values, where they have one that the title does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A picture and the curves in it, which its legend names."""

    title: str
    svg: str
    series: Sequence[Series]


@dataclass(frozen=True, slots=True)
class _Curve:
    """One curve to draw, if metrics have values for it."""

    key: str
    """Its name in metrics.jsonl."""
    name: str
    colour: str
    dots: bool = False


def charts(metrics: Sequence[JsonObject], resumed: Sequence[float]) -> list[Chart]:
    """Return a chart for every quantity that the metrics have, with a mark at each step where training resumed."""
    sets = sorted({key for line in metrics for key in line if key.startswith("eval_loss/")})
    others = [_Curve(key, key.partition("/")[2], colour, dots=True) for key, colour in zip(sets, _OTHERS, strict=False)]
    wanted = {
        "loss": [_Curve("loss", "training", _BLUE), _Curve("eval_loss", "held-out", _ORANGE, dots=True), *others],
        "learning rate": [_Curve("lr", "learning rate", _PURPLE)],
        "tokens/s": [_Curve("tokens_per_second", "tokens/s", _GREEN)],
        "gradient norm": [_Curve("grad_norm", "gradient norm", _BLUE)],
        "MFU": [_Curve("mfu", "MFU", _GREEN)],
        "largest load over the mean": [
            _Curve("router/expert_load", "experts", _BLUE),
            _Curve("router/rank_load", "ranks", _ORANGE),
        ],
        "routers": [
            _Curve("router/entropy", "entropy, 1 if even", _GREEN),
            _Curve("router/aux_loss", "loss for even loads", _PURPLE),
        ],
        "experts without tokens": [_Curve("router/dead_experts", "experts", _BLUE)],
        "largest router logit": [_Curve("router/max_logit", "logit", _ORANGE)],
    }
    drawn = []
    for title, curves in wanted.items():
        series = [Series(curve.name, _points(metrics, curve.key), curve.colour, curve.dots) for curve in curves]
        series = [one for one in series if one.points]
        if series:
            svg = line_chart(series, unit=_UNITS.get(title, ""), marks=resumed)
            drawn.append(Chart(title=title, svg=svg, series=series))
    return drawn


def _points(metrics: Sequence[JsonObject], key: str) -> list[Point]:
    return [
        (float(line["step"]), float(line[key]))
        for line in metrics
        if isinstance(line.get(key), (int, float)) and isinstance(line.get("step"), int)
    ]
