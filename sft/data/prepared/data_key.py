"""What identifies the sequence of global batches of a run: the data, their order, how they are cut and laid into rows.

A checkpoint holds it by the keys of the config, so that what differs can be named; a run that differs in one of them is
refused, since going on would repeat or skip examples. Ranks have the token caches open. The launcher has not: it asks
what would be in them (`expected_data_key`), without torch, numpy and transformers, so that such a run is refused before
it waits in a queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.contract.errors import LauncherError
from launcher.contract.spec import RunSpec
from sft.data.cache.key import (
    CODE_VERSION,
    FORMAT_VERSION,
    MadeFrom,
    cache_folder,
    key_of,
    made_from,
    recorded,
    recorded_sizes,
)
from sft.data.prepared.data_sets import DataSet, training_sets
from sft.data.reading.files import expand, known_digest, sha256_of
from sft.data.reading.formats import with_detected_form

HASH = "sha256:"
"""Stands before the keys of caches."""
NOT_READ = "(not read)"
"""Stands for tokens that differ from those of a checkpoint where it would take too long to say what they are."""
_WHOLE = 64 << 20
"""Bytes of the largest file that is read as a whole here: a login node is no place to read terabytes."""
_OF_FILES = ("data", "tokenizer", "template")
"""What of a cache's origin is read from files, which may be edited while the settings stay."""

DataKey = Mapping[str, object]


def data_key(spec: RunSpec, contents: Mapping[str, str]) -> dict[str, object]:
    """Return the key of a run. `contents` are the keys of the caches, by the config key of their files.

    Together with the step it is the whole state of the data.
    """
    data = spec.data
    rows = {"data.packing": data.packing, **({"data.seq_length": data.seq_length} if data.packing else {})}
    return {**{name: f"{HASH}{key}" for name, key in contents.items()}, **rows, **order_key(spec)}


def order_key(spec: RunSpec) -> dict[str, object]:
    """Return everything but the data that decides which examples each step holds."""
    data, train = spec.data, spec.train
    if data.cyclic_seed is not None:
        return {
            "train.global_batch_size": train.global_batch_size,
            "train.max_steps": train.max_steps,
            "data.cyclic_seed": data.cyclic_seed,
        }
    order: dict[str, object] = {
        "train.global_batch_unit": train.global_batch_unit,
        "train.global_batch_size": train.global_batch_size,
        "train.seed": train.seed,
        "data.shuffle": data.shuffle,
    }
    if train.global_batch_unit == "tokens":
        order["data.seq_length"] = data.seq_length
    else:
        order["data.group_by_length"] = data.group_by_length and data.shuffle
    if data.sources:
        order |= {f"data.sources.{name}.weight": source.weight for name, source in data.sources.items()}
        order["order of data.sources"] = list(data.sources)
    return order


def expected_data_key(spec: RunSpec, before: DataKey, tokenizer_dir: Path | None, *, same_settings: bool) -> DataKey:
    """Return the key that the ranks of a run will find, which goes on from a checkpoint with the key `before`.

    What cannot be known here is as it was. With `same_settings`, the run is the one that wrote the checkpoint: only
    files can have changed, and it runs its own copy of this code, of any version.
    """
    contents = {}
    for data_set in training_sets(spec.data):
        was = before.get(data_set.key)
        known = was.removeprefix(HASH) if isinstance(was, str) else None
        contents[data_set.key] = _expected_content(spec, data_set, known, tokenizer_dir, same_settings)
    return data_key(spec, contents)


def _expected_content(
    spec: RunSpec, data_set: DataSet, known: str | None, tokenizer_dir: Path | None, same_settings: bool
) -> str:
    """Return the key of a data set's cache, which is `known` where nothing says that it is another one."""
    if known is None:
        return NOT_READ  # that there was none suffices to tell
    folder = cache_folder(spec.cache_dir, known)
    then = recorded(folder, known)
    if then is None or tokenizer_dir is None:
        return known
    try:
        now = _now_made_from(spec, data_set, tokenizer_dir, then, recorded_sizes(folder), same_settings)
    except (LauncherError, OSError, ValueError):  # what is missing or cannot be read here is another's to tell
        return known
    return known if known in now else now[-1]


def _now_made_from(
    spec: RunSpec, data_set: DataSet, tokenizer_dir: Path, then: MadeFrom, sizes: list[int], same_settings: bool
) -> list[str]:
    """Return the keys that the cache may have now, the usual one last."""
    files = expand(data_set.data.train, data_set.key)
    data = with_detected_form(files, data_set.data, data_set.key)
    content = _content(files, spec.cache_dir / "digests", then, sizes)
    if content is None:
        return [NOT_READ]
    code = then["code"]
    assert isinstance(code, list), "its digest is that of the record"
    ours = code if same_settings else [CODE_VERSION, FORMAT_VERSION, *code[2:]]
    made = [made_from(data, content, tokenizer_dir, data_set.side, ours, earlier=earlier) for earlier in (True, False)]
    if same_settings:
        made = [{**then, **{name: each[name] for name in _OF_FILES}} for each in made]
    return [key_of(each) for each in made]


def _content(files: list[Path], notes: Path, then: MadeFrom, sizes: list[int]) -> list[str] | None:
    """Return the digests of files, those of large ones as they were. None where their sizes say that they are not."""
    digests = [known_digest(path, notes) or (sha256_of(path) if _is_small(path) else None) for path in files]
    found = [digest for digest in digests if digest is not None]
    if len(found) == len(digests):
        return found
    before = then["data"]
    assert isinstance(before, list), "its digest is that of the record"
    if [path.stat().st_size for path in files] != sizes or len(before) != len(digests):
        return None
    return [was if digest is None else digest for was, digest in zip(before, digests, strict=True)]


def _is_small(path: Path) -> bool:
    return path.stat().st_size <= _WHOLE
