"""`launcher report RUN`: everything a run has written about itself, as one HTML page without scripts or the network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract import resources
from launcher.contract.errors import RunStateError
from launcher.contract.manifest import Manifest, read_manifest
from launcher.contract.rundir import RunPaths, read_lines, write_atomic
from launcher.contract.spec import RunSpec, read_resolved
from launcher.runs.state import collect
from launcher.views.svg import Series, line_chart
from launcher.views.table import duration

_TEMPLATE = "report.html.j2"
_MOST_EVENTS = 500
_BLUE, _ORANGE, _GREEN, _PURPLE = "#2f6fde", "#e07b28", "#2a9d66", "#8a56c8"
_OTHERS = ("#c2415d", "#4f9da6", "#7a7a2e", "#555")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An attempt on the timeline; left and width are percents of the time from submission to now."""

    attempt: str
    host: str
    began: str
    lasted: str
    steps: str
    ended: str
    good: bool | None
    left: float
    width: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A picture and what its curves are."""

    title: str
    svg: str
    series: Sequence[Series]


def write_report(paths: RunPaths, target: Path) -> None:
    """Write the run's page to `target`, whole or not at all."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in resources.search_path("templates")]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,  # names, configs and events are text, whatever they hold
        trim_blocks=True,
        lstrip_blocks=True,
    )
    resources.find("templates", _TEMPLATE)
    page = environment.get_template(_TEMPLATE).render(**_facts(paths))
    try:
        write_atomic(target, page)
    except OSError as error:
        raise RunStateError(f"{target} cannot be written: {error.strerror}") from None


def _facts(paths: RunPaths) -> dict[str, Any]:
    manifest, spec = read_manifest(paths), read_resolved(paths.config)
    events, metrics = list(read_lines(paths.events)), list(read_lines(paths.metrics))
    (status,), _ = collect([paths])
    against, changes = _changes(spec, manifest)
    return {
        "run": paths,
        "status": status,
        "manifest": manifest,
        "made": _when(time.time()),
        "created": _when(manifest.created_at),
        "tiles": _tiles(status, metrics),
        "charts": _charts(metrics, _resumed_at(events)),
        "bars": _bars(events, manifest.created_at),
        "topology": [(name.replace("_", " "), value) for name, value in manifest.topology.items() if name != "summary"],
        "against": against,
        "changes": changes,
        "checkpoints": [(path.name, _size(path)) for path in paths.complete_checkpoints()],
        "events": [_event(event) for event in events[-_MOST_EVENTS:]],
        "hidden_events": max(0, len(events) - _MOST_EVENTS),
    }


def _tiles(status: Any, metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The numbers at the top."""
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    tiles = [
        ("step", None if status.step is None else f"{status.step:,} of {status.max_steps:,}"),
        ("loss", None if status.loss is None else f"{status.loss:.4f}"),
        ("held-out loss", f"{held_out[0]:.4f} → {held_out[-1]:.4f}" if held_out else None),
        ("tokens/s", None if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}"),
        ("MFU", None if status.mfu is None else f"{status.mfu:.1%}"),
        ("ETA", None if status.eta_seconds is None else duration(status.eta_seconds)),
        ("checkpoint", status.checkpoint),
    ]
    return [(name, value) for name, value in tiles if value is not None]


def _charts(metrics: Sequence[dict[str, Any]], resumed: Sequence[float]) -> list[Chart]:
    names = sorted({name for line in metrics for name in line if name.startswith("eval_loss/")})
    plans = [
        ("loss", [("loss", "training", _BLUE, False), ("eval_loss", "held-out", _ORANGE, True)]),
        ("learning rate", [("lr", "learning rate", _PURPLE, False)]),
        ("tokens/s", [("tokens_per_second", "tokens/s", _GREEN, False)]),
        ("gradient norm", [("grad_norm", "gradient norm", _BLUE, False)]),
        ("MFU", [("mfu", "MFU", _GREEN, False)]),
    ]
    plans[0][1].extend(
        (name, name.partition("/")[2], colour, True) for name, colour in zip(names, _OTHERS, strict=False)
    )
    charts = []
    for title, curves in plans:
        series = [Series(shown, _points(metrics, name), colour, dots) for name, shown, colour, dots in curves]
        series = [one for one in series if one.points]
        if series:
            charts.append(Chart(title=title, svg=line_chart(series, marks=resumed), series=series))
    return charts


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [
        (float(line["step"]), float(line[name]))
        for line in metrics
        if isinstance(line.get(name), (int, float)) and isinstance(line.get("step"), int)
    ]


def _resumed_at(events: Sequence[dict[str, Any]]) -> list[float]:
    """Steps after which a later attempt went on."""
    return [float(event["step"]) for event in events if event.get("event") == "training_started" and event.get("step")]


def _bars(events: Sequence[dict[str, Any]], created_at: float) -> list[Bar]:
    """The attempts in time."""
    last = max([created_at, *(event["time"] for event in events)])
    span = max(last - created_at, 1.0)
    bars = []
    for name in dict.fromkeys(str(event["attempt"]) for event in events if event.get("event") == "attempt_started"):
        own = [event for event in events if str(event.get("attempt")) == name]
        end = next((event for event in reversed(own) if event.get("event") == "attempt_ended"), None)
        began, until = own[0]["time"], (end or own[-1])["time"]
        code = end.get("exit_code") if end else None
        steps = [event["step"] for event in own if "step" in event]
        bars.append(
            Bar(
                attempt=name,
                host=str(own[0].get("host", "")),
                began=_when(began),
                lasted=duration(until - began),
                steps=f"{min(steps):,} to {max(steps):,}" if steps else "-",
                ended="no word of its end" if end is None else f"exit code {code}",
                good=None if end is None else code in (0, 75),
                left=round(100 * max(0.0, began - created_at) / span, 2),
                width=round(max(0.6, 100 * (until - began) / span), 2),
            )
        )
    return bars


def _changes(spec: RunSpec, manifest: Manifest) -> tuple[str, list[tuple[str, str, str]]]:
    """What the config is compared with, and key, value there and value here of what differs."""
    base, against = RunSpec(), "the defaults"
    if manifest.parent_run is not None and (config := RunPaths(Path(manifest.parent_run)).config).is_file():
        base, against = read_resolved(config), f"its parent {Path(manifest.parent_run).name}"
    before, after = dict(_flat(dataclasses.asdict(base))), dict(_flat(dataclasses.asdict(spec)))
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return against, [(key, _shown(before.get(key)), _shown(after.get(key))) for key in keys]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "-" if value is None or value in ({}, []) else str(value)


def _event(event: dict[str, Any]) -> tuple[str, str, str, bool]:
    """Time, name, the rest, and whether it tells of a restart or of an end."""
    name = str(event.get("event", "?"))
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
    decides = any(word in name for word in ("restart", "requeue", "ended", "stop", "cancel", "bad", "rewound", "lease"))
    return _when(event.get("time", 0)), name.replace("_", " "), rest, decides


def _when(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
