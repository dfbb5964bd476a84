"""`launcher report RUN`: everything a run has written about itself, as one HTML page without scripts or the network."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.contract import resources
from launcher.contract.errors import RunStateError
from launcher.contract.manifest import Manifest, read_manifest
from launcher.contract.records import read_events, read_metrics
from launcher.contract.rundir import JsonObject, RunPaths, write_atomic
from launcher.contract.spec import RunSpec, read_resolved
from launcher.runs.state import RunStatus, collect
from launcher.views.charts import charts
from launcher.views.text import duration, local_time
from launcher.views.timeline import bars, event_row, first_steps, resumed_at

_TEMPLATE = "report.html.j2"
_MOST_EVENTS = 500


def write_report(paths: RunPaths, target: Path) -> None:
    """Write the run's page to `target`, whole or not at all, or raise RunStateError."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in resources.search_path("templates")]),
        undefined=jinja2.StrictUndefined,
        autoescape=True,  # names, configs and events may hold anything
        trim_blocks=True,
        lstrip_blocks=True,
    )
    resources.find("templates", _TEMPLATE)  # its error says where it looked, which Jinja2's does not
    page = environment.get_template(_TEMPLATE).render(**_page_values(paths))
    try:
        write_atomic(target, page)
    except OSError as error:
        raise RunStateError(f"{target} cannot be written: {error.strerror}") from None


def _page_values(paths: RunPaths) -> dict[str, object]:
    manifest, spec = read_manifest(paths), read_resolved(paths.config)
    events, metrics = read_events(paths), read_metrics(paths)
    (status,), _ = collect([paths])
    against, changes = _changes(spec, manifest)
    return {
        "run": paths,
        "status": status,
        "manifest": manifest,
        "made": local_time(time.time()),
        "created": local_time(manifest.created_at),
        "tiles": _tiles(status, metrics),
        "charts": charts(metrics, resumed_at(events)),
        "bars": bars(events, manifest.created_at, _newest_step(metrics)),
        "first_steps": first_steps(events),
        "topology": [(name.replace("_", " "), value) for name, value in manifest.topology.items() if name != "summary"],
        "against": against,
        "changes": changes,
        "checkpoints": [(path.name, _size(path)) for path in paths.complete_checkpoints()],
        "events": [event_row(event) for event in events[-_MOST_EVENTS:]],
        "hidden_events": max(0, len(events) - _MOST_EVENTS),
    }


def _newest_step(metrics: Sequence[JsonObject]) -> int | None:
    steps = [line["step"] for line in metrics if isinstance(line.get("step"), int)]
    return max(steps) if steps else None


def _tiles(status: RunStatus, metrics: Sequence[JsonObject]) -> list[tuple[str, str]]:
    """Return names and values of the numbers at the top of the page."""
    held_out = [line["eval_loss"] for line in metrics if "eval_loss" in line]
    tiles = [
        ("step", _steps(status)),
        ("loss", None if status.loss is None else f"{status.loss:.4f}"),
        ("held-out loss", f"{held_out[0]:.4f} → {held_out[-1]:.4f}" if held_out else None),
        ("tokens/s", None if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}"),
        ("MFU", None if status.mfu is None else f"{status.mfu:.1%}"),
        ("ETA", None if status.eta_seconds is None else duration(status.eta_seconds)),
        ("first step after", None if status.first_step_seconds is None else duration(status.first_step_seconds)),
        ("checkpoint", status.checkpoint),
    ]
    return [(name, value) for name, value in tiles if value is not None]


def _steps(status: RunStatus) -> str | None:
    return None if status.step is None or status.max_steps is None else f"{status.step:,} of {status.max_steps:,}"


def _changes(spec: RunSpec, manifest: Manifest) -> tuple[str, list[tuple[str, str, str]]]:
    """Return what the config is compared with, and the keys that differ with both values.

    A run that was made from another one is compared with that, any other run with the defaults.
    """
    base, against = RunSpec(), "the defaults"
    if manifest.parent_run is not None and (config := RunPaths(Path(manifest.parent_run)).config).is_file():
        base, against = read_resolved(config), f"its parent {Path(manifest.parent_run).name}"
    before, after = dict(_flat(dataclasses.asdict(base))), dict(_flat(dataclasses.asdict(spec)))
    keys = [key for key in {**after, **before} if before.get(key) != after.get(key)]
    return against, [(key, _shown(before.get(key)), _shown(after.get(key))) for key in keys]


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted key and the value of every leaf."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: object) -> str:
    return "-" if value is None or value in ({}, []) else str(value)


def _size(folder: Path) -> str:
    size = float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
