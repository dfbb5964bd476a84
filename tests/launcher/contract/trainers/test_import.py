"""`launcher import` of TRL, axolotl and LLaMA-Factory: typical files, value by value, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.__main__ import main
from launcher.contract.config.checks import spec_problems
from launcher.contract.config.conversion import typed_spec
from launcher.contract.config.yaml_leaves import read_yaml
from launcher.contract.errors import ConfigError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.nemo.convert import Conversion, to_yaml
from launcher.contract.spec import RunSpec
from launcher.contract.trainers.convert import convert, recognised

TRL = {
    "model_name_or_path": "Qwen/Qwen2.5-0.5B",
    "dataset_name": "trl-lib/Capybara",
    "learning_rate": "2.0e-4",
    "num_train_epochs": 1,
    "packing": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "eval_strategy": "steps",
    "eval_steps": 100,
    "use_peft": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "use_rslora": True,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "warmup_steps": 0.03,
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5,
    "assistant_only_loss": True,
    "output_dir": "data/Qwen2.5-0.5B-SFT",
    "report_to": ["tensorboard"],
}
AXOLOTL: dict[str, Any] = {
    "base_model": "NousResearch/Llama-3.2-1B",
    "load_in_4bit": False,
    "datasets": [{"path": "org/set", "type": "chat_template", "split": "train_sft"}],
    "val_set_size": 0.1,
    "output_dir": "./outputs/lora-out",
    "adapter": "lora",
    "sequence_len": 2048,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
    "peft_use_dora": True,
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 2,
    "num_epochs": 2.5,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "cosine_min_lr_ratio": 0.1,
    "learning_rate": 0.0002,
    "bf16": "auto",
    "gradient_checkpointing": True,
    "flash_attention": True,
    "special_tokens": {"pad_token": "<|end_of_text|>"},
    "evals_per_epoch": 4,
}
LLAMA_FACTORY: dict[str, Any] = {
    "model_name_or_path": "Qwen/Qwen3-4B",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "q_proj, v_proj",
    "dataset": "identity,alpaca_en_demo",
    "template": "qwen3",
    "cutoff_len": 4096,
    "mask_history": True,
    "output_dir": "saves/qwen3-4b/sft",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 3.0,
    "warmup_ratio": 0.1,
    "neat_packing": True,
    "save_steps": 500,
    "loraplus_lr_ratio": 16,
}


def converted(config: dict[str, Any], gpus: int = 1) -> Conversion:
    text = yaml.safe_dump(config, sort_keys=False)
    trainer = recognised(text)
    assert trainer is not None
    return convert(text, "sft.yaml", trainer, gpus)


def settings(config: dict[str, Any], gpus: int = 1) -> dict[str, object]:
    return {key: value for key, value, _ in converted(config, gpus).settings()}


def notes(config: dict[str, Any]) -> dict[str, str]:
    return {outcome.key: outcome.translation.note for outcome in converted(config).outcomes}


def problems(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        converted(config)
    return list(caught.value.problems)


def test_trl() -> None:
    assert settings(TRL, gpus=4) == {
        "model.path": "Qwen/Qwen2.5-0.5B",
        "data.train": ["trl-lib/Capybara"],
        "data.validation": ["trl-lib/Capybara:test"],
        "train.optimizer.lr": 2e-4,
        "train.epochs": 1,
        "data.packing": True,
        "train.micro_batch_size": 2,
        "train.global_batch_unit": "tokens",
        "train.global_batch_size": 2 * 8 * 4 * 1024,
        "train.eval_every": 100,
        "model.lora.rank": 32,
        "model.lora.alpha": 16.0,
        "model.lora.targets": ["q_proj", "v_proj"],
        "model.lora.dropout": 0.05,
        "model.lora.rslora": True,
        "train.optimizer.schedule": "cosine",
        "train.optimizer.min_lr": 2e-5,
        "train.optimizer.warmup_ratio": 0.03,
        "train.label_smoothing": 0.1,
        "train.neftune_alpha": 5,
        "data.loss_on": "assistant",
        "run_root": "data",
        "name": "Qwen2.5-0.5B-SFT",
        "logging.tensorboard": True,
        "train.optimizer.beta2": 0.999,
        "train.seed": 42,
        "logging.every": 10,
        "checkpoint.every": 500,
    }


def test_axolotl() -> None:
    assert settings(AXOLOTL, gpus=2) == {
        "model.path": "NousResearch/Llama-3.2-1B",
        "data.train": ["org/set"],
        "data.hub.split": "train_sft",
        "data.validation_split": "10%",
        "run_root": "outputs",
        "name": "lora-out",
        "model.lora.rank": 16,
        "model.lora.alpha": 32.0,
        "model.lora.targets": ["all-linear"],
        "model.lora.dropout": 0.0,
        "model.lora.dora": True,
        "data.seq_length": 2048,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 2 * 2 * 2,
        "train.epochs": 2.5,
        "train.optimizer.schedule": "cosine",
        "train.optimizer.min_lr": 2e-5,
        "train.optimizer.lr": 2e-4,
        "train.precision": "bf16",
        "train.recompute": "full",
        "data.loss_on": "assistant",
        "train.optimizer.beta2": 0.999,
        "train.seed": 42,
        "train.optimizer.warmup_ratio": 0.03,
        "data.length_policy": "drop",
    }
    assert settings(AXOLOTL | {"excess_length_strategy": "truncate"}, gpus=2)["data.length_policy"] == "truncate_right"


@pytest.mark.parametrize(
    ("change", "held_out"),
    [
        ({"dataset_test_split": "test_sft"}, ["trl-lib/Capybara:test_sft"]),
        ({"eval_strategy": "no"}, None),  # TRL then loads no held-out data
        ({"eval_strategy": None}, None),
        ({"dataset_name": "data/chat.jsonl"}, None),
    ],
)
def test_held_out_data_of_trl(change: dict[str, Any], held_out: list[str] | None) -> None:
    """They were left out, and `validate` then refused the evaluations."""
    assert settings(TRL | change).get("data.validation") == held_out


def test_axolotl_adapts_every_linear_layer_beside_those_that_are_named() -> None:
    found = settings(AXOLOTL | {"lora_target_modules": ["q_proj", "v_proj"]})
    assert found["model.lora.targets"] == ["all-linear"]


def test_rows_of_axolotl() -> None:
    """What its pages write out is what it does without it; conversations have other names for role and text."""
    said = {
        "message_property_mappings": {"role": "role", "content": "content"},
        "roles": {"user": ["user"], "assistant": ["assistant"]},
        "roles_to_train": ["assistant"],
        "train_on_eos": "turn",
    }
    plain = [{"path": "org/set", "type": "chat_template"}]
    assert settings(AXOLOTL | {"datasets": [plain[0] | said]}) == settings(AXOLOTL | {"datasets": plain})
    sharegpt = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"], "assistant": ["gpt"], "system": "system"},
    }
    found = settings(AXOLOTL | {"datasets": [plain[0] | sharegpt]})
    assert (found["data.format"], found["data.columns"]) == ("sharegpt", {"conversations": "talk"})


def test_llama_factory() -> None:
    found = settings(LLAMA_FACTORY, gpus=8)
    assert found == {
        "model.path": "Qwen/Qwen3-4B",
        "model.lora.rank": 8,
        "model.lora.alpha": 16.0,
        "model.lora.targets": ["q_proj", "v_proj"],
        "model.lora.dropout": 0.0,
        "data.train": ["identity", "alpaca_en_demo"],
        "data.chat_template": "tokenizer",
        "data.seq_length": 4096,
        "data.loss_on": "last_assistant",
        "run_root": "saves/qwen3-4b",
        "name": "sft",
        "train.micro_batch_size": 1,
        "train.global_batch_unit": "tokens",
        "train.global_batch_size": 1 * 8 * 8 * 4096,
        "train.epochs": 3,
        "train.optimizer.warmup_ratio": 0.1,
        "data.packing": True,
        "checkpoint.every": 500,
        "train.optimizer.loraplus_ratio": 16,
        "train.optimizer.lr": 5e-5,
        "train.optimizer.schedule": "linear",
        "train.optimizer.beta2": 0.999,
        "train.seed": 42,
    }


@pytest.mark.parametrize("config", [TRL, AXOLOTL, LLAMA_FACTORY], ids=["TRL", "axolotl", "LLaMA-Factory"])
def test_what_is_printed_is_a_config_of_ours_and_every_key_is_accounted_for(config: dict[str, Any]) -> None:
    conversion = converted(config, gpus=2)
    leaves = read_yaml(to_yaml(conversion, {}), "cfg.yaml", RunSpec, "file")
    spec = typed_spec(leaves)
    assert leaves.problems == []
    # What needs something that these files do not have, held-out data, or that a launcher alone has not: tensorboard.
    missing = {"train.eval_every", "checkpoint.keep_best", "logging.tensorboard"}
    assert [(key, text) for key, text in spec_problems(spec) if key not in missing] == []
    keys = {outcome.key.partition(".")[0] for outcome in conversion.outcomes}
    assert set(config) <= keys
    assert all(outcome.translation.settings or outcome.translation.note for outcome in conversion.outcomes)


@pytest.mark.parametrize(
    ("base", "change", "problem"),
    [
        (AXOLOTL, {"load_in_4bit": True}, "load_in_4bit: True: the frozen weights stay in bf16"),
        (AXOLOTL, {"adapter": "qlora"}, "adapter: 'qlora' is not supported; lora is."),
        (AXOLOTL, {"rl": "dpo"}, "rl: 'dpo': supervised fine-tuning alone is done here"),
        (AXOLOTL, {"lr_scheduler": "rex"}, "lr_scheduler: 'rex' does not exist here; these do: linear, cosine"),
        (AXOLOTL, {"optimizer": "adamw_bnb_8bit"}, "optimizer: 'adamw_bnb_8bit' is not supported; AdamW with 32-bit"),
        (AXOLOTL, {"datasets": [{"path": "a", "type": "oasst"}]}, "datasets: type 'oasst' is not known"),
        (AXOLOTL, {"datasets": [{"path": "a", "roles_to_train": ["user"]}]}, "datasets: roles_to_train ['user'] of a"),
        (AXOLOTL, {"datasets": [{"path": "a", "train_on_eos": "last"}]}, "datasets: train_on_eos 'last' of a data set"),
        (AXOLOTL, {"datasets": [{"path": "a", "type": "alpaca"}]}, "type 'alpaca' writes texts of its own around"),
        (AXOLOTL, {"datasets": [{"path": "a", "roles": {"user": ["me"]}}]}, "datasets: roles: me for user"),
        (
            AXOLOTL,
            {"datasets": [{"path": "a", "message_property_mappings": {"role": "who", "content": "said"}}]},
            "datasets: messages with 'who' and 'said': they have role and content here, or from and value",
        ),
        (AXOLOTL, {"datasets": [{"path": "a", "roles_of_users": []}]}, "datasets: roles_of_users of a data set"),
        (AXOLOTL, {"lora_target_linear": None, "lora_target_modules": ".*_proj"}, "adapter: .*_proj: layers are named"),
        (AXOLOTL, {"excess_length_strategy": "split"}, "'split' is not drop, truncate or raise"),
        (AXOLOTL, {"sequnce_len": 3}, "sequnce_len: not a word of axolotl that is known; did you mean 'sequence_len'?"),
        (LLAMA_FACTORY, {"stage": "dpo"}, "stage: 'dpo' is not supported; supervised fine-tuning alone"),
        (LLAMA_FACTORY, {"finetuning_type": "freeze"}, "finetuning_type: 'freeze' is not supported; all weights or"),
        (LLAMA_FACTORY, {"quantization_bit": 4}, "quantization_bit: 4: the frozen weights stay in bf16"),
        (LLAMA_FACTORY, {"max_samples": 100}, "max_samples: 100: every row counts"),
        (TRL, {"loss_type": "dft"}, "loss_type: 'dft' is not supported; nll is"),
        (TRL, {"fp16": True}, "fp16: True: fp16 does not exist here"),
        (TRL, {"eval_steps": 0.1}, "eval_steps: 0.1 is a share of all steps; give steps"),
        (
            TRL,
            {"packing_strategy": "wrapped"},
            "packing: packing_strategy 'wrapped': examples never see each other here",
        ),
        (
            TRL,
            {"lr_scheduler_kwargs": {"num_cycles": 2}},
            "lr_scheduler_type: lr_scheduler_kwargs num_cycles of cosine",
        ),
        (TRL, {"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is not a whole number"),
        (TRL, {"max_length": 512, "max_seq_length": 256}, "max_seq_length: 256 contradicts max_length 512"),
    ],
)
def test_what_would_train_something_else_is_refused(base: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    (found,) = problems(base | change)
    assert problem in found
    assert found.startswith("sft.yaml")


def test_problems_name_lines_and_come_all_at_once() -> None:
    config = {"model_name_or_path": "a", "fp16": True, "deepspeed": "ds.json", "load_in_8bit": True}
    lines = [problem.split(":")[1] for problem in problems(config)]
    assert lines == ["2", "4"]


def test_defaults_of_the_trainer_that_are_not_ours_are_written_down() -> None:
    found = settings({"model_name_or_path": "a", "dataset_name": "b"})
    assert found["train.micro_batch_size"] == found["train.global_batch_size"] == 8
    assert (found["train.epochs"], found["train.optimizer.lr"], found["train.seed"]) == (3, 2e-5, 42)
    said = notes({"model_name_or_path": "a", "dataset_name": "b"})
    assert said["per_device_train_batch_size"].startswith("not in the file; to TRL that means 8")
    assert "none for prompt and completion that are texts" in said["chat_template_path"]
    assert said["assistant_only_loss"].startswith("not in the file; to TRL that means all tokens of messages")
    assert said["gradient_checkpointing"].startswith("not in the file; to TRL that means true")
    assert (found["checkpoint.every"], found["logging.every"]) == (500, 10)
    assert "checkpoint.every" not in settings({"model_name_or_path": "a", "save_strategy": "no"})
    assert "data.train" not in settings({"model_name_or_path": "a", "dataset_name": None})
    assert settings({"model_name_or_path": "a", "bf16": None})["train.precision"] == "bf16"


def test_a_limit_of_steps_goes_before_epochs() -> None:
    found = settings({"model_name_or_path": "a", "max_steps": 70, "num_train_epochs": 3})
    assert found["train.max_steps"] == 70 and "train.epochs" not in found


def test_the_command_prints_config_and_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(AXOLOTL))
    assert main(["import", str(path), "--gpus", "2"]) == 0
    out, err = capsys.readouterr()
    assert yaml.safe_load(out)["train"]["global_batch_size"] == 8
    assert "  path: NousResearch/Llama-3.2-1B  # base_model\n" in out
    (line,) = (line for line in err.splitlines() if line.startswith("micro_batch_size"))
    assert line.endswith("2 x gradient_accumulation_steps 2 x 2 GPUs (--gpus)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--model-dir", "m"], "--model-dir: the file does not spell its model"),
    ],
)
def test_options_that_do_not_fit(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(yaml.safe_dump(AXOLOTL))
    assert main(["import", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no keys in it; a config of NeMo 1.x, TRL, axolotl or LLaMA-Factory is meant"),  # one was printed
        ("hello\n", "no keys in it; "),
        ("- a\n", "no keys in it; "),
        ("name: a\ncluster: local\nmodel: {path: b}\n", "a config of the launcher's own keys already; "),
    ],
)
def test_what_is_no_config_of_another_trainer(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cfg.yaml"
    path.write_text(text)
    assert main(["import", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {path}: {message}")


def test_a_config_of_ours_is_nobody_elses() -> None:
    assert recognised("name: run\nmodel: {path: a}\nbase_model: b\n") is None
    assert recognised("trainer: {devices: 1}\nmodel: {}\n") is None
    assert recognised("- a\n") is None
    assert recognised("a: [\n") is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("learning_rate: !own 12", "theirs.yaml:{}: the tag !own means nothing in a config"),
        (
            "learning_rate: !!python/object/apply:os.getpid []",
            ":{}: the tag !!python/object/apply:os.getpid means nothing",
        ),
        (
            "base_model: other",
            ":{}: not valid YAML: while constructing a mapping: found duplicate key base_model",
        ),
        ("learning_rate: [1", "not valid YAML"),
    ],
)
@pytest.mark.parametrize("second", ["seed: 1", "model: {}\ntrainer: {}"], ids=["axolotl", "nemo"])
def test_a_text_that_cannot_be_read_is_refused_with_its_line(
    second: str, line: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(f"base_model: some\n{second}\n{line}\n", encoding="utf-8")
    assert main(["import", str(path)]) == ExitCode.BAD_INPUT
    assert problem.format(2 + len(second.splitlines())) in capsys.readouterr().err
