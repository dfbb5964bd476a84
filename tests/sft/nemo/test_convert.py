"""NeMo 1.x checkpoints of every layout become the Hugging Face model they were written from, bit for bit."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint, read_shape
from launcher.contract.spec import DataSpec, ModelSpec, RunSpec
from sft.model_source import resolve_model_dir
from sft.nemo.convert import convert_nemo
from tests.ranks import run_ranks
from tests.sft.hf_cases import example_ids, hf_logits, rank_logits, run_spec, save_hf_model
from tests.sft.nemo.writer import archive, write_checkpoint

MHA = {"num_key_value_heads": 6}


def source_model(case: str, directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    save_hf_model(case, directory, **(MHA if case == "llama" else {}))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@pytest.mark.parametrize("case", ["gpt2", "llama"])
@pytest.mark.parametrize(("tp", "pp", "legacy"), [(1, 1, False), (2, 1, True), (2, 2, False), (3, 2, True)])
def test_every_layout_gives_the_same_tensors(case: str, tp: int, pp: int, legacy: bool, tmp_path: Path) -> None:
    model = source_model(case, tmp_path / "hf")
    nemo = write_checkpoint(model, tmp_path / "nemo", tp=tp, pp=pp, legacy=legacy)
    assert is_checkpoint(nemo)
    (tmp_path / "out").mkdir()
    convert_nemo(nemo, tmp_path / "out")
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert read_shape(nemo) == read_model_shape(tmp_path / "out")


@pytest.mark.parity
@pytest.mark.parametrize("case", ["gpt2", "llama"])
def test_archive_of_one_topology_gives_the_same_logits_under_another(case: str, tmp_path: Path) -> None:
    """Written with tensor parallel 3, read by 2 tensor ranks in 2 stages; transformers on the original is the judge."""
    model = source_model(case, tmp_path / "hf")
    source = archive(write_checkpoint(model, tmp_path / "nemo", tp=3, pp=1), tmp_path / "model.nemo")
    spec = RunSpec(model=ModelSpec(path=str(source)), data=DataSpec(cache_dir=str(tmp_path / "cache")))
    converted = resolve_model_dir(spec)
    assert resolve_model_dir(spec, convert=False) == converted  # once, then found again
    ids = example_ids()
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2}
    found = run_ranks(4, rank_logits, run_spec(converted, 4, **layout), ids.tolist(), init=True)
    expected = hf_logits(tmp_path / "hf", ids)
    last = [torch.from_numpy(logits) for logits in found if logits is not None]
    assert len(last) == 2
    assert all(torch.allclose(logits, expected, atol=1e-5) for logits in last)


def refusal(nemo: Path, out: Path) -> str:
    out.mkdir()
    with pytest.raises(ModelError) as caught:
        convert_nemo(nemo, out)
    return str(caught.value)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    nemo = write_checkpoint(source_model("gpt2", tmp_path / "hf"), tmp_path / "nemo", tp=1, pp=1)
    (nemo / "model_weights.ckpt").write_bytes(pickle.dumps(Bomb()))
    assert "cannot be loaded as weights alone" in refusal(nemo, tmp_path / "out")
    torch.save({"state_dict": {}, "bomb": Bomb()}, nemo / "model_weights.ckpt")
    assert "cannot be loaded as weights alone" in refusal(nemo, tmp_path / "again")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped-by-nemo", "a/../../escaped"])
def test_members_that_point_out_of_the_archive_are_refused(name: str, tmp_path: Path) -> None:
    nemo = write_checkpoint(source_model("gpt2", tmp_path / "hf"), tmp_path / "nemo", tp=1, pp=1)
    source = archive(nemo, tmp_path / "model.nemo")
    with tarfile.open(source, "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    assert "points out of the archive" in refusal(source, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
    assert not list(tmp_path.glob(".nemo.*"))  # what was unpacked is gone


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    nemo = write_checkpoint(source_model("gpt2", tmp_path / "hf"), tmp_path / "nemo", tp=1, pp=1)
    (nemo / "link").symlink_to("/etc/passwd")
    assert "is a link or device" in refusal(archive(nemo, tmp_path / "model.nemo"), tmp_path / "out")


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    model = source_model("gpt2", tmp_path / "hf")
    nemo = write_checkpoint(model, tmp_path / "nemo", tp=2, pp=2)
    weights = nemo / "tp_rank_01_pp_rank_001" / "model_weights.ckpt"
    kept = weights.read_bytes()
    weights.unlink()
    assert "tp_rank_01_pp_rank_001: needs model_weights.ckpt or one .ckpt file, found none" in refusal(
        nemo, tmp_path / "a"
    )
    weights.parent.rmdir()
    assert "no weights of tensor rank 1 of stage 1, of 2 x 2" in refusal(nemo, tmp_path / "b")
    weights.parent.mkdir()
    weights.write_bytes(kept)
    first = nemo / "tp_rank_00_pp_rank_000" / "model_weights.ckpt"
    state = torch.load(first, weights_only=True)
    torch.save({**state, "model.language_model.adapter.weight": torch.ones(2)}, first)
    assert "language_model.adapter.weight has no place in the model" in refusal(nemo, tmp_path / "c")
