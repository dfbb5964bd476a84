"""Show what a run would train on, in numbers and in examples, before any GPU is used.

The numbers come from the caches that training reads, so they describe exactly what would be trained. A cache holds no
roles, so roles and the coloured examples come from rows that are tokenized again: a sample from all over the files, the
same one each time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.contract.spec import RunSpec
from sft.data.batches.packing import best_fit_decreasing
from sft.data.cache.store import TokenCache
from sft.data.encoding.masking import Encoder
from sft.data.encoding.tokenizer import load_tokenizer
from sft.data.prepared.data_sets import DataSet, held_out_sets, training_sets
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.report import epoch_shares
from sft.data.prepared.sources import Sources
from sft.data.reading.files import cut, expand, read_lines
from sft.data.reading.formats import Example, parse_row, with_detected_form
from sft.data.reading.row import Row
from sft.data.reading.split import split_of
from sft.data.reading.tables import as_json, holds_lines, place, read_rows

SAMPLED_ROWS = 200
SHOWN_EXAMPLES = 12


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of one role with the same weight."""

    role: str
    weight: float
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One example before the length policy."""

    where: str
    tokens: int
    trained: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What is known of one data set."""

    name: str
    key: str
    """The config key that errors name."""
    cache: TokenCache
    duplicates: int
    """Examples that repeat an earlier one token for token, in this source or one before it."""
    held_out_in_train: int
    """Held-out examples that are trained on too, token for token."""
    packing: float
    """Fraction of packed rows that holds tokens rather than padding."""
    roles: dict[str, tuple[int, int]]
    """Tokens and trained tokens of each role in the sample."""
    samples: tuple[Sample, ...]
    epoch: str = ""
    """What an epoch takes of it, empty if each example once."""


def audit_data(spec: RunSpec, tokenizer_dir: Path) -> list[Audit]:
    """Return the audits of the training and held-out data, after building caches that are missing."""
    # Data that lose too much are what an audit is for: the caller checks the limit after the report is written.
    unlimited = dataclasses.replace(spec, data=dataclasses.replace(spec.data, max_lost_percent=100.0))
    prepared = open_or_build(unlimited, tokenizer_dir, build=True)
    tokenizer = load_tokenizer(tokenizer_dir)
    audits = []
    trained = np.zeros(0, dtype=np.uint64)
    taken = epoch_shares(prepared.train) if isinstance(prepared.train, Sources) else [""]
    for data_set, cache, epoch in zip(training_sets(spec.data), prepared.training_caches, taken, strict=True):
        own = _digests(cache)
        audit = _audit(data_set, cache, tokenizer, _repeated(own, trained), 0)
        audits.append(dataclasses.replace(audit, epoch=epoch))
        trained = np.concatenate([trained, own])
    if prepared.validation is not None:
        (data_set,) = held_out_sets(spec.data)
        held_out = _digests(prepared.validation)
        seen = int(np.count_nonzero(np.isin(held_out, trained)))
        audits.append(_audit(data_set, prepared.validation, tokenizer, _repeated(held_out, trained[:0]), seen))
    return audits


def summary(audit: Audit) -> list[str]:
    """Return the lines to print after those of `report`."""
    counts = audit.cache.counts
    lines = [f"  epoch: {audit.epoch}"] if audit.epoch else []
    lines += [f"  ended: {counts.terminators:,} of {counts.answers:,} answers end with a trained end token"]
    total = sum(trained for _, trained in audit.roles.values())
    for role, (tokens, trained) in audit.roles.items():
        share = trained / max(total, 1)
        lines.append(f"  {role}: {trained:,} of {tokens:,} tokens are trained, {share:.1%} of all trained (sample)")
    lines.append(f"  packed: rows of data.seq_length would be {audit.packing:.1%} full")
    if audit.duplicates:
        lines.append(f"  duplicates: {audit.duplicates:,} examples repeat an earlier one, token for token")
    if audit.held_out_in_train:
        lines.append(f"  leaked: {audit.held_out_in_train:,} held-out examples are trained on, token for token")
    return lines


def _audit(
    data_set: DataSet, cache: TokenCache, tokenizer: PreTrainedTokenizerBase, duplicates: int, leaked: int
) -> Audit:
    data = data_set.data
    samples, roles = _inspect(_sampled(data_set), Encoder(tokenizer, data), tokenizer)
    inputs = cache.lengths - 1
    rows = best_fit_decreasing(inputs, data.seq_length)
    return Audit(
        name=data_set.name,
        key=data_set.key,
        cache=cache,
        duplicates=duplicates,
        held_out_in_train=leaked,
        packing=float(inputs.sum()) / (len(rows) * data.seq_length),
        roles=roles,
        samples=tuple(samples),
    )


def _inspect(
    examples: Sequence[Example], encoder: Encoder, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Sample], dict[str, tuple[int, int]]]:
    """Return up to SHOWN_EXAMPLES of the examples with their segments, and the token counts of each role in all."""
    samples: list[Sample] = []
    tokens: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    shown = set(np.linspace(0, len(examples) - 1, min(SHOWN_EXAMPLES, len(examples)), dtype=int).tolist())
    for index, example in enumerate(examples):
        for encoded, roles in encoder.inspect(example):
            tokens.update(roles)
            trained.update(role for role, weight in zip(roles, encoded.weights, strict=True) if weight)
            if index in shown:
                runs = _runs(roles, encoded.weights.tolist())
                segments = [Segment(role, w, str(tokenizer.decode(encoded.ids[a:b]))) for role, w, a, b in runs]
                supervised = int(np.count_nonzero(encoded.weights))
                samples.append(Sample(example.where, len(encoded.ids), supervised, tuple(segments)))
    return samples, {role: (count, trained[role]) for role, count in tokens.items()}


def _runs(roles: Sequence[str], weights: Sequence[float]) -> Iterator[tuple[str, float, int, int]]:
    """Yield runs of tokens with equal role and weight: these two, the first index, and the one after the last."""
    start = 0
    for index in range(1, len(roles) + 1):
        if index == len(roles) or (roles[index], weights[index]) != (roles[start], weights[start]):
            yield roles[start], weights[start], start, index
            start = index


def _sampled(data_set: DataSet) -> list[Example]:
    """Return about SAMPLED_ROWS examples from all over the files, the same ones each time."""
    files = expand(data_set.data.train, data_set.key)
    data = with_detected_form(files, data_set.data, data_set.key)
    split = split_of(files, data.validation_split or "", data_set.side, data_set.key) if data_set.side else None
    total = max(sum(path.stat().st_size for path in files), 1)
    lines: list[tuple[str, bytes]] = []
    for path in files:
        wanted = max(1, SAMPLED_ROWS * path.stat().st_size // total)
        lines += _some_lines(path, wanted)
    return [
        parse_row(line, where, data.format, data.columns, data.ignore_keys)
        for where, line in lines
        if split is None or split.takes(line)
    ]


def _some_lines(path: Path, wanted: int) -> Iterator[tuple[str, bytes]]:
    """Yield about `wanted` rows of a file as JSON, each with its place for errors."""
    if holds_lines(path):  # the first line of each of `wanted` ranges: only these are read
        for part in cut(path, max(path.stat().st_size // wanted, 1)):
            yield from ((part.where(number), line) for number, line in islice(read_lines(part), 1))
        return
    # Reservoir sampling (Algorithm R): one pass over rows whose number is not known.
    generator, kept = random.Random(0), list[tuple[int, Row]]()
    for index, item in enumerate(read_rows(path)):
        place_of = index if index < wanted else generator.randint(0, index)
        if place_of < wanted:
            kept[place_of : place_of + 1] = [item]
    for number, row in sorted(kept, key=lambda item: item[0]):
        yield place(path, number), as_json(row).encode()


def _digests(cache: TokenCache) -> NDArray[np.uint64]:
    """Return a 64-bit hash of the ids of each example."""
    values = np.empty(len(cache), dtype=np.uint64)
    for index in range(len(cache)):
        digest = hashlib.blake2b(cache.tokens(index)[0].tobytes(), digest_size=8).digest()
        values[index] = int.from_bytes(digest, "little")
    return values


def _repeated(digests: NDArray[np.uint64], earlier: NDArray[np.uint64]) -> int:
    """Return how many of `digests` are among `earlier` or repeat one before them."""
    return len(digests) - int(np.count_nonzero(~np.isin(np.unique(digests), earlier)))
