"""Build the token caches of a run in one process, and open them on every rank.

A cache is named by a digest of what it was made from: the bytes of the data, the tokenizer's files, the template, the
policies, and the version of the code. Nothing is ever invalidated: other input has another name.

`python -m sft prepare` builds the caches before any rank is started. If one is missing all the same, global rank 0
builds it and the other ranks poll the file system. A collective instead would time out long before a large data set is
tokenized, without saying why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec, RunSpec
from sft.data.cache.build import Job, write_parts
from sft.data.cache.key import MadeFrom, cache_folder, code_versions, key_of, made_from
from sft.data.cache.store import TokenCache, assemble, publish
from sft.data.prepared.data_sets import DataSet, held_out_sets, training_sets
from sft.data.prepared.report import check_columns_found, check_counts, check_ends, check_lost, epoch_report, report
from sft.data.prepared.sources import Sources, joined
from sft.data.reading.files import digest, expand, file_identity
from sft.data.reading.formats import check_columns, check_columns_read, read_first_row, with_detected_form
from sft.data.reading.policies import policy_problems
from sft.data.reading.split import split_of

CHECKS = 4
"""Increase it with every change that refuses rows which were accepted. The rows of a cache that was made before are
read once more, and the cache stays if none of them is refused."""

WAIT_SECONDS = 6 * 3600.0
_POLL_SECONDS = 1.0
_STALE_SECONDS = 2 * 86400.0


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenized training data and, if there is any, validation data."""

    train: TokenCache | Sources
    """`Sources` where the config has data.sources."""
    validation: TokenCache | None

    @property
    def training_caches(self) -> tuple[TokenCache, ...]:
        """The cache of each source, or the only one."""
        return self.train.caches if isinstance(self.train, Sources) else (self.train,)

    @property
    def caches(self) -> tuple[TokenCache, ...]:
        """All caches, that of validation data last."""
        return self.training_caches if self.validation is None else (*self.training_caches, self.validation)

    @property
    def stop_tokens(self) -> set[int]:
        """The tokens that end answers in the training data: what the model learns to stop with."""
        return {token for cache in self.training_caches for token in cache.answer_ends}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """One data set: its files, and the name and place of its cache."""

    of: DataSet
    files: tuple[Path, ...]
    data: DataSpec
    """With the format and the columns of the rows."""
    made_from: MadeFrom
    key: str
    directory: Path


def prepare_data(spec: RunSpec, tokenizer_dir: Path) -> PreparedData:
    """Build the caches that are missing, print what the run will train on, and return the data."""
    prepared = open_or_build(spec, tokenizer_dir, build=True, verify=True)
    for _, name, cache in _named_caches(prepared):
        print(report(name, cache))
    if isinstance(prepared.train, Sources):
        print(epoch_report(prepared.train))
    return prepared


def open_or_build(
    spec: RunSpec, tokenizer_dir: Path, *, build: bool, verify: bool = False, wait_seconds: float = WAIT_SECONDS
) -> PreparedData:
    """Return the run's data: with `build` make missing caches, without it wait for them up to `wait_seconds`.

    With `verify`, existing caches are read completely and compared with their checksums. `prepare` does that once, in
    one process, before the ranks start.

    Raise DataError for files that cannot be read, caches that do not appear, and data that lose too much. No
    collectives are called.
    """
    check_columns(spec.data.columns, "data.columns")
    for name, given in spec.data.sources.items():
        check_columns(given.columns, f"data.sources.{name}.columns")
    training = training_sets(spec.data)
    caches = []
    sets = (*training, *held_out_sets(spec.data))
    sources = [_source(spec, data_set, tokenizer_dir, write_notes=build) for data_set in sets]
    _check_settings_read(spec.data, sources)
    for data_set, source in zip(sets, sources, strict=True):
        if build:
            caches.append(_open_or_make(spec, source, tokenizer_dir, verify))
        else:
            caches.append(_wait_for(source, wait_seconds))
        check_ends(caches[-1].counts, data_set.key, source.files, source.data)
        check_lost(caches[-1].counts, data_set.key, spec.data)
    train, held_out = caches[: len(training)], caches[len(training) :]
    return PreparedData(joined(training, train, spec.data), held_out[0] if held_out else None)


def _check_settings_read(data: DataSpec, sources: Sequence[_Source]) -> None:
    """Raise DataError for columns and policies of the config that no data set which has them is read with."""
    for source in sources:
        if data.sources and source.of.own_columns:
            try:
                check_columns_read(source.of.own_columns, {source.data.format}, f"{source.of.key}.columns")
            except DataError:
                read_first_row(source.files, source.data)  # where the format itself is wrong, that is what to say
                raise
    alone = dataclasses.replace(data, sources={})
    others = {f"data.validation_sets.{name}": [given] for name, given in data.validation_sets.items()}
    held_out = {key: with_detected_form(expand(files, key), alone, key).format for key, files in others.items()}
    if data.columns:
        inherits = {source.data.format for source in sources if not (data.sources and source.of.own_columns)}
        check_columns_read(data.columns, inherits | set(held_out.values()), "data.columns")
    problems = list(policy_problems(data, {source.of.key: source.data.format for source in sources} | held_out))
    if problems:
        raise DataError(problems)


def check_vocabulary(prepared: PreparedData, vocab_size: int) -> None:
    """Raise DataError for token ids that the model has no embedding for."""
    # Checked here because a GPU would only say `device-side assert`.
    for key, _, cache in _named_caches(prepared):
        if cache.counts.largest_id >= vocab_size:
            raise DataError(
                f"{key}: token id {cache.counts.largest_id} is not in the model's vocabulary of {vocab_size} "
                "(vocab_size in its config.json); set model.tokenizer to the model's own, or, if the rows hold token "
                "ids, make them with it"
            )


def _named_caches(prepared: PreparedData) -> list[tuple[str, str, TokenCache]]:
    """Return key, name and cache of each data set."""
    train = prepared.train
    if isinstance(train, Sources):
        pairs = zip(train.shares, train.caches, strict=True)
        named = [(f"data.sources.{share.name}", share.name, cache) for share, cache in pairs]
    else:
        named = [("data.train", "train", train)]
    validation = prepared.validation
    return named if validation is None else [*named, ("data.validation", "validation", validation)]


def _source(spec: RunSpec, data_set: DataSet, tokenizer_dir: Path, *, write_notes: bool) -> _Source:
    files = tuple(expand(data_set.data.train, data_set.key))
    data = with_detected_form(files, data_set.data, data_set.key)
    notes = spec.cache_dir / "digests"
    content = [digest(path, notes, write=write_notes) for path in files]
    code = code_versions()
    # Earlier versions had all settings in the key. Checkpoints name it, so such a cache keeps it.
    made = [made_from(data, content, tokenizer_dir, data_set.side, code, earlier=earlier) for earlier in (True, False)]
    found = [(each, key_of(each)) for each in made]
    chosen, key = next((pair for pair in found if cache_folder(spec.cache_dir, pair[1]).is_dir()), found[-1])
    directory = cache_folder(spec.cache_dir, key)
    return _Source(of=data_set, files=files, data=data, made_from=chosen, key=key, directory=directory)


def _open_or_make(spec: RunSpec, source: _Source, tokenizer_dir: Path, verify: bool) -> TokenCache:
    cache = _opened(source, verify) if source.directory.is_dir() else None  # without its manifest it is a damaged one
    lenient = cache is not None and not set(cache.ignored_keys) <= set(source.data.ignore_keys)
    if cache is not None and not lenient and cache.checks >= CHECKS:
        return cache
    parent = source.directory.parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent)
    aside = Path(tempfile.mkdtemp(prefix=f".{source.key[:12]}-", dir=parent))
    try:
        _build(spec, source, tokenizer_dir, aside)
        if cache is not None:  # made with more rows let pass: as none is refused, they gave the same bytes again
            if not lenient:
                cache.note_checks(CHECKS)
            return cache
        aside.chmod(0o755)  # mkdtemp's 0700 would keep colleagues out of a shared cache
        publish(aside, source.directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return TokenCache.open(source.directory)


def _opened(source: _Source, verify: bool) -> TokenCache | None:
    """Return the cache that is there, or remove it and return None where it is damaged."""
    try:
        cache = TokenCache.open(source.directory)
        if verify:
            cache.verify()
    except DataError as error:
        print(f"{error}; building it again", file=sys.stderr)
        shutil.rmtree(source.directory)
        return None
    return cache


def _build(spec: RunSpec, source: _Source, tokenizer_dir: Path, aside: Path) -> None:
    before = [file_identity(path) for path in source.files]
    split = None
    if source.of.side is not None:
        split = split_of(source.files, source.data.validation_split or "", source.of.side, "data.validation_split")
    job = Job(tokenizer_dir=tokenizer_dir, data=source.data, split=split)
    title = f"tokenizing {source.of.name}"
    parts = write_parts(job, source.files, aside, show_progress=spec.logging.progress_bar, title=title)
    changed = [
        str(path) for path, identity in zip(source.files, before, strict=True) if file_identity(path) != identity
    ]
    if changed:
        raise DataError(f"{source.of.key}: {', '.join(changed)} changed while being read; start again")
    check_columns_found(parts, source.of)
    details = {
        "files": [str(path) for path in source.files],
        "bytes": [size for size, *_ in before],
        "format": source.data.format,
        "made_from": source.made_from,
        "ignored_keys": sorted(source.data.ignore_keys),
        "checks": CHECKS,
    }
    counts = assemble(aside, source.key, parts, **details)
    check_counts(counts, source.of.key, source.files)


def _wait_for(source: _Source, wait_seconds: float) -> TokenCache:
    """Return the cache that another rank builds, or raise DataError if it does not appear in time."""
    deadline = time.monotonic() + wait_seconds
    told = False
    while not _has_appeared(source.directory):
        if time.monotonic() >= deadline:
            raise DataError(
                f"{source.of.key}: {source.directory} did not appear in {wait_seconds:.0f} s; "
                "is data.cache_dir on a file system that all nodes share?"
            )
        if not told:
            print(f"waiting for {source.directory}", file=sys.stderr)
            told = True
        time.sleep(min(_POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    return TokenCache.open(source.directory)


def _has_appeared(directory: Path) -> bool:
    # Network file systems remember that a name was absent. Listing its parent makes them ask again.
    with contextlib.suppress(FileNotFoundError):
        return directory in set(directory.parent.iterdir())
    return False


def _remove_stale(parent: Path) -> None:
    """Remove what killed builds left behind: a running one changes its directory with every part."""
    for path in parent.glob(".*-*"):
        try:
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)
