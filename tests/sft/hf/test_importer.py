"""Imported ranks give transformers' logits under any topology; an incomplete directory is refused, file by file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sft.hf.importer
from launcher.contract.errors import ModelError
from launcher.contract.spec import RunSpec
from sft.hf.files import WeightFiles, check_model_files
from sft.hf.importer import load_hf_weights
from sft.hf.sliceable import Sliceable
from sft.models.registry import SUPPORTED, read_architecture
from sft.models.weight_map import RankPlace
from tests.ranks import run_ranks
from tests.sft.hf_cases import (
    CASES,
    VOCAB_SIZE,
    build_and_load,
    drop_prefix,
    example_ids,
    hf_logits,
    rank_logits,
    run_spec,
    save_hf_model,
)

TOLERANCE = 1e-5
"""Logits are of size 1; ten times what is seen on any case."""


def expect_same_logits(directory: Path, ranks: int, **topology: int) -> None:
    ids = example_ids()
    expected = hf_logits(directory, ids)
    found = run_ranks(ranks, rank_logits, run_spec(directory, ranks, **topology), ids.tolist(), init=True)
    last = [torch.from_numpy(logits) for logits in found if logits is not None]
    assert last
    for logits in last:
        assert (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_logits_of_one_rank(case: str, tmp_path: Path) -> None:
    expect_same_logits(save_hf_model(case, tmp_path), 1)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("case", "ranks", "topology"),
    [
        *((case, 2, {"pipeline_parallel": 2}) for case in SUPPORTED),
        ("llama", 3, {"tensor_parallel": 3}),
        ("llama_mha", 2, {"tensor_parallel": 2}),
        ("llama_one_kv_head", 2, {"tensor_parallel": 2}),
        ("qwen2_tied", 3, {"tensor_parallel": 3}),
        ("qwen3_tied", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("qwen3", 3, {"tensor_parallel": 3}),
        ("mistral", 3, {"tensor_parallel": 3}),
        ("gemma", 3, {"tensor_parallel": 3}),
        ("gemma_untied", 2, {"tensor_parallel": 2}),
        ("gemma2", 3, {"tensor_parallel": 3}),
        ("gemma3_text_capped", 2, {"tensor_parallel": 2}),
        ("gemma4_text", 3, {"tensor_parallel": 3}),
        ("gemma4_text_one_key_head", 3, {"tensor_parallel": 3}),
        ("phi3", 3, {"tensor_parallel": 3}),
        ("phi3_partial_rope", 2, {"tensor_parallel": 2}),
        ("llama_llama3_rope_other_numbers", 2, {"pipeline_parallel": 2}),
        ("llama_tied", 6, {"tensor_parallel": 3, "pipeline_parallel": 2}),
    ],
)
def test_logits_of_many_ranks(case: str, ranks: int, topology: dict[str, int], tmp_path: Path) -> None:
    expect_same_logits(save_hf_model(case, tmp_path), ranks, **topology)


@pytest.mark.parity
def test_sharded_bf16_files_are_read_into_fp32_ranks(tmp_path: Path) -> None:
    save_hf_model("qwen2", tmp_path, dtype=torch.bfloat16, shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expect_same_logits(tmp_path, 3, tensor_parallel=3)


class Chunk(nn.Module):
    """Parameters under the names of a whole Megatron-core model, without Megatron-core."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, padding: int = 3) -> None:
        super().__init__()
        model = read_architecture(directory)
        for name, parameter_map in model.weights.parameters().items():
            rows = parameter_map.rows + (padding if parameter_map.padded else 0)
            shape = (rows,) if parameter_map.columns is None else (rows, parameter_map.columns)
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))


def load(chunk: nn.Module, directory: Path) -> None:
    load_hf_weights([chunk], read_architecture(directory), directory, place=RankPlace(), layer_offsets=[0])


class CountedReads:
    """Weight files that count the numbers which are read of each kind of tensor."""

    def __init__(self, directory: Path) -> None:
        self._files = WeightFiles(directory)
        self.of_experts = 0
        self.of_others = 0

    def tensor(self, name: str, shape: tuple[int, ...]) -> CountedReads.Tensor:
        return CountedReads.Tensor(self, name, self._files.tensor(name, shape))

    class Tensor:
        def __init__(self, counts: CountedReads, name: str, inner: Sliceable) -> None:
            self._counts, self._name, self._inner = counts, name, inner

        def __getitem__(self, index: slice | tuple[slice, slice]) -> torch.Tensor:
            found = self._inner[index]
            if ".experts." in self._name:
                self._counts.of_experts += found.numel()
            else:
                self._counts.of_others += found.numel()
            return found


@pytest.mark.parity
def test_a_rank_reads_the_experts_that_it_holds_and_no_others(tmp_path: Path) -> None:
    save_hf_model("qwen3_moe", tmp_path)
    spec = run_spec(tmp_path, 2, expert_parallel=2)
    counts = run_ranks(2, counted_reads, spec, init=True)
    tensors = {name: math.prod(shape) for name, shape in read_architecture(tmp_path).weights.hf_shapes().items()}
    experts = sum(size for name, size in tensors.items() if ".experts." in name)
    others = sum(tensors.values()) - experts
    assert counts == [(experts // 2, others)] * 2


def counted_reads(spec: RunSpec) -> tuple[int, int]:
    """Runs on a rank: how many numbers it reads, of experts and of all else."""
    made: list[CountedReads] = []

    def counted(directory: Path) -> CountedReads:
        made.append(CountedReads(directory))
        return made[-1]

    sft.hf.importer.WeightFiles = counted  # type: ignore[assignment,misc]
    build_and_load(spec)
    return made[0].of_experts, made[0].of_others


def test_padding_is_zero_and_numbers_take_the_parameters_type(tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path)
    chunk = Chunk(tmp_path, dtype=torch.bfloat16)
    load(chunk, tmp_path)
    embedding = chunk.get_parameter("embedding.word_embeddings.weight")

    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[:97], stored.to(torch.bfloat16))
    assert torch.equal(embedding[97:], torch.zeros(3, 48, dtype=torch.bfloat16))
    assert all(parameter.isfinite().all() for parameter in chunk.parameters())


def test_only_the_needed_slices_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_hf_model("llama", tmp_path)
    chunk = Chunk(tmp_path)
    read: list[int] = []
    original = WeightFiles.tensor

    class Counting:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __getitem__(self, place: Any) -> Any:
            found = self.tensor[place]
            read.append(found.numel())
            return found

    monkeypatch.setattr(WeightFiles, "tensor", lambda *args: Counting(original(*args)))
    load(chunk, tmp_path)

    stored = load_file(tmp_path / "model.safetensors")
    assert sum(read) == sum(tensor.numel() for tensor in stored.values())
    assert max(read) == max(tensor.numel() for tensor in stored.values())


def test_a_model_that_lacks_a_parameter_is_our_bug(tmp_path: Path) -> None:
    save_hf_model("qwen2", tmp_path)
    chunk = Chunk(tmp_path)
    del chunk.get_submodule("decoder.layers.1.self_attention.linear_qkv")._parameters["bias"]

    with pytest.raises(
        ValueError, match=r"lacks parameters of its architecture: decoder\.layers\.1\..*linear_qkv\.bias"
    ):
        load(chunk, tmp_path)


def test_a_split_parameter_must_carry_the_mark(tmp_path: Path) -> None:
    save_hf_model("llama", tmp_path)
    chunk = Chunk(tmp_path, padding=0)
    weight = chunk.get_parameter("embedding.word_embeddings.weight")
    weight.data = weight.data[:49]
    place = RankPlace(tensor=(0, 2))

    message = r"embedding\.word_embeddings\.weight is marked as split on axis None, not 0"
    with pytest.raises(ValueError, match=message):
        load_hf_weights([chunk], read_architecture(tmp_path), tmp_path, place=place, layer_offsets=[0])


def problems(directory: Path) -> list[str]:
    with pytest.raises(ModelError) as caught:
        check_model_files(directory, read_architecture(directory))
    return list(caught.value.problems)


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a single weight file; double underscores stand for dots."""
    path = directory / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return save_hf_model("llama", tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_hf_model("llama", tmp_path, shard="60KB")


def test_complete_directories_pass(tmp_path: Path) -> None:
    for case in CASES:
        directory = tmp_path / case
        save_hf_model(case, directory, shard="60KB")
        check_model_files(directory, read_architecture(directory))


def test_missing_tensor(single: Path) -> None:
    rewrite(single, model__norm__weight=None)
    assert problems(single) == [f"{single}: no tensor model.norm.weight in any weight file"]
    with pytest.raises(ModelError, match=r"no tensor model\.norm\.weight in any weight file"):
        load(Chunk(single), single)


def test_files_of_a_bare_base_model_are_refused_with_what_to_do(single: Path) -> None:
    drop_prefix(single, "model.")
    (first, *_) = problems(single)
    assert first == (
        f"{single}: no tensor model.embed_tokens.weight in any weight file, only embed_tokens.weight; save the whole "
        "model (AutoModelForCausalLM), not the base model in it"
    )


def test_gpt2_is_read_as_it_is_published(tmp_path: Path) -> None:
    """Without `transformer.` in front of its names, and with the causal masks of old versions."""
    save_hf_model("gpt2", tmp_path)
    whole, published = Chunk(tmp_path), Chunk(tmp_path)
    load(whole, tmp_path)
    drop_prefix(tmp_path, "transformer.")
    rewrite(tmp_path, h__0__attn__bias=torch.ones(1, 1, 8, 8))
    check_model_files(tmp_path, read_architecture(tmp_path))
    load(published, tmp_path)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, published.get_parameter(name)), name
    (tmp_path / "model.safetensors").unlink()
    assert read_architecture(tmp_path).weights.embedding_name == "transformer.wte.weight"


def test_wrong_shape(single: Path) -> None:
    rewrite(single, lm_head__weight=torch.zeros(96, 48))
    message = (
        f"{single / 'model.safetensors'}: tensor lm_head.weight is [96, 48]; by config.json it should be "
        f"[{VOCAB_SIZE}, 48]"
    )
    assert problems(single) == [message]
    with pytest.raises(ModelError) as caught:
        load(Chunk(single), single)
    assert str(caught.value) == message


def test_wrong_number_type(single: Path) -> None:
    rewrite(single, lm_head__weight=torch.zeros(97, 48, dtype=torch.int8))
    where = single / "model.safetensors"
    assert problems(single) == [f"{where}: tensor lm_head.weight is I8; supported are BF16, F16, F32, F64"]


def test_a_tensor_that_nothing_takes(single: Path) -> None:
    rewrite(
        single, model__layers__0__self_attn__q_proj__bias=torch.zeros(48), model__rotary_emb__inv_freq=torch.ones(4)
    )
    where = single / "model.safetensors"
    assert problems(single) == [f"{where}: tensor model.layers.0.self_attn.q_proj.bias has no place in a llama model"]


def test_truncated_file(single: Path) -> None:
    path = single / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    assert problems(single) == [f"{path}: truncated: {size - 100} bytes, its header says {size}"]

    path.write_bytes(path.read_bytes()[:20])
    assert problems(single) == [f"{path}: truncated: 20 bytes, too few for its header"]

    path.write_bytes((2).to_bytes(8, "little") + b"[]")
    assert problems(single) == [f"{path}: not a safetensors file"]


def test_truncated_file_met_by_a_rank(sharded: Path) -> None:
    files = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    path = sharded / files["model.norm.weight"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{path}: tensor .* cannot be read"):
        load(Chunk(sharded), sharded)


def test_file_of_the_index_is_missing(sharded: Path) -> None:
    files = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    path = sharded / files["model.norm.weight"]
    path.unlink()
    assert problems(sharded) == [f"{path}: missing; model.safetensors.index.json names it"]
    with pytest.raises(ModelError, match=f"{path}: tensor .* cannot be read"):
        load(Chunk(sharded), sharded)


def test_many_problems_are_counted(single: Path) -> None:
    dropped = {f"model__layers__{layer}__mlp__up_proj__weight": None for layer in range(4)}
    rewrite(single, **dropped, model__norm__weight=None)
    found = problems(single)
    assert len(found) == 4
    assert found[0] == f"{single}: no tensor model.layers.0.mlp.up_proj.weight in any weight file"
    assert found[-1] == f"{single}: 2 more such problems"


def test_no_weights(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert problems(single) == [f"{single}: neither model.safetensors nor model.safetensors.index.json"]
    (single / "pytorch_model.bin").touch()
    assert problems(single) == [
        f"{single}: neither model.safetensors nor model.safetensors.index.json; "
        "pickled weights are not read, save the model with safe_serialization"
    ]


def test_an_index_that_points_out_of_the_directory(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    assert problems(sharded) == [f"{index}: names '../other.safetensors', which is not a file of this directory"]
    index.write_text("{}")
    assert problems(sharded) == [f"{index}: not an index of weight files (KeyError: 'weight_map')"]


def test_a_tied_head_must_be_a_copy(tmp_path: Path) -> None:
    save_hf_model("llama_tied", tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, lm_head__weight=embedding.clone())
    check_model_files(tmp_path, read_architecture(tmp_path))

    embedding[-1, -1] += 1
    rewrite(tmp_path, lm_head__weight=embedding)
    assert problems(tmp_path) == [
        f"{tmp_path}: config.json ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight"
    ]
