"""Tokenized examples as flat memory-mapped arrays in a directory that is complete or absent.

    <cache>/<key>/
      ids.npy             int32    token ids of all examples, one after another
      weights.npy         float32  loss weight of each token as a target
      offsets.npy         int64    example i is ids[offsets[i]:offsets[i + 1]]
      target_weights.npy  float64  sum of an example's target weights
      supervised.npy      int64    number of an example's targets with a weight other than 0
      manifest.json       key and what it was made from, format version, counts, and the checksums of each array and of
                          itself; written last

Workers write parts, `assemble` joins them in a temporary directory, `publish` renames that. Several jobs may build the
same key at once: the first rename wins, and the others use that cache, which holds the same bytes.

Rejected: an Arrow data set (a second copy of every token in a row format, named by a hash of our code), and a lock file
(a killed job leaves it behind, and locks are unreliable on shared file systems).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.contract.checksum import crc32
from launcher.contract.errors import DataError
from launcher.contract.rundir import sync_path, write_json
from sft.data.cache.key import FORMAT_VERSION, MANIFEST

MOST_UNREAD = 50
"""How many of the keys that nothing reads are kept; a file can have a key of its own in each row."""
_ARRAYS = {"ids": "<i4", "weights": "<f4", "offsets": "<i8", "target_weights": "<f8", "supervised": "<i8"}
_PART_ARRAYS = ("ids", "weights", "lengths", "target_weights", "supervised")

TokenPair = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Token ids of one example, and the loss weight of each as a target."""


class Examples(Protocol):
    """Tokenized examples by number, with what schedules and batches need to know about each."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example."""
        ...

    @property
    def target_weights(self) -> NDArray[np.float64]:
        """Sum of the target weights of each example."""
        ...

    @property
    def supervised(self) -> NDArray[np.int64]:
        """Number of targets of each example with a weight other than 0."""
        ...

    def __len__(self) -> int: ...

    def tokens(self, example: int) -> TokenPair:
        """Return ids and weights of one example."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What happened to the rows. The sum of two counts is that of both sets of rows together."""

    rows: int = 0
    examples: int = 0
    """Examples that are trained on."""
    tokens: int = 0
    """Tokens of the examples."""
    supervised_tokens: int = 0
    """Targets with a weight other than 0."""
    answers: int = 0
    """Answers of those examples before the length policy."""
    terminators: int = 0
    """Targets that end an answer, after the length policy."""
    longest: int = 0
    """Tokens of the longest example."""
    longest_row: int = 0
    """Tokens of the longest row, before the length policy."""
    largest_id: int = 0
    """Largest token id, to compare with the model's vocabulary."""
    too_long: int = 0
    """Rows that the length policy dropped."""
    truncated: int = 0
    """Rows that the length policy truncated."""
    split: int = 0
    """Rows that the length policy split into pieces."""
    rewritten: int = 0
    """Rows that became several examples, because the template rewrites earlier turns."""
    unsupervised: int = 0
    """Rows dropped because no target is left in them."""
    tokens_lost: int = 0
    """Tokens dropped or truncated by the length policy."""
    supervised_lost: int = 0
    """Targets among the lost tokens."""
    tokens_trimmed: int = 0
    """Tokens after the last target, left out because nothing is learnt from them."""
    messages_trimmed: int = 0
    """Messages after the last trained one, left out too."""
    straddling: int = 0
    """Trained tokens that hold text from both sides of an edge of what is trained."""
    escaped: int = 0
    """Rows whose content spells special tokens, which were tokenized as plain text."""

    def __add__(self, other: Counts) -> Counts:
        largest = {"longest", "longest_row", "largest_id"}
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        joined = {name: max(n, theirs[name]) if name in largest else n + theirs[name] for name, n in mine.items()}
        return Counts(**joined)


@dataclass(frozen=True)
class TokenCache:
    """A complete cache, opened for reading. The arrays are memory-mapped: only what is used is read."""

    directory: Path
    key: str
    counts: Counts
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    target_weights: NDArray[np.float64]
    supervised: NDArray[np.int64]
    checksums: Mapping[str, str]
    """CRC-32 of each array's file, in hexadecimal."""
    answer_ends: Mapping[int, int]
    """How often each token ends an answer that is trained."""
    unread: Mapping[str, int]
    """Number of rows with each key that nothing reads, the most frequent ones."""
    ignored_keys: tuple[str, ...]
    """Keys that rows were allowed to have though nothing reads them (data.ignore_keys)."""
    checks: int
    """Version of the checks that its rows have passed."""

    @classmethod
    def open(cls, directory: Path) -> TokenCache:
        """Open the cache in `directory`, or raise DataError if it is incomplete or damaged."""
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            if isinstance(manifest, dict) and manifest.get("version") != FORMAT_VERSION:
                raise DataError(f"data cache {directory} was made by an earlier version; prepare again")
            if manifest["sha256"] != _digest(manifest):
                raise ValueError(f"the bytes of {MANIFEST} have changed")
            counts = Counts(**manifest["counts"])
            arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r").view(np.ndarray) for name in _ARRAYS}
            expected = _shapes(counts)
            wrong = [name for name, array in arrays.items() if array.shape != (expected[name],)]
            wrong += [name for name, array in arrays.items() if array.dtype != np.dtype(_ARRAYS[name])]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} does not fit the manifest")
            checksums = {name: str(manifest["crc32"][name]) for name in _ARRAYS}
            ends = {int(token): int(count) for token, count in manifest["answer_ends"].items()}
            return cls(
                directory=directory,
                key=str(manifest["key"]),
                counts=counts,
                checksums=checksums,
                answer_ends=ends,
                unread=dict(manifest["unread"]),
                ignored_keys=tuple(map(str, manifest.get("ignored_keys", ()))),
                checks=int(manifest.get("checks", 0)),
                **arrays,
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"data cache {directory} is damaged ({error}); delete it and prepare again") from error

    def verify(self) -> None:
        """Read the whole cache, and raise DataError if an array's bytes are not those that were written."""
        changed = [name for name, known in self.checksums.items() if crc32(self.directory / f"{name}.npy") != known]
        if changed:
            raise DataError(f"data cache {self.directory} is damaged: the bytes of {', '.join(changed)} have changed")

    def note_checks(self, checks: int) -> None:
        """Write down that the rows have passed these checks, where the cache can be written to."""
        manifest = json.loads((self.directory / MANIFEST).read_text(encoding="utf-8")) | {"checks": checks}
        with contextlib.suppress(OSError):  # a shared cache may be read-only: its rows are checked again then
            write_json(self.directory / MANIFEST, {**manifest, "sha256": _digest(manifest)})

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, example: int) -> TokenPair:
        """Return ids and weights of one example, as views of the arrays."""
        part = slice(int(self.offsets[example]), int(self.offsets[example + 1]))
        return self.ids[part], self.weights[part]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example."""
        return np.diff(self.offsets)


@dataclass(frozen=True, slots=True)
class Tallies:
    """What is counted by name while rows are tokenized."""

    answer_ends: Counter[int] = field(default_factory=Counter)
    """How often each token ends an answer."""
    unread: Counter[str] = field(default_factory=Counter)
    """Rows that have each key that nothing reads."""
    columns: Counter[str] = field(default_factory=Counter)
    """Rows that have the key of each name in data.columns."""

    def __add__(self, other: Tallies) -> Tallies:
        return Tallies(self.answer_ends + other.answer_ends, self.unread + other.unread, self.columns + other.columns)


@dataclass(frozen=True, slots=True)
class Part:
    """Examples that a worker wrote to raw files `<prefix>.<array>`, and their counts."""

    prefix: Path
    counts: Counts
    tallies: Tallies = field(default_factory=Tallies)


def write_part(prefix: Path, pairs: Sequence[TokenPair], counts: Counts, tallies: Tallies | None = None) -> Part:
    """Write `pairs` as raw arrays and return the part, `counts` completed with what follows from the pairs."""
    lengths = np.array([len(ids) for ids, _ in pairs], dtype="<i8")
    # The first token is never a target, so its weight counts nowhere.
    sums = np.array([weights[1:].sum(dtype=np.float64) for _, weights in pairs], dtype="<f8")
    supervised = np.array([np.count_nonzero(weights[1:]) for _, weights in pairs], dtype="<i8")
    ids = np.concatenate([np.asarray(ids, dtype="<i4") for ids, _ in pairs] or [np.zeros(0, "<i4")])
    weights = np.concatenate([np.asarray(weights, dtype="<f4") for _, weights in pairs] or [np.zeros(0, "<f4")])
    arrays = {"ids": ids, "weights": weights, "lengths": lengths, "target_weights": sums, "supervised": supervised}
    for name, array in arrays.items():
        # Not array.tofile, whose error on a full disk does not say that it is one.
        Path(f"{prefix}.{name}").write_bytes(array.tobytes())
    measured = dataclasses.replace(
        counts,
        examples=len(pairs),
        tokens=int(lengths.sum()),
        supervised_tokens=int(supervised.sum()),
        longest=int(lengths.max(initial=0)),
        largest_id=int(ids.max(initial=0)),
    )
    return Part(prefix, measured, tallies or Tallies())


def assemble(directory: Path, key: str, parts: Sequence[Part], **details: object) -> Counts:
    """Join `parts`, in this order, into a cache in `directory` and return its counts.

    The parts are deleted as soon as they are copied. `details` go into the manifest.
    """
    counts = sum((part.counts for part in parts), Counts())
    shapes = _shapes(counts)
    for name in _PART_ARRAYS:
        target = "offsets" if name == "lengths" else name
        with (directory / f"{target}.npy").open("wb") as file:
            _write_header(file, _ARRAYS[target], shapes[target])
            if name == "lengths":
                _write_offsets(file, parts)
            else:
                _copy(file, [Path(f"{part.prefix}.{name}") for part in parts])
            file.flush()
            os.fsync(file.fileno())
        for part in parts:
            Path(f"{part.prefix}.{name}").unlink()
    tallies = sum((part.tallies for part in parts), Tallies())
    manifest = {
        "version": FORMAT_VERSION,
        "key": key,
        "counts": dataclasses.asdict(counts),
        "crc32": {name: crc32(directory / f"{name}.npy") for name in _ARRAYS},
        "answer_ends": {str(token): count for token, count in sorted(tallies.answer_ends.items())},
        # Sorted by name first: rows of one count would else come in the order of the workers.
        "unread": dict(Counter(dict(sorted(tallies.unread.items()))).most_common(MOST_UNREAD)),
        **details,
    }
    # Last: a directory with a manifest is complete.
    write_json(directory / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    return counts


def publish(aside: Path, final: Path) -> bool:
    """Rename `aside` to `final` and return True, or remove `aside` and return False if another job was faster."""
    try:
        aside.rename(final)
    except OSError:  # a directory that is not empty cannot be replaced
        if not (final / MANIFEST).is_file():  # a damaged one: caches appear with their manifest
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            return True
        shutil.rmtree(aside, ignore_errors=True)
        return False
    with contextlib.suppress(OSError):  # some network file systems cannot sync a directory
        sync_path(final.parent)
    return True


def _digest(manifest: Mapping[str, object]) -> str:
    """Return the SHA-256 of a manifest, its own digest left out."""
    values = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _shapes(counts: Counts) -> dict[str, int]:
    """Return the length of each array of a cache with these counts."""
    examples = counts.examples
    return {
        "ids": counts.tokens,
        "weights": counts.tokens,
        "offsets": examples + 1,
        "target_weights": examples,
        "supervised": examples,
    }


def _write_header(file: IO[bytes], dtype: str, length: int) -> None:
    # The header alone, instead of np.save, so that the parts are copied after it without being read into memory.
    # Rejected: a memory map, which turns a full disk into SIGBUS where a plain write raises OSError.
    header = {"descr": dtype, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_offsets(file: IO[bytes], parts: Sequence[Part]) -> None:
    total = 0
    file.write(np.zeros(1, dtype="<i8").tobytes())
    for part in parts:
        ends = total + np.cumsum(np.fromfile(f"{part.prefix}.lengths", dtype="<i8"), dtype="<i8")
        file.write(ends.tobytes())
        total = int(ends[-1]) if len(ends) else total


def _copy(file: IO[bytes], sources: Sequence[Path]) -> None:
    for source in sources:
        with source.open("rb") as part:
            shutil.copyfileobj(part, file, 1 << 20)
