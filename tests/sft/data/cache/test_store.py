"""The cache on disk: complete or absent, the same however it was cut into parts, safe against races."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launcher.contract.errors import DataError
from sft.data.cache.key import MANIFEST
from sft.data.cache.store import Counts, TokenCache, assemble, publish, write_part
from tests.sft.caches_for_tests import make_cache, ragged_pairs


def test_examples_come_back_as_they_were_written(tmp_path: Path) -> None:
    pairs = ragged_pairs(50)
    cache = make_cache(tmp_path / "cache", pairs, per_part=7)
    assert len(cache) == 50
    for i, (ids, weights) in enumerate(pairs):
        got_ids, got_weights = cache.tokens(i)
        assert got_ids.tolist() == ids
        assert got_weights.tolist() == weights
        assert cache.target_weights[i] == sum(weights[1:])
        assert cache.supervised[i] == sum(weight != 0 for weight in weights[1:])
    assert cache.lengths.tolist() == [len(ids) for ids, _ in pairs]
    assert cache.ids.dtype == np.int32
    assert cache.counts.tokens == sum(len(ids) for ids, _ in pairs)


def test_the_bytes_do_not_depend_on_how_work_was_cut(tmp_path: Path) -> None:
    pairs = ragged_pairs(30)
    caches = [make_cache(tmp_path / str(size), pairs, per_part=size) for size in (1, 4, 1000)]
    for name in ("ids.npy", "weights.npy", "offsets.npy", "target_weights.npy", "supervised.npy", MANIFEST):
        assert len({(cache.directory / name).read_bytes() for cache in caches}) == 1
    assert not list((tmp_path / "4").glob("part-*"))


def test_a_part_without_examples_is_passed_over(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    directory.mkdir()
    pair = (np.array([1, 2], dtype=np.int32), np.array([0, 1], dtype=np.float32))
    parts = [write_part(directory / f"part-{i}", [pair] * n, Counts(rows=2)) for i, n in enumerate((0, 1, 0, 2))]
    counts = assemble(directory, "key", parts)
    assert (counts.rows, counts.examples) == (8, 3)
    assert TokenCache.open(directory).offsets.tolist() == [0, 2, 4, 6]


def test_a_missing_or_cut_array_is_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(5))
    array = cache.directory / "weights.npy"
    array.write_bytes(array.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data cache .*cache is damaged .*; delete it and prepare again"):
        TokenCache.open(cache.directory)
    array.unlink()
    with pytest.raises(DataError, match=r"weights\.npy"):
        TokenCache.open(cache.directory)


def test_arrays_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(5))
    other = make_cache(tmp_path / "other", ragged_pairs(5, seed=1))
    for name in ("ids", "weights"):
        shutil.copy(other.directory / f"{name}.npy", cache.directory)
    with pytest.raises(DataError, match="ids, weights does not fit the manifest"):
        TokenCache.open(cache.directory)


@pytest.mark.parametrize("key", ["counts", "answer_ends", "unread", "crc32", "key"])
def test_a_changed_manifest_is_refused(tmp_path: Path, key: str) -> None:
    """Seen to be read: another token would be what the model is said to stop with."""
    file = make_cache(tmp_path / "cache", ragged_pairs(5)).directory / MANIFEST
    manifest = json.loads(file.read_text())
    manifest[key] = {"7": 1}
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"the bytes of manifest\.json have changed"):
        TokenCache.open(file.parent)


def test_the_first_to_publish_wins_and_the_other_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = (make_cache(tmp_path / name, ragged_pairs(3)).directory for name in ("first", "second"))
    final = tmp_path / "final"
    assert publish(first, final)
    assert not publish(second, final)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]
    assert len(TokenCache.open(final)) == 3


def test_an_open_cache_survives_its_removal(tmp_path: Path) -> None:
    """Somebody may clear the cache directory while a run reads from it."""
    cache = make_cache(tmp_path / "cache", [([1, 2], [0.0, 1.0])])
    for path in cache.directory.iterdir():
        path.unlink()
    assert cache.tokens(0)[0].tolist() == [1, 2]


def test_counts_add_up_and_keep_the_largest() -> None:
    joined = Counts(rows=1, longest=5, largest_id=9, truncated=1) + Counts(rows=2, longest=4, largest_id=11)
    assert joined == Counts(rows=3, longest=5, largest_id=11, truncated=1)


def test_a_cache_of_an_earlier_version_is_not_called_damaged(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(5))
    file = cache.directory / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["version"] = 2
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"data cache .*cache was made by an earlier version; prepare again"):
        TokenCache.open(cache.directory)
