"""The language model inside a multimodal checkpoint: found by its files' names, exported among the untouched rest."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.contract.errors import ModelError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import LoraSpec, read_resolved, to_yaml
from sft.commands.export import export_run
from sft.hf.answer import answer
from sft.hf.exporter import export_checkpoint
from sft.hf.files import check_model_files
from sft.hf.loaded_model import load_transformers_model
from sft.models.registry import SUPPORTED, family, read_architecture
from sft.models.stored_tensors import weight_map
from tests.parity.runs import make_run, run_training
from tests.parity.test_families import family_model
from tests.ranks import run_ranks
from tests.sft.hf.test_exporter import expect_equal, weights
from tests.sft.hf.test_importer import expect_same_logits
from tests.sft.hf_cases import auto_class, example_ids, hf_logits, run_spec, save_hf_model, save_sharded
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

MULTIMODAL = [name for name in SUPPORTED if family(name).multimodal]
ONE_NAMING = ("gemma4", "qwen3_5")
NAMINGS = [
    pytest.param(
        case,
        earlier,
        id=f"{case}-{'earlier' if earlier else 'today'}",
        marks=[pytest.mark.slow] if case == "qwen3_5_moe" else [],  # test_linear_attention.py has its published form
    )
    for case in MULTIMODAL
    for earlier in ([False] if case.startswith(ONE_NAMING) else [False, True])
]
TODAY, EARLIER = "model.language_model.", "language_model.model."


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a single weight file; double underscores stand for dots."""
    path = directory / "model.safetensors"
    tensors: dict[str, Any] = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, {"format": "pt"})


def named(directory: Path, *, earlier: bool) -> Path:
    """Give the tensors in the single weight file of `directory` their names of today, or those of earlier files."""
    path = directory / "model.safetensors"
    found = {}
    for name, tensor in load_file(path).items():
        plain = name.removeprefix("model.").replace("language_model.model.", "language_model.")
        plain = plain.replace("language_model.lm_head.", "lm_head.")
        if not earlier:
            found["lm_head.weight" if plain == "lm_head.weight" else f"model.{plain}"] = tensor
        elif plain == "lm_head.weight":
            found[f"language_model.{plain}"] = tensor
        else:
            found[plain.replace("language_model.", EARLIER)] = tensor
    save_file(found, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, with the names of today."""
    directory = tmp_path_factory.mktemp("source")
    return named(save_hf_model("mistral3", directory), earlier=False)


@pytest.mark.parametrize(("case", "earlier"), NAMINGS)
def test_names_are_those_of_the_files(case: str, earlier: bool, tmp_path: Path) -> None:
    named(save_hf_model(case, tmp_path), earlier=earlier)
    architecture = read_architecture(tmp_path)

    assert architecture.weights.language_prefix == (EARLIER if earlier else TODAY)
    assert architecture.weights.embedding_name == (EARLIER if earlier else TODAY) + "embed_tokens.weight"
    if not architecture.shape.tied_embeddings:
        assert architecture.weights.head == ("language_model.lm_head.weight" if earlier else "lm_head.weight")
    parts = ("vision_tower.", "multi_modal_projector.", "visual.", "embed_vision.", "vision_embedder.")
    assert all(any(part in name for part in parts) for name in architecture.weights.carried)
    assert len(architecture.weights.carried) >= 10
    check_model_files(tmp_path, architecture)
    expect_same_logits(tmp_path, 1)


@pytest.mark.parametrize(("case", "earlier"), NAMINGS)
def test_an_export_is_the_source_with_other_text(case: str, earlier: bool, tmp_path: Path) -> None:
    """Trained weights come from another model; vision tower and projector must be the source's, byte for byte."""
    model = named(save_hf_model(case, tmp_path / "model"), earlier=earlier)
    tensors = load_file(model / "model.safetensors")
    half = len(tensors) // 2
    (model / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": half, "model-00002-of-00002.safetensors": len(tensors)}
    where = {}
    for number, name in enumerate(sorted(tensors, key=lambda name: name[::-1])):  # q, k and v lie in different files
        where[name] = next(file for file, end in files.items() if number < end)
    for file in files:
        save_file({name: tensors[name] for name, own in where.items() if own == file}, model / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "processor_config.json").write_text("{}")

    trained = tmp_path / "trained"
    save_hf_model(case, trained)
    rewritten = {name: tensor + 1.0 for name, tensor in load_file(trained / "model.safetensors").items()}
    save_file(rewritten, trained / "model.safetensors", {"format": "pt"})
    run_ranks(2, save_sharded, run_spec(trained, 2, pipeline_parallel=2), tmp_path / "sharded", init=True)
    export = tmp_path / "export"
    export_checkpoint(tmp_path / "sharded", model, export)

    own = set(read_architecture(model).weights.hf_shapes())
    expected = {name: tensor + 1.0 if name in own else tensor for name, tensor in weights(model).items()}
    expect_equal(weights(export), expected)
    assert weight_map(export) == where
    written = json.loads((export / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert (export / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (export / "processor_config.json").is_file()
    _, found = auto_class(case).from_pretrained(export, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_tied_model_with_a_copy_of_its_embedding(tmp_path: Path) -> None:
    """Early files hold it; the export must not hold the source's."""
    save_hf_model("mistral3_ministral3", tmp_path / "model")
    named(tmp_path / "model", earlier=False)
    embedding = load_file(tmp_path / "model/model.safetensors")[f"{TODAY}embed_tokens.weight"]
    rewrite(tmp_path / "model", lm_head__weight=embedding.clone())
    assert read_architecture(tmp_path / "model").shape.tied_embeddings
    run_ranks(1, save_sharded, run_spec(tmp_path / "model", 1), tmp_path / "sharded", init=True)
    rewrite(
        tmp_path / "model", lm_head__weight=embedding + 1, model__language_model__embed_tokens__weight=embedding + 1
    )
    export_checkpoint(tmp_path / "sharded", tmp_path / "model", tmp_path / "export")
    assert torch.equal(weights(tmp_path / "export")["lm_head.weight"], embedding)


def test_a_head_that_differs_is_one_of_its_own(tmp_path: Path) -> None:
    """As transformers has it, whatever the config says: the class' default is a tied one."""
    named(save_hf_model("mistral3", tmp_path), earlier=False)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not read_architecture(tmp_path).shape.tied_embeddings
    expect_same_logits(tmp_path, 1)


def test_refusals(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())

    def problem(changes: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError) as caught:
            read_architecture(tmp_path)
        return str(caught.value)

    where = f"{tmp_path / 'config.json'}: "
    assert "text_config.model_type 'llama' is not supported" in problem(
        {"text_config": config["text_config"] | {"model_type": "llama"}}
    )
    assert problem({"quantization_config": {"quant_method": "fp8"}}) == (
        f"{where}quantization_config: quantized weights are not supported; use the unquantized model"
    )
    assert problem({"model_type": "mistral"}) == f"{where}text_config is not supported in a mistral config"
    assert "model_type 'llava' is not supported" in problem({"model_type": "llava"})
    tensors = load_file(source / "model.safetensors")
    second = {"model.second.language_model.embed_tokens.weight": torch.zeros(2, 2)}
    save_file(tensors | second, tmp_path / "model.safetensors")
    assert "2 tensors are named *language_model*embed_tokens.weight; one is needed" in problem({})


def test_adapters_have_the_names_of_modules(tmp_path: Path) -> None:
    """Those by which PEFT and serving engines find them, whatever the files call the weights; none in the tower."""
    peft = pytest.importorskip("peft")
    model = family_model(tmp_path / "model", "mistral3")
    named(model, earlier=True)
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(16, seed=3))
    paths = make_run(tmp_path, model, chat, ranks=1, max_steps=3)
    spec = read_resolved(paths.config)
    lora = dataclasses.replace(spec.model, lora=LoraSpec(rank=2))
    adapter, merged = (
        exported_run(paths, dataclasses.replace(spec, model=lora), merged=merged) for merged in (False, True)
    )

    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert len(names) == 4 * 7 * 2
    assert all(name.startswith(f"base_model.model.{TODAY}layers.") for name in names)
    loaded = peft.PeftModel.from_pretrained(load_transformers_model(model, torch.float32), adapter).eval()
    assert not any("vision" in name for name, _ in loaded.named_parameters() if "lora_" in name)
    ids = example_ids(vocab=331)
    with torch.no_grad():
        assert (loaded(ids).logits - hf_logits(merged, ids)).abs().max() < 1e-5
    assert (hf_logits(model, ids) - hf_logits(merged, ids)).abs().max() > 0.01
    carried = read_architecture(model).weights.carried
    before, after = weights(model), weights(merged)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in carried)
    assert answer(adapter, ["How many otters?"], 8) == answer(merged, ["How many otters?"], 8)


def exported_run(paths: RunPaths, spec: Any, *, merged: bool) -> Path:
    """Run once, and export as an adapter or as a model."""
    own = RunPaths(paths.root.parent / ("merged" if merged else "adapter"))
    own.root.mkdir()
    own.config.write_text(
        to_yaml(dataclasses.replace(spec, checkpoint=dataclasses.replace(spec.checkpoint, export_merged=merged)))
    )
    run_training(own, 1)
    export_run(own.root)
    return own.export
