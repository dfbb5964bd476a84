"""NeMo configs: every key has a rule, the result validates, and refusals name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launcher.__main__ import main
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.nemo.convert import convert
from launcher.contract.nemo.document import is_nemo, read_document
from launcher.contract.nemo.rule import Refused
from launcher.contract.nemo.rules import rule_of
from launcher.submission.submission import make_submission
from tests.launcher.conftest import CONFIG
from tests.launcher.contract.nemo.nemo_files import SHAPES, nemo_config


def settings(text: str) -> dict[str, object]:
    return {key: value for key, value, _ in convert(text, "nemo.yaml").settings()}


def refusals(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        convert(text, "nemo.yaml")
    return list(caught.value.problems)


@pytest.mark.parametrize("name", SHAPES)
def test_original_shapes_convert_validate_and_render(
    name: str, workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "nemo.yaml").write_text(nemo_config(name))
    assert main(["import", "nemo.yaml", "--model-dir", "scratch"]) == ExitCode.OK
    converted = capsys.readouterr()
    (workdir / "ours.yaml").write_text(converted.out)

    assert main(["render", "ours.yaml", "data.train=a.jsonl", "--cluster", "slurm-dev"]) == ExitCode.OK
    script = capsys.readouterr().out
    shape = SHAPES[name]
    assert f"#SBATCH --nodes={shape['nodes']}\n" in script
    plan = make_submission(workdir / "ours.yaml", ["data.train=a.jsonl"], "slurm-dev")
    topology = plan.topology
    assert (topology.tensor_parallel, topology.pipeline_parallel) == (shape["tp"], shape["pp"])
    assert topology.world_size == 8 * shape["nodes"]
    assert (topology.micro_batch_size, topology.global_batch_size) == (shape["micro_batch"], shape["global_batch"])
    assert plan.spec.data.seq_length == shape["seq_length"]
    # Every key of the file is told about.
    told = {line.split()[0] for line in converted.err.splitlines()}
    assert told >= set(read_document(nemo_config(name), "nemo.yaml"))


def test_a_nemo_file_is_submitted_as_it_is(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "nemo.yaml").write_text(nemo_config("llama2-7b"))
    main(["import", "nemo.yaml", "--model-dir", "scratch"])
    words = ["nemo.yaml", "model.path=scratch", "model.init=random", "data.train=a.jsonl", "--cluster", "slurm-dev"]
    capsys.readouterr()
    assert main(["submit", "--dry-run", *words]) == ExitCode.OK
    assert "tp4 x dp8 = 32 ranks + sequence parallel" in capsys.readouterr().out


def test_a_model_unlike_the_one_spelled_out_is_refused(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "nemo.yaml").write_text(nemo_config("llama2-7b"))
    words = ["nemo.yaml", "model.path=model", "data.train=a.jsonl", "--cluster", "slurm-dev"]
    assert main(["validate", *words]) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert f"nemo.yaml: model: hidden_size is 4096, but 64 in model.path {workdir / 'model'}" in said


def test_gpt_becomes_gpt2_and_nemos_silent_defaults_are_taken_over() -> None:
    text = nemo_config("gpt-20b")
    conversion = convert(text, "nemo.yaml")
    assert conversion.model is not None
    assert conversion.model["model_type"] == "gpt2"
    assert (conversion.model["n_inner"], conversion.model["vocab_size"]) == (4 * 6144, 50257)
    found = settings(text)
    assert found["model.attention_dropout"] == 0.1  # absent in the file
    assert found["topology.sequence_parallel"] is True
    assert settings(nemo_config("gpt-1.3b")).get("topology.sequence_parallel") is None  # nothing to spread at tp 1
    without = text.replace("  gradient_clip_val: 1.0\n", "").replace("    betas: [0.9, 0.95]\n", "")
    found = settings(without)
    assert (found["train.optimizer.clip_grad"], found["train.optimizer.beta2"]) == (0.0, 0.999)


@pytest.mark.parametrize(("method", "layers"), [("block", 3), ("uniform", None)])
def test_a_number_of_recomputed_layers_is_that_of_blocks(method: str, layers: int | None) -> None:
    """With method uniform NeMo's number is that of layers which are recomputed together: all of them are."""
    lines = f"activations_checkpoint_granularity: full\n  activations_checkpoint_method: {method}\n"
    text = nemo_config("gpt-20b").replace(
        "activations_checkpoint_granularity: selective\n", f"{lines}  activations_checkpoint_num_layers: 3\n"
    )
    found = settings(text)
    assert (found["train.recompute"], found.get("train.recompute_layers")) == ("full", layers)
    notes = {outcome.key: outcome.translation.note for outcome in convert(text, "x.yaml").outcomes}
    assert notes["model.activations_checkpoint_method"].startswith("read with the granularity")


def test_unknown_keys_and_unsupported_values_are_refused_with_their_lines() -> None:
    text = nemo_config("gpt-20b").replace("precision: bf16", "precision: 16").replace("  seed: 1234", "  sed: 1234")
    line = text[: text.index("  sed:")].count("\n") + 1
    assert refusals(text) == [
        "nemo.yaml:8: trainer.precision: 16 is not supported; use bf16 or 32",
        f"nemo.yaml:{line}: model.sed: not a known key; did you mean 'model.seed'?; remove it if nothing depends on it",
    ]


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        ("betas: [0.9, 0.95]", "betas: 0.9", "model.optim.betas: 0.9 is not a list of two numbers"),
        ("lr: 5.0e-5", "lr: fast", "model.optim.lr: 'fast' is not a number"),
        ("warmup_steps: 20", "warmup_steps: 0.5", "model.optim.sched.warmup_steps: 0.5 is not a whole number"),
        ("num_layers: 44", "num_layers: 44\n  kv_channels: wide", "model.kv_channels: 'wide' is not a number"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_with_their_lines(old: str, new: str, refusal: str) -> None:
    text = nemo_config("gpt-20b")
    assert old in text
    (problem,) = refusals(text.replace(old, new))
    line = text[: text.index(old)].count("\n") + new.count("\n") + 1
    assert problem == f"nemo.yaml:{line}: {refusal}"


def test_an_architecture_without_counterpart_is_refused() -> None:
    text = nemo_config("llama2-7b").replace("normalization: rmsnorm", "normalization: layernorm1p")
    (problem,) = refusals(text)
    assert "model: normalization layernorm1p, activation swiglu, position rope, bias False is none of gpt2" in problem


def test_inconsistent_topology_is_refused_before_anything_is_printed(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workdir / "nemo.yaml").write_text(nemo_config("gpt-65b", pp=3))
    assert main(["import", "nemo.yaml"]) == ExitCode.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "128 ranks (16 nodes x 8) do not divide" in printed.err
    assert "pipeline" in printed.err


def test_keys_that_contradict_each_other_are_refused() -> None:
    text = nemo_config("gpt-20b").replace("restore_from_path: null", "restore_from_path: a.nemo")
    text = text.replace("  seed: 1234", "  seed: 1234\n  restore_from_path: b.nemo")
    (problem,) = refusals(text)
    assert problem.endswith("model.restore_from_path: 'b.nemo' contradicts restore_from_path 'a.nemo'")


def test_secrets_and_unknown_functions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    with pytest.raises(ConfigError, match="HF_TOKEN looks like a secret"):
        read_document("trainer: {a: '${oc.env:HF_TOKEN}'}\nmodel: {}\n", "nemo.yaml")
    with pytest.raises(ConfigError, match=r"nemo.yaml:1: trainer.a: does not resolve"):
        read_document("trainer: {a: '${shell:date}'}\nmodel: {}\n", "nemo.yaml")


def test_resolver_functions_are_not_left_behind() -> None:
    text = "trainer: {a: '${divide_ceil:7,${model.b}}'}\nmodel: {b: 2, c: '${int_div:7,2}'}\n"
    entries = read_document(text, "nemo.yaml")
    assert {key: entry.value for key, entry in entries.items()} == {"trainer.a": 4, "model.b": 2, "model.c": 3}
    assert entries["model.b"].where == "nemo.yaml:2"
    assert not OmegaConf.has_resolver("multiply")


def test_our_own_configs_are_not_taken_for_nemo_configs() -> None:
    assert not is_nemo(CONFIG)
    assert not is_nemo("name: a trainer of models\n")
    assert not is_nemo("[1, 2]")
    assert not is_nemo("trainer: {")


def test_lora_of_a_fine_tuning_config() -> None:
    text = """\
trainer: {devices: 1, precision: bf16-mixed, max_steps: 10}
model:
  peft:
    peft_scheme: lora
    lora_tuning: {target_modules: [attention_qkv, mlp_fc2], adapter_dim: 8, alpha: 16, adapter_dropout: 0.1}
  data:
    train_ds: {file_names: [a.jsonl], max_seq_length: 512, label_key: answer, prompt_template: '{input} {answer}'}
  optim: {name: fused_adam, lr: 1e-4}
"""
    found = settings(text)
    assert found["model.lora.targets"] == ["q_proj", "k_proj", "v_proj", "down_proj"]
    assert (found["model.lora.rank"], found["model.lora.alpha"], found["data.seq_length"]) == (8, 16.0, 512)
    assert found["data.columns"] == {"prompt": "input", "completion": "answer"}
    assert "has text of its own" in refusals(text.replace("{input} {answer}", "Q: {input} A: {answer}"))[0]
    assert "'adapter' is not supported" in refusals(text.replace("peft_scheme: lora", "peft_scheme: adapter"))[0]


def test_long_examples_of_a_fine_tuning_config() -> None:
    """NeMo cuts the prompt and keeps the answer; ours lost its end, and with it the end token, without a word."""
    text = """\
trainer: {devices: 1, precision: bf16-mixed, max_steps: 10}
model:
  data:
    train_ds:
      {file_names: [a.jsonl], concat_sampling_probabilities: [1.0], truncation_field: input, truncation_method: right}
  optim: {name: fused_adam, lr: 1e-4}
"""
    cut = [settings(text)[key] for key in ("data.length_policy", "data.max_lost_percent")]
    assert cut == ["truncate_right", 0]
    left = settings(text.replace("right", "left"))  # both cut the beginning of the prompt
    assert (left["data.length_policy"], left.get("data.max_lost_percent")) == ("truncate_left", None)
    whole = settings(text.replace("truncation_field: input", "truncation_field: ''"))
    assert (whole["data.length_policy"], whole.get("data.max_lost_percent")) == ("truncate_right", None)
    assert "'middle' is not left or right" in refusals(text.replace("right", "middle"))[0]
    assert "several data.sources" in refusals(text.replace("[1.0]", "[0.5, 0.5]"))[0]


def test_written_config_is_json_too(workdir: Path) -> None:
    (workdir / "nemo.yaml").write_text(nemo_config("gpt-20b"))
    main(["import", "nemo.yaml", "--model-dir", "scratch"])
    assert json.loads((workdir / "scratch" / "config.json").read_text())["n_layer"] == 44


def test_a_key_without_a_rule_takes_its_sections() -> None:
    assert rule_of("trainer.some_new_flag") is not None
    assert rule_of("model.some_new_flag") is None


def test_end_tokens_of_a_fine_tuning_config() -> None:
    """Texts always end with the EOS token; whether they begin with a BOS token is up to the tokenizer."""
    text = nemo_config("gpt-20b").replace("  data:\n", "  data:\n    add_bos: True\n    add_eos: {eos}\n")
    notes = {
        outcome.key: outcome.translation.note for outcome in convert(text.replace("{eos}", "True"), "x.yaml").outcomes
    }
    assert notes["model.data.add_bos"].startswith("the tokenizer decides")
    (refusal,) = refusals(text.replace("{eos}", "False"))
    assert "model.data.add_eos: False is not supported: texts and completions always end with the end token" in refusal


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("trainer.limit_train_batches", 0.1, 1.0),
        ("trainer.limit_train_batches", 1, 1.0),
        ("trainer.overfit_batches", 0.5, 0.0),
        ("trainer.fast_dev_run", True, False),
        ("trainer.gradient_clip_algorithm", "value", "norm"),
        ("exp_manager.ema.enable", True, False),
        ("exp_manager.create_early_stopping_callback", True, False),
        ("exp_manager.resume_from_checkpoint", "last.ckpt", None),
        ("model.peft.restore_from_path", "lora.nemo", None),
        ("model.peft.lora_tuning.weight_tying", True, False),
        ("model.optim.amsgrad", True, False),
        ("model.data.chat", True, False),
        ("model.data.train_ds.packed_sequence", True, False),
        ("model.data.train_ds.hf_dataset", True, False),
        ("model.data.train_ds.min_seq_length", 64, 1),
        ("model.data.train_ds.max_num_samples", 1000, None),
    ],
)
def test_keys_that_would_train_something_else_do_not_pass_with_their_section(
    key: str, value: object, same: object
) -> None:
    """Other keys of these sections have no effect; these were dropped with them."""
    rule = rule_of(key)
    assert rule is not None
    assert rule(same, {}).note
    with pytest.raises(Refused, match="is not supported: "):
        rule(value, {})


def test_loggers_and_empty_sections() -> None:
    text = nemo_config("gpt-20b").replace("create_wandb_logger: False", "create_wandb_logger: True\n  name: mine")
    assert settings(text)["logging.wandb"] == "mine"
    assert "logging.wandb" not in settings(nemo_config("gpt-20b"))
    empty = text.replace("  optim:", "  nsys_profile: {}\n  optim:")
    notes = {outcome.key: outcome.translation.note for outcome in convert(empty, "x.yaml").outcomes}
    assert notes["model.nsys_profile"] == "an empty section"
