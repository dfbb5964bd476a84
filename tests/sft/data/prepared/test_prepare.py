"""Files -> caches: keys, workers, races, waiting, and the messages for data that cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError, LauncherError
from launcher.contract.spec import DataSpec, LoggingSpec, RunSpec
from sft.data.cache import build, progress
from sft.data.cache.key import MANIFEST
from sft.data.cache.store import TokenCache
from sft.data.prepared import prepare
from sft.data.prepared.prepare import (
    check_vocabulary,
    open_or_build,
    prepare_data,
)
from sft.data.prepared.report import report
from tests.ranks import run_ranks
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def spec_of(tmp_path: Path, *, train: list[str] | None = None, bar: bool = False, **data: Any) -> RunSpec:
    files = train if train is not None else [str(write_jsonl(tmp_path / "train.jsonl", make_chat_rows(40, 1)))]
    values = {"train": files, "cache_dir": str(tmp_path / "cache"), "workers": 1, **data}
    return RunSpec(data=DataSpec(**values), logging=LoggingSpec(progress_bar=bar))


def arrays_of(cache: TokenCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.directory.glob("*.npy")}


def test_data_are_prepared_once(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validation = write_jsonl(tmp_path / "held-out.jsonl", make_chat_rows(7, 2))
    spec = spec_of(tmp_path, validation=[str(validation)])
    prepared = prepare_data(spec, tokenizer_dir)
    assert prepared.validation is not None
    assert (len(prepared.train), len(prepared.validation)) == (40, 7)
    monkeypatch.setattr(prepare, "write_parts", lambda *_, **__: pytest.fail("tokenized again"))
    again = open_or_build(spec, tokenizer_dir, build=True)
    assert again.train.directory == prepared.train.directory
    assert open_or_build(spec, tokenizer_dir, build=False, wait_seconds=0).train.key == prepared.train.key
    assert sorted(path.name for path in (tmp_path / "cache" / "tokens").iterdir()) == sorted(
        [prepared.train.directory.name, prepared.validation.directory.name]
    )


def test_spawned_workers_give_the_same_bytes(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch is loaded here, and a fork would be unsafe; order and bytes do not depend on the workers."""
    files = [str(write_jsonl(tmp_path / f"{n}.jsonl", make_chat_rows(400, n))) for n in range(2)]
    alone = open_or_build(spec_of(tmp_path, train=files, cache_dir=str(tmp_path / "alone")), tokenizer_dir, build=True)
    monkeypatch.setattr(build, "RANGE_BYTES", 1 << 16)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    spec = spec_of(tmp_path, train=files, workers=2, bar=True, cache_dir=str(tmp_path / "together"))
    together = open_or_build(spec, tokenizer_dir, build=True)
    assert len(together.train) == 800
    assert arrays_of(together.train) == arrays_of(alone.train)
    assert together.train.counts == alone.train.counts
    assert "tokenizing train" in capsys.readouterr().err


def test_bad_rows_are_named_in_the_order_of_the_files(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps(row) for row in make_chat_rows(12, 1)]
    rows[3] = '{"messages": '
    rows[4] = ""
    for index in range(5, 12):
        rows[index] = '{"messages": 1}'
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr(build, "RANGE_BYTES", 1 << 20)
    with pytest.raises(DataError) as caught:
        open_or_build(spec_of(tmp_path, train=[f"{tmp_path}/bad.jsonl"]), tokenizer_dir, build=True)
    assert caught.value.problems == (
        f"{tmp_path}/bad.jsonl:4: malformed JSON at column 13: Expecting value",
        *(f"{tmp_path}/bad.jsonl:{n}: messages must be a list of messages, found the number 1" for n in range(6, 10)),
    )
    assert not list((tmp_path / "cache" / "tokens").iterdir()), "a failed build leaves nothing behind"


def test_trap_10_data_without_a_supervised_token_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to fail (0/0 in the loss instead) without the check."""
    rows = [{"messages": [{"role": "user", "content": "hi"}]}] * 3
    spec = spec_of(tmp_path, train=[str(write_jsonl(tmp_path / "a.jsonl", rows))])
    with pytest.raises(DataError) as caught:
        open_or_build(spec, tokenizer_dir, build=True)
    assert str(caught.value) == (
        f"data.train: no token of 3 rows in {tmp_path}/a.jsonl is left to train on (3 without an assistant turn or "
        "cut before one, 0 too long); see data.loss_on, data.seq_length and data.length_policy"
    )


def test_trap_8_data_without_a_trained_terminator_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to fail (a model that never stops) without the check."""
    template = tmp_path / "no-end.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with pytest.raises(DataError, match=r"no answer in .* ends with a trained end token"):
        open_or_build(spec_of(tmp_path, chat_template=str(template)), tokenizer_dir, build=True)


def test_a_row_that_is_too_long_is_named_under_policy_error(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"train\.jsonl:1: \d+ tokens are more than data\.seq_length 16"):
        open_or_build(spec_of(tmp_path, seq_length=16, length_policy="error"), tokenizer_dir, build=True)


def test_other_messages(tmp_path: Path, tokenizer_dir: Path) -> None:
    for data, message in (
        ({"train": []}, "data.train: no files"),
        ({"train": ["/no/such.jsonl"]}, "data.train: no file '/no/such.jsonl'"),
        ({"validation": ["/no/such.jsonl"]}, "data.validation: no file '/no/such.jsonl'"),
        ({"columns": {"promt": "q"}}, "data.columns: unknown name 'promt'; did you mean 'prompt'?"),
        ({"chat_template": "/no/such.jinja"}, "data.chat_template: /no/such.jinja cannot be read"),
    ):
        with pytest.raises(LauncherError) as caught:
            open_or_build(spec_of(tmp_path, **data), tokenizer_dir, build=True)
        assert message in str(caught.value)


def test_the_report_counts_what_was_lost(tmp_path: Path, tokenizer_dir: Path) -> None:
    answer = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"messages": answer},
        {"messages": [*answer, {"role": "user", "content": "bye"}]},
        {"messages": answer[:1]},
        {"messages": [{"role": "user", "content": "a <|im_end|> b"}, answer[1]]},
        {"messages": [answer[0], {"role": "assistant", "content": "otter " * 100}]},
    ]
    spec = spec_of(tmp_path, train=[str(write_jsonl(tmp_path / "a.jsonl", rows))], seq_length=64, length_policy="drop")
    cache = open_or_build(spec, tokenizer_dir, build=True).train
    lines = report("train", cache).splitlines()
    counts = cache.counts
    assert (counts.rows, counts.examples, counts.too_long, counts.unsupervised, counts.escaped) == (5, 3, 1, 1, 1)
    assert counts.terminators == 3
    assert lines[0].startswith(f"train: 3 examples, {counts.tokens} tokens (mean ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["dropped", "dropped", "lost", "trimmed", "escaped"]


def test_ranks_wait_on_the_file_system_until_the_cache_is_there(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_POLL_SECONDS", 0.02)
    spec = spec_of(tmp_path)
    found: list[int] = []
    waiting = threading.Thread(
        target=lambda: found.append(len(open_or_build(spec, tokenizer_dir, build=False, wait_seconds=60).train))
    )
    waiting.start()
    time.sleep(0.1)
    assert not found
    open_or_build(spec, tokenizer_dir, build=True)
    waiting.join(30)
    assert found == [40]


def test_waiting_ends_with_a_reason(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(DataError, match=r"did not appear in 0 s; is data\.cache_dir on a file system that all nodes"):
        open_or_build(spec_of(tmp_path), tokenizer_dir, build=False, wait_seconds=0.01)


def _build(spec: RunSpec, folder: Path) -> int:
    return len(open_or_build(spec, folder, build=True).train)


def test_jobs_that_build_the_same_data_at_once_share_one_cache(tmp_path: Path, tokenizer_dir: Path) -> None:
    assert run_ranks(3, _build, spec_of(tmp_path), tokenizer_dir) == [40, 40, 40]
    (only,) = (tmp_path / "cache" / "tokens").iterdir()
    assert len(TokenCache.open(only)) == 40


def test_a_build_that_lost_the_race_uses_the_winners(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path)
    real = build.write_parts

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(prepare, "write_parts", real)
        open_or_build(spec, tokenizer_dir, build=True)
        return real(*arguments, **options)

    monkeypatch.setattr(prepare, "write_parts", overtaken)
    cache = open_or_build(spec, tokenizer_dir, build=True).train
    assert list((tmp_path / "cache" / "tokens").iterdir()) == [cache.directory]


def test_a_damaged_cache_is_built_again(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(tmp_path)
    cache = open_or_build(spec, tokenizer_dir, build=True).train
    (cache.directory / "ids.npy").write_bytes(b"")
    assert len(open_or_build(spec, tokenizer_dir, build=True).train) == 40
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("array", ["ids", "weights", "offsets", "target_weights", "supervised"])
def test_a_flipped_bit_is_found_before_training(
    array: str, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to train other data, with exit 0."""
    spec = spec_of(tmp_path)
    cache = prepare_data(spec, tokenizer_dir).train
    assert isinstance(cache, TokenCache)
    file = cache.directory / f"{array}.npy"
    before = file.read_bytes()
    file.write_bytes(before[:-5] + bytes([before[-5] ^ 1]) + before[-4:])
    del cache
    prepare_data(spec, tokenizer_dir)
    assert f"the bytes of {array} have changed; building it again" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_template_that_writes_the_date_is_told_that_of_the_run(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to give one cache key and two texts on two days."""
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}: " + make_tokenizer().get_chat_template())
    spec = spec_of(tmp_path)

    def prepared(template: str, day: str) -> TokenCache:
        data = dataclasses.replace(spec.data, chat_template=template, date=day)
        cache = open_or_build(dataclasses.replace(spec, data=data), tokenizer_dir, build=True).train
        assert isinstance(cache, TokenCache)
        return cache

    first, second = (prepared(str(template), day) for day in ("2026-01-31", "2026-02-01"))
    texts = [str(make_tokenizer().decode(cache.tokens(0)[0])) for cache in (first, second)]
    assert [text[:11] for text in texts] == ["31 Jan 2026", "01 Feb 2026"]
    assert first.key != second.key
    plain = [prepared("tokenizer", day).key for day in ("2026-01-31", "2026-02-01")]
    assert plain[0] == plain[1]


def test_what_a_killed_build_left_behind_is_removed_once_it_is_old(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path)
    left = tmp_path / "cache" / "tokens" / ".abc-123"
    left.mkdir(parents=True)
    open_or_build(spec, tokenizer_dir, build=True)
    assert left.exists(), "it may belong to a living job"
    monkeypatch.setattr(prepare, "_STALE_SECONDS", -1.0)
    changed = dataclasses.replace(spec, data=dataclasses.replace(spec.data, seq_length=99))
    open_or_build(changed, tokenizer_dir, build=True)
    assert not left.exists()


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tmp_path)
    real = build.write_parts

    def appended(*arguments: Any, **options: Any) -> Any:
        with Path(spec.data.train[0]).open("a") as file:
            file.write("\n")
        return real(*arguments, **options)

    monkeypatch.setattr(prepare, "write_parts", appended)
    with pytest.raises(DataError, match=r"data\.train: .*train\.jsonl changed while being read"):
        open_or_build(spec, tokenizer_dir, build=True)


def test_the_manifest_says_what_the_cache_was_made_from(tmp_path: Path, tokenizer_dir: Path) -> None:
    spec = spec_of(tmp_path)
    cache = open_or_build(spec, tokenizer_dir, build=True).train
    manifest = json.loads((cache.directory / MANIFEST).read_text())
    assert manifest["files"] == spec.data.train
    assert manifest["format"] == "messages"
    assert manifest["key"].startswith(cache.directory.name)


def test_ids_that_the_model_does_not_have_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Seen to fail (an index error on a rank, or a device-side assert) without the check."""
    rows = [{"input_ids": [5, 400, 2], "labels": [-100, 400, 2]}]
    spec = spec_of(tmp_path, train=[str(write_jsonl(tmp_path / "ids.jsonl", rows))])
    prepared = open_or_build(spec, tokenizer_dir, build=True)
    check_vocabulary(prepared, 401)
    with pytest.raises(DataError, match=r"data\.train: token id 400 is not in the model's vocabulary of 331"):
        check_vocabulary(prepared, 331)


def test_data_of_which_too_much_is_lost_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Also where the cache exists already. Seen to fail with the check only where caches are built."""
    lossy = {"seq_length": 48, "length_policy": "truncate_right"}
    spec = spec_of(tmp_path, **lossy)
    counts = open_or_build(spec, tokenizer_dir, build=True).train.counts
    assert counts.answers > counts.terminators
    limit = 100 * counts.supervised_lost / (counts.supervised_lost + counts.supervised_tokens)
    open_or_build(spec_of(tmp_path, max_lost_percent=limit + 0.1, **lossy), tokenizer_dir, build=True)
    with pytest.raises(DataError, match=r"tokens to be trained \(\d+\.\d %\); data\.max_lost_percent \d+"):
        open_or_build(spec_of(tmp_path, max_lost_percent=limit - 0.1, **lossy), tokenizer_dir, build=False)
    with pytest.raises(DataError, match=r"data\.max_lost_percent 101 must be between 0 and 100"):
        open_or_build(spec_of(tmp_path, max_lost_percent=101.0), tokenizer_dir, build=True)
    pieces = open_or_build(spec_of(tmp_path, seq_length=48, length_policy="split"), tokenizer_dir, build=True)
    assert pieces.train.counts.supervised_lost == 0
    assert pieces.train.counts.split > 0
    assert len(pieces.train) > 40
    assert "split: " in report("train", pieces.train)


@pytest.mark.parametrize("damage", ["gone", "cut", "nested", "other version"])
def test_a_cache_whose_manifest_is_gone_or_damaged_is_built_again(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Without its manifest a directory was in the way of every later build."""
    spec = spec_of(tmp_path)
    cache = open_or_build(spec, tokenizer_dir, build=True).training_caches[0]
    before = arrays_of(cache)
    manifest = cache.directory / MANIFEST
    if damage == "gone":
        manifest.unlink()
    elif damage == "other version":
        manifest.write_text('{"version": 2}')
    else:
        manifest.write_text(manifest.read_text()[:40] if damage == "cut" else "[" * 100_000)
    again = open_or_build(spec, tokenizer_dir, build=True).training_caches[0]
    assert arrays_of(again) == before
    assert "building it again" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"identity": null, "sha256": 5}', "[" * 100_000])
def test_a_damaged_digest_is_computed_again(tmp_path: Path, tokenizer_dir: Path, text: str) -> None:
    spec = spec_of(tmp_path)
    key = open_or_build(spec, tokenizer_dir, build=True).training_caches[0].key
    notes = tmp_path / "cache" / "digests"
    notes.mkdir(exist_ok=True)
    name = hashlib.sha256(str(Path(spec.data.train[0]).resolve()).encode()).hexdigest()[:32]
    (notes / f"{name}.json").write_text(text)
    assert open_or_build(spec, tokenizer_dir, build=True).training_caches[0].key == key


def test_data_that_are_not_to_end_can_be_asked_for(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Token rows without any end token were refused, and nothing said which key allows them."""
    rows = [{"input_ids": [300, 301, 302], "labels": [-100, 301, 302]}] * 3
    files = [str(write_jsonl(tmp_path / "tokens.jsonl", rows))]
    with pytest.raises(DataError, match=r"ends with a trained end token.*data\.require_end_tokens: false"):
        open_or_build(spec_of(tmp_path, train=files), tokenizer_dir, build=True)
    spec = spec_of(tmp_path, train=files, require_end_tokens=False)
    assert len(open_or_build(spec, tokenizer_dir, build=True).train) == 3


def test_settings_that_no_rows_are_read_with_are_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Rows of token ids were trained by their labels, whatever data.loss_on said."""
    rows = [{"input_ids": [300, 301, 302], "labels": [-100, 301, 302]}] * 3
    files = [str(write_jsonl(tmp_path / "tokens.jsonl", rows))]
    for policy, problem in (({"loss_on": "all"}, "data.loss_on: all"), ({"on_mismatch": "split"}, "on_mismatch: spl")):
        spec = spec_of(tmp_path, train=files, require_end_tokens=False, **policy)
        with pytest.raises(DataError, match=problem):
            open_or_build(spec, tokenizer_dir, build=True)
    chat = [str(write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(5, 2)))]
    spec = spec_of(tmp_path, train=files, validation=chat, require_end_tokens=False, loss_on="all")
    assert len(open_or_build(spec, tokenizer_dir, build=True).train) == 3
