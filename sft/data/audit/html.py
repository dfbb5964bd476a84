"""Write the audit as one HTML file without scripts or external resources.

Everything that comes from data, paths or config is escaped, so a browser runs none of it. Control characters are shown
as symbols: the text looks like what is tokenized.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from launcher.contract.spec import RunSpec
from sft.data.audit.audit import Audit, Sample, Segment
from sft.data.prepared.report import lost_percent, report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } .bad { color: #b00; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8rem; border-radius: 4px; }
mark { background: #b7ebc0; } mark.part { background: #e3f3c0; } .role { color: #888; font-size: 12px; }
summary { cursor: pointer; } .key mark { padding: 0 .4rem; }
"""
_SHOWN_CHARACTERS = 6000


def write_report(audits: Sequence[Audit], spec: RunSpec, target: Path) -> None:
    """Write the report to `target`, completely or not at all."""
    sections = "\n".join(_section(audit, spec) for audit in audits)
    title = f"Data audit{f' of {spec.name}' if spec.name else ''}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n{_settings(spec)}\n{sections}\n</body></html>\n"
    )
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)


def _settings(spec: RunSpec) -> str:
    data = spec.data
    named = ("chat_template", "loss_on", "on_mismatch", "seq_length", "length_policy")
    return f"<p>{_text(', '.join(f'data.{name}: {getattr(data, name)}' for name in named))}</p>"


def _section(audit: Audit, spec: RunSpec) -> str:
    picture = _histogram(audit.cache.lengths, spec.data.seq_length)
    samples = "\n".join(map(_sample, audit.samples))
    return (
        f"<h2>{_text(audit.name)}</h2>\n<pre>{_text(report(audit.name, audit.cache))}</pre>\n{_facts(audit)}\n"
        f'<h3>Length</h3>\n<img alt="histogram of lengths" src="data:image/png;base64,{picture}">\n'
        f"<h3>Roles</h3>\n{_roles(audit)}\n<h3>Examples</h3>\n"
        '<p class="key">Before the length policy. <mark>trained</mark> <mark class="part">trained with a weight other '
        f"than 1</mark> not trained</p>\n{samples}"
    )


def _facts(audit: Audit) -> str:
    counts = audit.cache.counts
    rows = [
        ("answers that end with a trained end token", f"{counts.terminators:,} of {counts.answers:,}"),
        ("rows dropped as too long", f"{counts.too_long:,}"),
        ("rows truncated", f"{counts.truncated:,}"),
        ("tokens to be trained that were lost", f"{counts.supervised_lost:,} ({lost_percent(counts):.1f} %)"),
        ("examples that repeat an earlier one, token for token", f"{audit.duplicates:,}"),
        ("held-out examples that are trained on", f"{audit.held_out_in_train:,}"),
        ("fill of packed rows", f"{audit.packing:.1%}"),
    ]
    rows += [("an epoch takes", audit.epoch)] if audit.epoch else []
    bad = {0: counts.terminators < counts.answers, 5: audit.held_out_in_train > 0}
    cells = [
        f"<tr><td>{name}</td><td{' class=bad' if bad.get(index) else ''}>{_text(value)}</td></tr>"
        for index, (name, value) in enumerate(rows)
    ]
    return f"<table>{''.join(cells)}</table>"


def _roles(audit: Audit) -> str:
    total = max(sum(trained for _, trained in audit.roles.values()), 1)
    rows = "".join(
        f"<tr><td>{_text(role)}</td><td>{tokens:,}</td><td>{trained:,}</td><td>{trained / tokens:.1%}</td>"
        f"<td>{trained / total:.1%}</td></tr>"
        for role, (tokens, trained) in audit.roles.items()
    )
    head = "".join(f"<th>{name}</th>" for name in ("role", "tokens", "trained", "share", "of all trained"))
    note = "Counted in a sample of the rows. A turn includes its header and what the template writes before it."
    return f"<table><tr>{head}</tr>{rows}</table>\n<p>{note}</p>"


def _sample(sample: Sample) -> str:
    title = f"{sample.where}: {sample.tokens:,} tokens, {sample.trained:,} trained"
    parts, shown, role = [], 0, ""
    for segment in sample.segments:
        if shown > _SHOWN_CHARACTERS:
            parts.append(" … ")
            break
        if segment.role != role:
            role = segment.role
            parts.append(f'{chr(10) if parts else ""}<span class="role">{_text(role)}</span> ')
        parts.append(_segment(segment))
        shown += len(segment.text)
    return f"<details open><summary>{_text(title)}</summary><pre>{''.join(parts)}</pre></details>"


def _segment(segment: Segment) -> str:
    text = _text(segment.text[:_SHOWN_CHARACTERS])
    if not segment.weight:
        return text
    kind = "" if segment.weight == 1 else f' class="part" title="weight {segment.weight:g}"'
    return f"<mark{kind}>{text}</mark>"


def _text(text: str) -> str:
    """Return `text` escaped, control characters as symbols, each line end as a symbol and a line break."""
    symbols = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
    return html.escape(text.translate(symbols)).replace("\n", "\u21b5\n")


def _histogram(lengths: NDArray[np.int64], seq_length: int) -> str:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots()
    axes.hist(lengths, bins=min(60, max(int(lengths.max(initial=1)), 1)), color="tab:blue")
    axes.axvline(seq_length, color="tab:red", linewidth=1, label="data.seq_length")
    axes.set(xlabel="tokens of an example", ylabel="examples")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return base64.b64encode(picture.getvalue()).decode()
