"""Import -> sharded checkpoint -> export is bitwise the identity under any layout; an export is whole or absent."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.contract.errors import CheckpointError, RunStateError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import to_yaml
from sft.checkpoint.files import seal
from sft.commands.export import export_run
from sft.hf import exporter as hf_export
from sft.hf.exporter import export_checkpoint, plan_files
from sft.hf.sharded_reader import ShardedReader
from sft.models.registry import SUPPORTED, read_architecture
from sft.models.stored_tensors import weight_map
from tests.parity.runs import make_run, run_training
from tests.ranks import run_ranks
from tests.sft.hf_cases import drop_prefix, example_ids, hf_logits, run_spec, save_hf_model, save_sharded
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(set(weight_map(directory).values()))
        for name, tensor in load_file(directory / file).items()
    }


def expect_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model with tokenizer and a vocabulary that two ranks pad."""
    return make_tiny_model(tmp_path_factory.mktemp("source") / "model", tied=True)


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model as two tensor-parallel ranks save it."""
    directory = tmp_path_factory.mktemp("checkpoint") / "sharded"
    run_ranks(2, save_sharded, run_spec(source, 2, tensor_parallel=2), directory, init=True)
    return directory


@pytest.mark.parametrize(
    ("case", "ranks", "topology", "dtype"),
    [
        *((case, 2, {"pipeline_parallel": 2}, torch.float32) for case in SUPPORTED),
        ("llama", 1, {}, torch.float32),
        ("llama", 3, {"tensor_parallel": 3}, torch.float32),
        ("llama_one_kv_head", 2, {"tensor_parallel": 2}, torch.float32),
        ("qwen2_tied", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, torch.float32),
        ("qwen3", 3, {"tensor_parallel": 3}, torch.bfloat16),
        ("gemma", 3, {"tensor_parallel": 3}, torch.float32),
        ("phi3", 3, {"tensor_parallel": 3}, torch.bfloat16),
        ("phi3_partial_rope", 4, {"tensor_parallel": 2, "pipeline_parallel": 2}, torch.float32),
        ("llama_tied", 6, {"tensor_parallel": 3, "pipeline_parallel": 2}, torch.float32),
    ],
)
def test_round_trip_is_bitwise(
    case: str, ranks: int, topology: dict[str, int], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = save_hf_model(case, tmp_path / "model", dtype=dtype)
    precision = "bf16" if dtype == torch.bfloat16 else "fp32"
    spec = run_spec(model, ranks, precision, **topology)
    run_ranks(ranks, save_sharded, spec, tmp_path / "sharded", init=True)

    export_checkpoint(tmp_path / "sharded", model, tmp_path / "export")

    expect_equal(weights(tmp_path / "export"), weights(model))
    assert (tmp_path / "export/config.json").read_bytes() == (model / "config.json").read_bytes()
    ids = example_ids()
    assert torch.equal(hf_logits(tmp_path / "export", ids), hf_logits(model, ids))


def test_gpt2_as_published_keeps_its_names(tmp_path: Path) -> None:
    model = save_hf_model("gpt2", tmp_path / "model")
    drop_prefix(model, "transformer.")
    run_ranks(1, save_sharded, run_spec(model, 1), tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", model, tmp_path / "export")
    expect_equal(weights(tmp_path / "export"), weights(model))
    assert "wte.weight" in weights(model)
    ids = example_ids()
    assert torch.equal(hf_logits(tmp_path / "export", ids), hf_logits(model, ids))


def test_the_whole_directory(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    (source / "notes.txt").touch()
    export_checkpoint(checkpoint, source, export)

    expect_equal(weights(export), weights(source))
    assert "lm_head.weight" not in weights(export)
    assert weights(export)["model.embed_tokens.weight"].shape[0] == 331
    expected = {path.name for path in source.iterdir()} - {"notes.txt"}
    assert {path.name for path in export.iterdir()} == expected
    assert expected >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_several_weight_files_and_another_number_type(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_export, "MAX_FILE_BYTES", 100_000)
    export = tmp_path / "export"
    export_checkpoint(checkpoint, source, export, dtype=torch.bfloat16)

    expect_equal(weights(export), {name: tensor.bfloat16() for name, tensor in weights(source).items()})
    files = sorted(path.name for path in export.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((export / file).stat().st_size < 110_000 for file in files)
    index = json.loads((export / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(export).values())
    config = json.loads((export / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    hf_logits(export, example_ids())


def test_a_source_without_weights_takes_the_checkpoints_type(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    shape_only = tmp_path / "shape"
    shape_only.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (shape_only / "config.json").write_text(json.dumps(config))
    export_checkpoint(checkpoint, shape_only, tmp_path / "export", tokenizer_dir=source)

    expect_equal(weights(tmp_path / "export"), weights(source))
    assert json.loads((tmp_path / "export/config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "export/tokenizer.json").is_file()


def test_the_template_of_the_run_goes_along(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    export_checkpoint(checkpoint, source, tmp_path / "export", chat_template=template.read_bytes())
    assert (tmp_path / "export/chat_template.jinja").read_text() == template.read_text()


def test_a_failed_export_keeps_the_earlier_one(
    source: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = tmp_path / "export"
    export_checkpoint(checkpoint, source, export)
    before = weights(export)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "write_weights", full)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(checkpoint, source, export)

    assert str(caught.value) == f"export {export}: cannot be written ([Errno 28] No space left on device)"
    expect_equal(weights(export), before)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_earlier_export_is_replaced(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "leftover").touch()
    export_checkpoint(checkpoint, source, export)
    assert not (export / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_checkpoint_of_another_model(checkpoint: Path, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", tied=True, layers=3)
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(checkpoint, other, tmp_path / "export")
    assert str(caught.value) == (
        f"checkpoint {checkpoint}: decoder.layers.self_attention.linear_qkv.layer_norm_weight is [4, 64]; "
        "config.json says [3, 64]"
    )
    assert not (tmp_path / "export").exists()


def test_a_checkpoint_without_a_file(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoint.iterdir():
        if not path.name.startswith("__1_"):
            (damaged / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=rf"checkpoint {damaged}: embedding\..* cannot be read \(.*No such file"):
        export_checkpoint(damaged, source, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_what_is_not_a_sharded_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        export_checkpoint(tmp_path, source, tmp_path / "export")
    assert str(caught.value) == f"checkpoint {tmp_path}: no .metadata; it is not a sharded checkpoint"


def test_an_index_cannot_run_code(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(CheckpointError, match="does not belong into an index"):
        ShardedReader(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_files_are_planned_by_size(source: Path) -> None:
    model = read_architecture(source)
    names = weight_map(source)
    plan = plan_files(model, dict.fromkeys(names, torch.float32), most=1)
    assert all(len(file) == 1 for file in plan)
    assert len(plan_files(model, dict.fromkeys(names, torch.float32), most=10**9)) == 1


def test_a_run_is_exported_from_its_newest_checkpoint(source: Path, checkpoint: Path, tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    with pytest.raises(RunStateError) as caught:
        export_run(paths.root)
    assert str(caught.value) == f"{paths.root} is not a run directory: it has no config.yaml"

    paths.config.write_text(to_yaml(run_spec(source, 1)))
    (paths.checkpoint(9) / "sharded").mkdir(parents=True)
    with pytest.raises(RunStateError) as caught:
        export_run(paths.root)
    assert str(caught.value) == f"{paths.root}: no complete checkpoint to export; let the run reach its first one"

    shutil.copytree(checkpoint, paths.checkpoint(5) / "sharded")
    seal(paths.checkpoint(5), {})
    assert export_run(paths.root).step == 5
    expect_equal(weights(paths.export), weights(source))


def test_trained_runs_export_the_same_model_whatever_their_layout(source: Path, tmp_path: Path) -> None:
    """With the optimizer's tensors in the checkpoint, and a tied embedding whose two copies took every step."""
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(24, seed=3))
    layouts: list[tuple[int, dict[str, Any]]] = [
        (1, {}),
        (2, {"pipeline_parallel": 2}),
        (4, {"tensor_parallel": 2, "sequence_parallel": True}),
    ]
    exports = []
    for ranks, topology in layouts:
        paths = make_run(tmp_path, source, chat, name=f"run{ranks}", ranks=ranks, topology=topology, max_steps=3)
        run_training(paths, ranks)
        export_run(paths.root)
        exports.append(paths.export)

    first = hf_logits(exports[0], example_ids(vocab=331))
    assert (first - hf_logits(source, example_ids(vocab=331))).abs().max() > 0.1
    for export in exports:
        assert weights(export).keys() == weights(source).keys()
        assert (hf_logits(export, example_ids(vocab=331)) - first).abs().max() < 1e-4
