"""Report what happened to the rows, and refuse runs that lose too much of them.

No data is dropped silently: a run that would lose half its data, or never learn to stop, says so before it trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.cache.store import Counts, Part, TokenCache
from sft.data.prepared.data_sets import DataSet
from sft.data.prepared.sources import Sources
from sft.data.reading.formats import OPTIONAL_COLUMNS

_SHOWN_KEYS, _LONGEST_KEY = 8, 40
_TEMPLATE_WRITES_ENDS = "the chat template must write one after each assistant turn"


def report(name: str, cache: TokenCache) -> str:
    """Return the lines that say what a cache holds and what was lost."""
    c = cache.counts
    targets = c.tokens - c.examples
    lines = [
        f"{name}: {c.examples:,} examples, {c.tokens:,} tokens (mean {c.tokens / c.examples:.0f}, "
        f"longest {c.longest:,}), {c.supervised_tokens:,} trained ({c.supervised_tokens / targets:.1%})"
    ]
    if c.too_long:
        lines.append(f"  dropped: {c.too_long:,} rows longer than data.seq_length (longest {c.longest_row:,} tokens)")
    if c.truncated:
        lines.append(f"  truncated: {c.truncated:,} rows (longest {c.longest_row:,} tokens)")
    if c.split:
        lines.append(f"  split: {c.split:,} rows into pieces of data.seq_length (longest {c.longest_row:,} tokens)")
    if c.rewritten:
        lines.append(f"  split: {c.rewritten:,} rows whose earlier turns the chat template rewrites")
    if c.unsupervised:
        lines.append(f"  dropped: {c.unsupervised:,} rows without any token to train on")
    if c.tokens_lost:
        lines.append(
            f"  lost: {c.tokens_lost:,} tokens, {c.supervised_lost:,} of them to be trained "
            f"({lost_percent(c):.1f} % of all to be trained)"
        )
    if c.terminators < c.answers:
        lines.append(f"  cut: {c.answers - c.terminators:,} of {c.answers:,} answers have no trained end token")
    if c.tokens_trimmed or c.messages_trimmed:
        lines.append(
            f"  trimmed: {c.messages_trimmed:,} messages and {c.tokens_trimmed:,} tokens after the last trained one"
        )
    if c.straddling:
        lines.append(f"  edges: {c.straddling:,} trained tokens hold text of both prompt and answer")
    if c.escaped:
        lines.append(f"  escaped: special tokens spelled in {c.escaped:,} rows are trained as plain text")
    if cache.unread:
        lines.append(f"  not read: {_named(cache.unread)}; data.columns gives keys a meaning")
    return "\n".join(lines)


def _named(unread: Mapping[str, int]) -> str:
    """Return keys that nothing reads with the number of their rows, the most frequent first."""
    by_rows = sorted(unread.items(), key=lambda item: (-item[1], item[0]))
    shown = ", ".join(f"{key[:_LONGEST_KEY]!r} in {rows:,} rows" for key, rows in by_rows[:_SHOWN_KEYS])
    more = len(by_rows) - _SHOWN_KEYS
    return f"{shown} and {more:,} more keys" if more > 0 else shown


def epoch_report(sources: Sources) -> str:
    """Return the lines that say what an epoch takes of each source."""
    total = sum(share.taken for share in sources.shares)
    lines = [f"an epoch takes {total:,} examples of {len(sources.shares)} sources:"]
    lines += [f"  {share.name}: {text}" for share, text in zip(sources.shares, epoch_shares(sources), strict=True)]
    return "\n".join(lines)


def epoch_shares(sources: Sources) -> list[str]:
    """Return what an epoch takes of each source, a text for each."""
    # Epochs may take different examples of a source: the trained tokens are the mean over epochs.
    total = sum(share.taken for share in sources.shares)
    counts = [cache.counts for cache in sources.caches]
    trained = [share.taken * c.supervised_tokens / c.examples for share, c in zip(sources.shares, counts, strict=True)]
    texts = []
    for share, mine in zip(sources.shares, trained, strict=True):
        copies = f"{share.copies} x {share.examples:,}"
        how = f"{copies} + {share.rest:,}" if share.rest and share.copies else "" if share.rest else copies
        texts.append(
            f"{share.taken:,} examples, weight {share.weight:g} of {share.examples:,}{f' ({how})' if how else ''}; "
            f"{share.taken / total:.1%} of the examples, {mine / sum(trained):.1%} of the trained tokens"
        )
    return texts


def lost_percent(counts: Counts) -> float:
    """Return the percentage of the tokens to be trained that the length policy took away."""
    wanted = counts.supervised_tokens + counts.supervised_lost
    return 100.0 * counts.supervised_lost / wanted if wanted else 0.0


def check_columns_found(parts: Sequence[Part], data_set: DataSet) -> None:
    """Raise DataError for a column that data.columns names and that no row has: it is misspelt."""
    found: set[str] = {name for part in parts for name in part.tallies.columns}
    rows = sum(part.counts.rows for part in parts)
    problems = [
        f"{data_set.key}: data.columns reads {name} from {column!r}, which none of {rows:,} rows has"
        for name, column in data_set.own_columns.items()
        if rows and name in OPTIONAL_COLUMNS and name not in found
    ]
    if problems:
        raise DataError(problems)


def check_counts(counts: Counts, key: str, files: Sequence[Path]) -> None:
    """Raise DataError, naming `key` and `files`, for data that nothing can be learnt from."""
    names = ", ".join(map(str, files))
    if counts.rows == 0:
        raise DataError(f"{key}: no rows in {names}")
    if counts.supervised_tokens == 0:
        raise DataError(
            f"{key}: no token of {counts.rows:,} rows in {names} is left to train on "
            f"({counts.unsupervised:,} without an assistant turn or cut before one, {counts.too_long:,} too long); "
            "see data.loss_on, data.seq_length and data.length_policy"
        )


def check_ends(counts: Counts, key: str, files: Sequence[Path], data: DataSpec) -> None:
    """Raise DataError for data from which a model would not learn to stop, unless data.require_end_tokens is false."""
    names = ", ".join(map(str, files))
    if counts.terminators == 0 and data.require_end_tokens:
        what = "token rows must hold one after each answer" if data.format == "tokens" else _TEMPLATE_WRITES_ENDS
        raise DataError(
            f"{key}: no answer in {names} ends with a trained end token, so the model would never learn to stop; "
            f"{what}. If it is not to stop by itself, set data.require_end_tokens: false"
        )


def check_lost(counts: Counts, key: str, data: DataSpec) -> None:
    """Raise DataError if the length policy took away more than data.max_lost_percent of the tokens to be trained."""
    if not 0.0 <= data.max_lost_percent <= 100.0:
        raise DataError(f"data.max_lost_percent {data.max_lost_percent:g} must be between 0 and 100")
    if lost_percent(counts) > data.max_lost_percent:
        raise DataError(
            f"{key}: data.length_policy {data.length_policy} at data.seq_length {data.seq_length} takes away "
            f"{counts.supervised_lost:,} of {counts.supervised_tokens + counts.supervised_lost:,} tokens to be trained "
            f"({lost_percent(counts):.1f} %); data.max_lost_percent {data.max_lost_percent:g} allows no more "
            f"(the longest row has {counts.longest_row:,} tokens)"
        )
