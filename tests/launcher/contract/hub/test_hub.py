"""Models and data sets by hub id: fetched from a hub of the tests' own, pinned, found again without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.__main__ import main
from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError, HubError
from launcher.contract.hub.listing import listing_of
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.spec.fields import path_fields
from tests.hub_server import TOKEN, HubServer, serve
from tests.launcher.conftest import MODEL

pytest.importorskip("huggingface_hub")

WEIGHTS = bytes(range(256)) * 2_000
ROW = b'{"prompt": "a", "completion": "b"}\n'
MODEL_FILES = {
    "config.json": json.dumps(MODEL).encode(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"raise SystemExit",
}
CONFIG = """\
name: first
model: {path: org/model}
data: {train: [org/rows], seq_length: 128}
train: {max_steps: 3, global_batch_size: 4}
resources: {tasks_per_node: 2}
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a model and a data set, a fresh cache, and a config that names both in the current directory."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("cfg.yaml").write_text(CONFIG)
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.model("org/model", MODEL_FILES)
        server.data_set("org/rows", {"train.jsonl": ROW * 3, "test.jsonl": ROW})
        yield server
    listing_of.cache_clear()


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Have every test ask anew, as every process does."""
    listing_of.cache_clear()
    yield
    listing_of.cache_clear()


def load(*overrides: str) -> RunSpec:
    listing_of.cache_clear()
    return load_config(Path("cfg.yaml"), overrides).spec


def problems(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value)


def test_prepare_fetches_what_training_needs_and_nothing_that_runs_code(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "cfg.yaml"]) == 0
    snapshot = Path(load().model.path)
    assert {path.name for path in snapshot.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    }
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert snapshot.is_relative_to(tmp_path / "hf" / "hub")
    assert [Path(path).read_bytes() for path in load().data.train] == [ROW * 3]
    captured = capsys.readouterr()
    assert "org/model at commit" in captured.out
    assert "Fetching" in captured.err  # a progress bar


def test_validate_fetches_no_weights(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml"]) == 0
    captured = capsys.readouterr()
    assert "model.path: org/model at commit" in captured.out
    assert captured.err == ""  # no bar for a file of some hundred bytes
    assert hub.fetched() == ["config.json"]


def test_a_second_time_nothing_is_fetched_and_without_the_network_it_works_too(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "cfg.yaml"]) == 0
    spec, before = load(), len(hub.fetched())
    assert main(["prepare", "cfg.yaml"]) == 0
    assert len(hub.fetched()) == before
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load() == spec
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert load() == spec
    capsys.readouterr()
    listing_of.cache_clear()
    assert main(["validate", "cfg.yaml"]) == 0
    assert "from the cache, the hub cannot be reached" in capsys.readouterr().out


def test_a_moved_branch_moves_new_runs_and_not_those_that_are_pinned(hub: HubServer) -> None:
    first = load()
    commit = hub.model(
        "org/model", {**MODEL_FILES, "config.json": json.dumps({**MODEL, "num_hidden_layers": 2}).encode()}
    )
    assert load().model.revision == commit != first.model.revision
    pinned = load(f"model.revision={first.model.revision}")
    assert pinned.model == first.model


def test_the_run_keeps_paths_and_commits(hub: HubServer, tmp_path: Path) -> None:
    from launcher.submission.lockfile import read_lockfile
    from launcher.submission.submission import make_submission
    from launcher.submission.submit import prepare

    submission = make_submission(Path("cfg.yaml"))
    prepare(submission, ["launcher"], group="g")
    spec = read_resolved(submission.paths.config)
    model, rows = hub.repos["models", "org/model"].branches["main"], hub.repos["datasets", "org/rows"].branches["main"]
    assert (spec.model.revision, spec.data.hub.revision) == (model, rows)
    assert all(
        Path(field.path).is_absolute() and Path(field.path).exists()
        for field in path_fields(spec)
        if "hub" in field.path
    )
    files = read_lockfile(submission.paths.lock)["files"]
    assert f"org/model@{model}/model.safetensors" in files["model.path"]
    assert list(files["data.train"]) == [f"org/rows@{rows}/train.jsonl"]
    text = submission.paths.config.read_text()
    listing_of.cache_clear()
    hub.model("org/model", {"config.json": b"{}"})  # a run that goes on does not ask
    again = load_config(submission.paths.config, resolved=True).spec
    assert yaml.safe_load(text) == yaml.safe_load(submission.paths.config.read_text())
    assert again == spec


def test_a_lock_file_is_submitted_again_with_another_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.submission.lockfile import submission_of_lockfile
    from launcher.submission.submission import make_submission
    from launcher.submission.submit import prepare

    submission = make_submission(Path("cfg.yaml"))
    prepare(submission, ["launcher"], group="g")
    hub.model("org/model", {**MODEL_FILES, "model.safetensors": WEIGHTS[::-1]})
    (tmp_path / "hf").rename(tmp_path / "gone")
    listing_of.cache_clear()
    again, _ = submission_of_lockfile(submission.paths.lock, [], None)
    prepare(again, ["launcher"], group="g")
    assert (Path(again.spec.model.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert again.spec.model.revision == submission.spec.model.revision


def test_the_tokenizer_of_another_repository_is_fetched_on_another_machine(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.submission.lockfile import submission_of_lockfile
    from launcher.submission.resubmit import fetch_again
    from launcher.submission.submission import make_submission
    from launcher.submission.submit import prepare

    hub.model(
        "org/words",
        {"tokenizer.json": b'{"first": 1}', "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'},
    )
    submission = make_submission(Path("cfg.yaml"), ["model.tokenizer=org/words"])
    prepare(submission, ["launcher"], group="g")
    assert "/models--org--words/snapshots/" in str(submission.spec.model.tokenizer)
    hub.model(
        "org/words",
        {"tokenizer.json": b'{"second": 2}', "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'},
    )
    (tmp_path / "hf").rename(tmp_path / "gone")
    listing_of.cache_clear()
    fetch_again(read_resolved(submission.paths.config))  # in the cache that the run's config names
    again, _ = submission_of_lockfile(submission.paths.lock, [], None)
    prepare(again, ["launcher"], group="g")
    assert (Path(str(again.spec.model.tokenizer)) / "tokenizer.json").read_bytes() == b'{"first": 1}'
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    (tmp_path / "hf").rename(tmp_path / "gone-as-well")
    listing_of.cache_clear()
    elsewhere, _ = submission_of_lockfile(submission.paths.lock, ["name=elsewhere"], None)
    prepare(elsewhere, ["launcher"], group="g")
    assert str(elsewhere.spec.model.tokenizer).startswith(str(tmp_path / "other"))
    assert (Path(str(elsewhere.spec.model.tokenizer)) / "tokenizer.json").read_bytes() == b'{"first": 1}'


def test_a_cut_connection_goes_on_where_it_was(hub: HubServer) -> None:
    weights = bytes(12 << 20)
    hub.model("org/model", {**MODEL_FILES, "model.safetensors": weights})
    hub.cut_after["model.safetensors"] = 11 << 20
    assert main(["prepare", "cfg.yaml"]) == 0
    assert (Path(load().model.path) / "model.safetensors").read_bytes() == weights
    # huggingface_hub keeps what it has in pieces of 10 MiB.
    assert [line.split()[2] for line in hub.requests if "bytes=" in line] == [f"bytes={10 << 20}-"]


def test_a_gated_model_is_refused_with_what_to_do_and_fetched_with_a_token(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["models", "org/model"].gated = True
    assert "cfg.yaml:2: model.path: model org/model is gated: accept its conditions" in problems()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["submit", "cfg.yaml", "--dry-run"]) == 0
    from launcher.submission.submission import make_submission
    from launcher.submission.submit import prepare

    prepare(make_submission(Path("cfg.yaml")), ["launcher"], group="g")
    stored = [path for path in (tmp_path / "work").rglob("*") if path.is_file()]
    assert len(stored) > 4
    assert not [path for path in stored if TOKEN.encode() in path.read_bytes()]


def test_what_does_not_exist_is_named(hub: HubServer) -> None:
    assert "the hub has no model org/modle, or it is private" in problems("model.path=org/modle")
    assert "model org/model has no revision 'v9'" in problems("model.revision=v9")
    assert "no split 'dev'; it has test, train" in problems("data.train=org/rows:dev")
    assert "needs its split, e.g. org/rows:validation" in problems("data.validation=org/rows")
    assert "'train[:9]' is not the name of a split" in problems("data.train=org/rows:train[:9]")
    assert "HF_HUB_OFFLINE is set" in _offline_problem("model.path=org/other")


def _offline_problem(word: str) -> str:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return problems(word)
    finally:
        del os.environ["HF_HUB_OFFLINE"]


def test_pickled_weights_are_refused(hub: HubServer) -> None:
    hub.model("org/old", {"config.json": MODEL_FILES["config.json"], "pytorch_model.bin": b"pickle"})
    assert "only pytorch_model.bin: pickled weights run code" in problems("model.path=org/old")


def test_shards_are_those_of_the_index(hub: HubServer) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {name: MODEL_FILES[name] for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.model("org/big", {**files, "model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"})
    assert main(["prepare", "cfg.yaml", "model.path=org/big"]) == 0
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= set(hub.fetched())
    hub.model("org/torn", {**files, "model-00001-of-00002.safetensors": b"1"})
    assert "names model-00002-of-00002.safetensors, which the repository does not have" in problems(
        "model.path=org/torn"
    )


def test_a_folder_of_that_name_is_taken_with_a_word(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("org/model")
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(MODEL_FILES["config.json"])
    assert main(["validate", "cfg.yaml", "data.train=org/rows:train"]) == 0
    assert "org/model is taken from this directory, not from the hub" in capsys.readouterr().out
    assert load("data.train=org/rows:train").model.path == str(folder.absolute())
    assert "model.revision: main needs a model of the hub" in problems(
        "model.revision=main", "data.train=org/rows:train"
    )


def test_a_mistyped_path_is_not_sent_to_the_hub(hub: HubServer) -> None:
    Path("models").mkdir()
    assert "the hub was not asked, as models/ is a folder here" in problems("model.path=models/modle")
    assert "no file matches" in problems("data.train=data/train.jsonl")
    assert not [line for line in hub.requests if "modle" in line or "jsonl" in line]


def test_data_by_split_config_and_revision(hub: HubServer) -> None:
    old = hub.data_set(
        "org/many", {"main/train/0.jsonl": ROW, "extra/train/0.jsonl": ROW * 2, "main/test/0.jsonl": ROW}
    )
    hub.data_set("org/many", {"main/train/0.jsonl": ROW * 5})
    words = ["data.train=org/many", "data.hub.config=main", f"data.hub.revision={old}", "data.validation=org/many:test"]
    spec = load(*words)
    assert [Path(path).parent.parts[-3:] for path in spec.data.train] == [(old, "main", "train")]
    assert [Path(path).parent.parts[-3:] for path in spec.data.validation] == [(old, "main", "test")]
    assert spec.data.hub.revision == old
    assert "several configs (extra, main)" in problems("data.train=org/many", f"data.hub.revision={old}")
    assert "data.hub: split needs a data set of the hub" in problems("data.train=cfg.yaml", "data.hub.split=test")
    assert "give each a source of its own" in problems("data.train=[org/many,org/rows]", "data.hub.config=main")
    given = ["data.train=org/many:test", "data.hub.config=main", "data.hub.split=train"]  # which was not read
    assert "data.hub.split: train: org/many has a split in its id; drop one" in problems(*given)


def test_sources_have_hub_settings_of_their_own(hub: HubServer) -> None:
    Path("cfg.yaml").write_text(
        CONFIG.replace(
            "train: [org/rows]", "sources: {a: {files: [org/rows], hub: {split: test}}, b: {files: ['org/rows:train']}}"
        )
    )
    spec = load()
    assert [Path(path).name for path in spec.data.sources["a"].files] == ["test.jsonl"]
    assert [Path(path).name for path in spec.data.sources["b"].files] == ["train.jsonl"]


def test_a_held_out_set_of_several_files_is_a_glob_of_just_these(hub: HubServer) -> None:
    names = [f"data/{name}-0000{n}-of-00002.jsonl" for name in ("test", "testb") for n in (0, 1)]
    files = {name: f'{{"prompt": "{name}", "completion": "b"}}\n'.encode() for name in names}
    hub.data_set("org/sharded", {**files, "data/train-00000-of-00001.jsonl": ROW})
    spec = load("data.validation_sets={held: 'org/sharded:test'}")
    assert Path(spec.data.validation_sets["held"]).name == "test-0000*-of-00002.jsonl"
    assert main(["prepare", "cfg.yaml", "data.validation_sets={held: 'org/sharded:test'}"]) == 0
    assert sorted(name for name in hub.fetched() if name.startswith("test")) == [
        "test-00000-of-00002.jsonl",
        "test-00001-of-00002.jsonl",
    ]


def test_settings_of_a_resolved_config_come_too_late(hub: HubServer) -> None:
    from launcher.contract.spec import to_yaml

    Path("resolved.yaml").write_text(to_yaml(load()))
    assert main(["prepare", "resolved.yaml"]) == 0
    with pytest.raises(ConfigError, match="test is not what these files are; name the data set by id"):
        load_config(Path("resolved.yaml"), ["data.hub.split=test"], resolved=True)
    with pytest.raises(ConfigError, match=r"but model\.path is of commit"):
        load_config(Path("resolved.yaml"), ["model.revision=main"], resolved=True)


def test_part_of_a_data_set_in_the_cache_is_not_taken_for_all_of_it(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.data_set("org/two", {"train/a.jsonl": ROW, "train/b.jsonl": ROW})
    assert main(["prepare", "cfg.yaml", "data.train=org/two"]) == 0
    Path(load("data.train=org/two").data.train[1]).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "train/b.jsonl is not in the cache (HF_HUB_OFFLINE is set)" in problems("data.train=org/two")


def test_a_hub_that_fails_is_said_to(hub: HubServer) -> None:
    hub.status = 503
    assert "the hub answered with status 503" in problems()


def test_without_huggingface_hub_the_cache_is_read_and_the_extra_is_named(hub: HubServer, tmp_path: Path) -> None:
    assert main(["prepare", "cfg.yaml"]) == 0
    hide = tmp_path / "hide"
    (hide / "huggingface_hub").mkdir(parents=True)
    (hide / "huggingface_hub" / "__init__.py").write_text("raise ImportError('not installed')")
    root = Path(__file__).parents[4]
    environment = {**os.environ, "PYTHONPATH": f"{hide}:{root}"}
    validate = [sys.executable, "-m", "launcher", "validate", "cfg.yaml"]
    done = subprocess.run(validate, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*validate, "model.path=org/x"], env=environment, capture_output=True, text=True, check=False)
    assert "pip install 'slurm-sft-launcher[hub]'" in done.stderr


def test_a_container_sees_the_whole_cache(hub: HubServer, tmp_path: Path) -> None:
    spec = load()
    mounts = {field.rule.mount(field.path) for field in path_fields(spec) if field.key in ("model.path", "data.train")}
    assert mounts == {tmp_path / "hf" / "hub"}


def test_init_looks_at_what_the_hub_has(hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    settings = json.dumps({"added_tokens_decoder": {"1": {"content": "<|im_start|>"}, "2": {"content": "<|im_end|>"}}})
    hub.model("org/base", {**MODEL_FILES, "tokenizer_config.json": settings.encode()})
    words = ["init", "--model", "org/base", "--data", "org/rows", "--cluster", "local", "--gpus", "0"]
    assert main([*words, "--output", "new.yaml"]) == 0
    values = yaml.safe_load(Path("new.yaml").read_text())
    assert values["model"]["path"] == "org/base"
    assert values["data"]["train"] == ["org/rows"]
    assert values["data"]["chat_template"] == "chatml"
    assert "about 3 rows" in capsys.readouterr().out
    assert "model.safetensors" not in hub.fetched()
    listing_of.cache_clear()
    assert main(["submit", "new.yaml", "--dry-run"]) == 0


def test_a_run_that_goes_on_fetches_what_the_cache_has_lost(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.submission.resubmit import fetch_again
    from launcher.submission.submission import make_submission
    from launcher.submission.submit import prepare

    submission = make_submission(Path("cfg.yaml"))
    prepare(submission, ["launcher"], group="g")
    spec = read_resolved(submission.paths.config)
    before = len(hub.requests)
    fetch_again(spec)
    assert len(hub.requests) == before  # nothing is missing: the hub is not asked
    (Path(spec.model.path) / "model.safetensors").resolve().unlink()
    Path(spec.data.train[0]).resolve().unlink()
    listing_of.cache_clear()
    fetch_again(spec)
    assert (Path(spec.model.path) / "model.safetensors").read_bytes() == WEIGHTS
    assert Path(spec.data.train[0]).read_bytes() == ROW * 3
    (tmp_path / "hf").rename(tmp_path / "gone")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    listing_of.cache_clear()
    with pytest.raises(HubError, match="set HF_HUB_CACHE to the one it was"):
        fetch_again(spec)


def test_rows_that_no_format_fits_are_refused_when_they_have_come(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.data_set("org/odd", {"train.jsonl": b'{"question": "a", "answer": "b"}\n'})
    assert main(["validate", "cfg.yaml", "data.train=org/odd"]) == 0
    assert main(["prepare", "cfg.yaml", "data.train=org/odd"]) == 2
    assert "train.jsonl:1: no format fits the keys" in capsys.readouterr().err
    listing_of.cache_clear()
    assert main(["submit", "cfg.yaml", "data.train=org/odd"]) == 2
    assert not Path("runs").exists()


def test_no_file_of_a_repository_is_outside_of_its_snapshot(hub: HubServer) -> None:
    hub.data_set("org/evil", {"../../../../../train.jsonl": ROW, "/train.jsonl": ROW})
    assert "it has no data file that can be read" in problems("data.train=org/evil")
