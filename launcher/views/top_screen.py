"""The screen of `launcher top` as text with colours, for a terminal of any size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from launcher.views.sparkline import sparkline
from launcher.views.text import duration, shortened
from launcher.views.top_lines import TopLine, counts
from launcher.views.watch import COLOURS

KEYS = (("↑↓", "choose"), ("f", "follow"), ("w", "why"), ("c", "cancel"), ("r", "resubmit"), ("q", "quit"))
_HEAD, _DETAIL, _FOOT = 2, 7, 1
"""Lines above the runs, about the chosen one, and below."""
_CURVE = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What is shown besides the runs."""

    chosen: int = 0
    message: str = ""
    """In place of the keys: a question, or what an action said."""
    problem: str | None = None
    """Why the scheduler could not be asked."""


def screen(lines: Sequence[TopLine], view: View, width: int, height: int) -> Text:
    """Return the whole screen: at most `height` lines of at most `width` characters."""
    chosen = min(view.chosen, max(0, len(lines) - 1))
    about = _about(lines[chosen], width) if lines else []
    room = max(1, height - _HEAD - _FOOT - len(about) - bool(view.problem))
    first = max(0, min(chosen - room // 2, len(lines) - room))
    parts = [_title(lines, width), _columns_head(width)]
    parts += [_run(line, width, is_chosen=number == chosen) for number, line in _numbered(lines, first, room)]
    parts += [Text("")] * (room - min(room, len(lines)))
    parts += about
    if view.problem:
        parts.append(Text(_cut(f"the scheduler could not be asked: {view.problem}", width), style="bold red"))
    parts.append(_foot(view.message, width))
    return Text("\n").join([*parts[: max(0, height - 1)], parts[-1]])


def _numbered(lines: Sequence[TopLine], first: int, room: int) -> list[tuple[int, TopLine]]:
    return list(enumerate(lines))[first : first + room]


def _title(lines: Sequence[TopLine], width: int) -> Text:
    clock = time.strftime("%H:%M:%S")
    said = _cut(f" {counts(lines)}", max(0, width - len(clock) - 1))
    return Text(f"{said}{clock:>{width - len(said)}}"[:width], style="reverse")


def _layout(width: int) -> list[tuple[str, int]]:
    """Return the columns that there is room for, with their widths. The run's name gets what is left."""
    wanted = [("STATE", 11), ("STEP", 11), ("LOSS", 7), ("CURVE", _CURVE), ("GPUS", 4), ("FAULTS", 6)]
    wanted += [("ETA", 9), ("TOKENS/S", 10), ("MFU", 6)]
    least = 16
    kept: list[tuple[str, int]] = []
    left = width - 2 - least
    for name, size in wanted:
        if left < size + 1:
            continue
        kept.append((name, size))
        left -= size + 1
    return [("RUN", least + left), *kept]


_LEFT = ("RUN", "STATE", "CURVE")


def _columns_head(width: int) -> Text:
    cells = [f"{name:<{size}}" if name in _LEFT else f"{name:>{size}}" for name, size in _layout(width)]
    return Text(_cut("  " + " ".join(cells), width), style="bold")


def _run(line: TopLine, width: int, *, is_chosen: bool) -> Text:
    text = Text("▸ " if is_chosen else "  ")
    for number, (name, size) in enumerate(_layout(width)):
        cell = _cut(_cell(line, name, size), size)
        text.append(" " if number else "")
        text.append(f"{cell:<{size}}" if name in _LEFT else f"{cell:>{size}}", style=_style(line, name))
    if is_chosen:
        text.stylize("bold")
    text.truncate(width)
    return text


def _style(line: TopLine, name: str) -> str:
    if name == "STATE":
        return COLOURS.get(line.row.state, "")
    if name == "FAULTS" and line.faults:
        return "yellow"
    return "cyan" if name == "CURVE" else ""


def _cell(line: TopLine, name: str, size: int) -> str:
    row = line.row
    if name == "RUN":
        return row.run
    if name == "STATE":
        return row.state.value
    if name == "STEP":
        return "-" if row.step is None else f"{row.step}/{row.max_steps or '?'}"
    if name == "LOSS":
        return "-" if row.loss is None else f"{row.loss:.4f}"
    if name == "CURVE":
        return sparkline(line.losses, size)
    if name == "GPUS":
        return str(line.gpus) if line.gpus else "cpu"
    if name == "TOKENS/S":
        return "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}"
    if name == "ETA":
        return "-" if row.eta_seconds is None else duration(row.eta_seconds)
    if name == "MFU":
        return "-" if row.mfu is None else f"{row.mfu:.1%}"
    return str(len(line.faults)) if line.faults else "-"


def _about(line: TopLine, width: int) -> list[Text]:
    """Return the lines about the chosen run: job, curves, faults."""
    row = line.row
    where = f"job {row.job_id}" if row.job_id else "no job"
    attempt = f", attempt {row.attempt}" if row.attempt else ""
    saved = f", newest checkpoint {row.checkpoint}" if row.checkpoint else ""
    waits = f", expected to start {row.expected_start}" if row.expected_start else ""
    use = f", {line.gpus} GPUs at {row.mfu:.1%} MFU" if line.gpus and row.mfu is not None else ""
    head = _cut(f"── {row.run}: {where}{attempt}{use}{saved} ", width)
    said = " ".join(f"{row.reason}{waits}".split()) or row.state.value.lower()
    return [
        Text(f"{head:─<{width}}", style="bold"),
        _labelled("state", said, width),
        _curve("loss", line.losses, width),
        _curve("held-out", line.held_out, width),
        _curve("tokens/s", line.speeds, width),
        *_fault_lines(line, width),
    ][:_DETAIL]


def _fault_lines(line: TopLine, width: int) -> list[Text]:
    if not line.faults:
        return [_labelled("faults", "none", width), Text("")]
    restarts = f" ({line.restarts} restart{'' if line.restarts == 1 else 's'})" if line.restarts else ""
    newest = [*line.faults[-2:]]
    shown = [_labelled(f"faults {len(line.faults)}", f"{newest[-1]}{restarts}", width, "yellow")]
    before = [_labelled("", fault, width, "yellow") for fault in newest[:-1]]
    return [*shown, *(before or [Text("")])]


def _labelled(label: str, text: str, width: int, style: str = "") -> Text:
    return Text.assemble((f"   {label:<10}", "dim"), (_cut(" ".join(text.split()), max(0, width - 13)), style))


def _curve(label: str, values: Sequence[float], width: int) -> Text:
    if not values:
        return _labelled(label, "-", width)
    ends = f"  {_number(values[0])} → {_number(values[-1])}"
    return _labelled(label, f"{sparkline(values, max(0, width - 13 - len(ends)))}{ends}", width, "cyan")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _foot(message: str, width: int) -> Text:
    if message:
        return Text(_cut(message, width), style="bold yellow")
    foot = Text()
    for key, what in KEYS:
        foot.append(f" {key} ", style="reverse")
        foot.append(f" {what}  ")
    foot.truncate(width)
    return foot


def _cut(text: str, width: int) -> str:
    return shortened(text, width) if width > 0 else ""
