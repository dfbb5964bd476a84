"""Words of other trainers: every one that exists is known, and what it is said to be here is a key of ours."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.contract.config.load import load_config, value_at
from launcher.contract.errors import ConfigError
from launcher.contract.nemo.entries import Entry
from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import leaf_types
from launcher.contract.trainers import axolotl, llama_factory, trl
from launcher.contract.trainers.hints import WORDS, hint
from launcher.contract.trainers.word import Word

TABLES = {"TRL": trl.WORDS, "axolotl": axolotl.WORDS, "LLaMA-Factory": llama_factory.WORDS}


TRL_CLASSES = [
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
    ("trl", "scripts/utils.py", "ScriptArguments"),
    ("trl", "scripts/utils.py", "DatasetMixtureConfig"),
]
"""Later ones replace defaults of earlier ones."""


def fields_of(package: str, file: str, name: str) -> Iterator[tuple[str, ast.expr | None]]:
    """The fields of a dataclass in an installed package with what they are set to, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    (found,) = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == name)
    for item in found.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.dump(item):
            yield item.target.id, item.value


SAME_ALL_THE_SAME = {"model_revision", "load_best_model_at_end"}
"""main is what a hub id without a revision means; without checkpoint.keep_best the best checkpoint is the newest."""


def default_of(value: ast.expr | None) -> tuple[object, ...]:
    """The default in a field's value, as a tuple of one, or an empty tuple where a program would compute it."""
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    return (ast.literal_eval(value),) if isinstance(value, ast.Constant | ast.UnaryOp) else ()


@pytest.mark.parametrize(("package", "file", "name"), TRL_CLASSES)
def test_every_key_of_trl_is_known(package: str, file: str, name: str) -> None:
    unknown = [key for key, _ in fields_of(package, file, name) if key not in trl.WORDS and not key.startswith("_")]
    assert unknown == []


def test_every_default_of_trl_that_is_not_ours_is_told() -> None:
    """A key that nobody writes has TRL's default there and ours here. Where these differ the import says so."""
    found = (field for place in TRL_CLASSES for field in fields_of(*place))
    defaults = {key: value for key, node in found for value in default_of(node)}
    told = {key for absent in trl.ABSENT for key in absent.keys} | trl.DEFAULTS.keys()
    entries = {key: Entry(value, "default") for key, value in defaults.items()}
    silent = {}
    for key in defaults.keys() - told - SAME_ALL_THE_SAME:
        settings = trl.WORDS[key].rule(defaults[key], entries).settings if not key.startswith("_") else {}
        differing = {name: value for name, value in settings.items() if value_at(RunSpec(), name) != value}
        if differing:
            silent[key] = differing
    assert silent == {}
    assert {"logging_steps", "learning_rate", "seed"} <= defaults.keys() & told


@pytest.mark.parametrize("trainer", TABLES)
def test_keys_that_hints_name_exist(trainer: str) -> None:
    known = {key for key, _ in leaf_types(RunSpec)}
    sections = {".".join(key.split(".")[:count]) for key in known for count in range(1, key.count(".") + 1)}
    for word, found in TABLES[trainer].items():
        for key in re.findall(
            r"\b(?:train|data|model|checkpoint|logging|topology|resources|evaluation)\.[\w.]+", found.hint
        ):
            key = key.rstrip(".")
            assert key in known or key in sections, (word, key)


@pytest.mark.parametrize("words", TABLES.values(), ids=TABLES)
def test_hints_fit_behind_a_semicolon(words: dict[str, Word]) -> None:
    for word in words.values():
        assert word.hint and not word.hint.endswith(".") and not word.hint[0].isspace()


QUANTIZED = "; the frozen weights stay in bf16, or their products are in fp8 (train.precision)"


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (
            "train.per_device_train_batch_size",
            "; here it is train.micro_batch_size, and train.global_batch_size = it x gradient accumulation x data "
            "parallel ranks",
        ),
        (
            "train.gradient_accumulation_steps",
            "; it follows from train.global_batch_size: that / (train.micro_batch_size x data parallel ranks)",
        ),
        ("train.learning_rate", "; here it is train.optimizer.lr"),
        ("train.num_train_epochs", "; here it is train.epochs"),
        ("train.eval_steps", "; here it is train.eval_every"),
        ("gradient_checkpointing", "; here it is train.recompute: full"),
        ("model.lora_r", "; here it is model.lora.rank"),
        ("model.lora.target_modules", "; here it is model.lora.targets"),
        ("data.max_seq_length", "; here it is data.seq_length"),
        ("data.sequence_len", "; here it is data.seq_length"),
        ("data.cutoff_len", "; here it is data.seq_length"),
        ("fp16", "; fp16 does not exist here; train.precision is bf16, fp32 or fp8"),
        ("train.lr", "; here it is train.optimizer.lr"),
        ("train.warmup_ratio", "; here it is train.optimizer.warmup_ratio"),
        ("model.load_in_4bit", QUANTIZED),
        ("model.quantization", QUANTIZED),
        ("model.lora.qlora", QUANTIZED),
        ("train.nonsense", ""),
    ],
)
def test_hint(key: str, expected: str) -> None:
    assert hint(key, RunSpec) == expected


def test_hints_are_in_the_messages_of_files_and_overrides(tmp_path: Path) -> None:
    config = tmp_path / "cfg.yaml"
    config.write_text("name: run\nlearning_rate: 1e-5\ntrain: {gradient_acumulation_steps: 3}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config, ["model.lora.target_modules=all-linear"])
    assert f"{config}:2: unknown key 'learning_rate'; here it is train.optimizer.lr" in caught.value.problems
    slip = (
        f"{config}:3: unknown key 'train.gradient_acumulation_steps'; did you mean 'gradient_accumulation_steps'? it "
        "follows from train.global_batch_size: that / (train.micro_batch_size x data parallel ranks)"
    )
    assert slip in caught.value.problems
    override = "override 'model.lora.target_modules=all-linear': unknown key 'model.lora.target_modules'; here it is "
    assert f"{override}model.lora.targets" in caught.value.problems


def test_another_trainers_config_is_recognised_and_not_taken_apart(tmp_path: Path) -> None:
    config = tmp_path / "sft.yaml"
    config.write_text("model_name_or_path: Qwen/Qwen3-0.6B\nlearning_rate: 1e-5\n")
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert caught.value.problems == (
        f"{config} is a config of TRL; `launcher import {config} --gpus N` prints it in this launcher's keys",
    )


def test_words_of_two_trainers_are_trls() -> None:
    assert WORDS["packing"] is trl.WORDS["packing"]
