"""NeMo 2 and Megatron-core sharded checkpoints become the Hugging Face model they were written from, bit for bit."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launcher.contract.errors import CheckpointError, ModelError
from launcher.contract.model_shape import read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint, read_shape
from launcher.contract.spec import DataSpec, ModelSpec, RunSpec
from sft.hf.sharded_reader import ShardedReader
from sft.model_source import resolve_model_dir
from sft.models.registry import read_architecture
from sft.nemo.convert import convert_nemo
from sft.nemo.export import export_nemo2
from tests.ranks import run_ranks
from tests.sft.hf_cases import example_ids, hf_logits, rank_logits, run_spec, save_hf_model, save_sharded
from tests.tiny_model import make_tokenizer

WRITABLE = ["gpt2", "gpt2_untied", "llama", "llama_tied", "llama_llama3_rope", "llama_linear_rope", "qwen2", "qwen3"]


def resolved(path: Path, cache: Path) -> Path:
    return resolve_model_dir(RunSpec(model=ModelSpec(path=str(path)), data=DataSpec(cache_dir=str(cache))))


def assert_same_tensors(found: Path, expected: Path) -> None:
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


@pytest.mark.parity
@pytest.mark.parametrize("case", ["llama_mha", "gpt2"])
def test_shards_that_megatron_core_wrote_load_under_another_topology(case: str, tmp_path: Path) -> None:
    """Written by 2 tensor ranks in 2 stages, which pad the vocabulary; read by 3 tensor ranks in one stage."""
    save_hf_model(case, tmp_path / "hf")
    source = tmp_path / "mcore"
    spec = run_spec(tmp_path / "hf", 4, tensor_parallel=2, pipeline_parallel=2)
    run_ranks(4, save_sharded, spec, source, init=True)
    (source / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    assert is_checkpoint(source)
    embedding = "embedding.word_embeddings.weight"
    vocab = read_shape(source).vocab_size
    assert ShardedReader(source).shape(embedding)[0] > vocab  # there is padding to cut
    converted = resolved(source, tmp_path / "cache")
    assert_same_tensors(converted, tmp_path / "hf")
    ids = example_ids(vocab)
    found = run_ranks(3, rank_logits, run_spec(converted, 3, tensor_parallel=3), ids.tolist(), init=True)
    assert torch.allclose(torch.from_numpy(found[0]), hf_logits(tmp_path / "hf", ids), atol=1e-5)


@pytest.mark.parametrize(("case", "dtype"), [("llama", torch.bfloat16), *((case, torch.float32) for case in WRITABLE)])
def test_written_for_nemo_and_read_again_is_the_same_model(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_hf_model(case, tmp_path / "hf", dtype)
    make_tokenizer(331).save_pretrained(tmp_path / "hf")
    export_nemo2(tmp_path / "hf", tmp_path / "nemo")
    assert is_checkpoint(tmp_path / "nemo")
    converted = resolved(tmp_path / "nemo", tmp_path / "cache")
    assert_same_tensors(converted, tmp_path / "hf")
    assert read_architecture(converted) == read_architecture(tmp_path / "hf")
    assert read_shape(tmp_path / "nemo") == read_model_shape(converted)
    assert (converted / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def nemo2(tmp_path: Path) -> Path:
    save_hf_model("llama", tmp_path / "hf", vocab_size=331)
    make_tokenizer(331).save_pretrained(tmp_path / "hf")
    export_nemo2(tmp_path / "hf", tmp_path / "nemo")
    return tmp_path / "nemo"


def edit(checkpoint: Path, **fields: Any) -> None:
    path = checkpoint / "context" / "model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"].update(fields)
    path.write_text(yaml.safe_dump(model))


def test_without_a_stated_vocabulary_the_tokenizer_beside_it_is_counted(tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    edit(source, vocab_size=None)
    assert read_shape(source).vocab_size == 331
    (source / "context" / "nemo_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"config.vocab_size is not set, and there is no tokenizer.json"):
        read_shape(source)


def test_a_tokenizer_that_is_named_outside_the_checkpoint_is_not_followed(tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    path = source / "context" / "model.yaml"
    model = yaml.safe_load(path.read_text())
    model["tokenizer"]["pretrained_model_name"] = "../.."
    path.write_text(yaml.safe_dump(model))
    (tmp_path / "vocab.json").write_text("{}")
    assert not (resolved(source, tmp_path / "cache") / "vocab.json").exists()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"num_moe_experts": 8}, "config.num_moe_experts 8 is not supported"),
        ({"rotary_percent": 0.5}, "config.rotary_percent 0.5 is not supported"),
        ({"normalization": "LayerNorm"}, "it is not a llama-like model: normalization 'LayerNorm'"),
        ({"hidden_size": None}, "config.hidden_size None is not a size"),
    ],
)
def test_another_model_is_refused_by_what_makes_it_one(fields: dict[str, Any], problem: str, tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    edit(source, **fields)
    with pytest.raises(ModelError, match=problem):
        read_shape(source)


def test_classes_that_do_more_than_their_fields_say_are_refused(tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    path = source / "context" / "model.yaml"
    path.write_text(path.read_text().replace("LlamaModel", "GemmaModel"))
    with pytest.raises(ModelError, match="GemmaModel is not supported; supported are GPTModel, LlamaModel"):
        read_shape(source)


def test_zarr_is_refused_by_name_and_so_is_half_a_checkpoint(tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    (source / "weights" / ".metadata").unlink()
    with pytest.raises(ModelError, match="the checkpoint is incomplete"):
        read_shape(source)
    (source / "weights" / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(ModelError, match="has the format 'zarr'; only torch_dist is read"):
        read_shape(source)


def test_an_index_that_runs_code_is_refused_and_the_context_is_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    source = nemo2(tmp_path)
    (source / "context" / "io.json").write_bytes(pickle.dumps(Bomb()))
    (source / "weights" / "common.pt").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "out").mkdir()
    convert_nemo(source, tmp_path / "out")
    (source / "weights" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "again").mkdir()
    with pytest.raises(CheckpointError, match="does not belong into an index"):
        convert_nemo(source, tmp_path / "again")
    assert not (tmp_path / "ran").exists()


def test_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    source = nemo2(tmp_path)
    edit(source, num_layers=3)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="has 4 layers; the config says 3"):
        convert_nemo(source, tmp_path / "out")
