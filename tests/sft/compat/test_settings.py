"""Every setting of a TRLConfig is used, noted as without effect, or refused by name. A NeMo config wins over it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from launcher.contract.errors import ConfigError
from sft.compat import trlx
from sft.compat.trlx import TRLConfig
from sft.compat.trlx.megatron_cfg import MegatronConfig, read_megatron_config
from sft.compat.trlx.settings import Settled, run_place, settle
from sft.compat.trlx.trainer import _name_for_wandb
from sft.runtime.rank_env import RankEnv
from tests.sft.compat.material import megatron_config, trl_config
from tests.tiny_model import make_tiny_model


def config(**changes: Any) -> TRLConfig:
    """A TRLConfig with changes by dotted names."""
    return TRLConfig.update(trl_config("model"), {key.replace("__", "."): value for key, value in changes.items()})


def settled(megatron: dict[str, Any] | None = None, **changes: Any) -> Settled:
    taken = read_megatron_config(megatron, 331) if megatron is not None else None
    return settle(config(**changes), taken, RankEnv())


def value(key: str, megatron: dict[str, Any] | None = None, **changes: Any) -> Any:
    return settled(megatron, **changes).values[key].value


ALONE: list[tuple[str, Any, str, Any]] = [
    ("method__gen_kwargs", {"max_new_tokens": 9}, "evaluation.max_new_tokens", 9),
    ("method__gen_kwargs", {"use_greedy": False, "temperature": 0.5}, "evaluation.temperature", 0.5),
    ("method__gen_kwargs", {"use_greedy": True, "temperature": 0.5}, "evaluation.temperature", 0.0),
    ("method__gen_kwargs", {"use_greedy": False, "do_sample": False}, "evaluation.temperature", 0.0),
    ("method__gen_kwargs", {"use_greedy": False, "top_k": 0}, "evaluation.top_k", None),
    ("method__gen_kwargs", {"use_greedy": False, "top_k": 7}, "evaluation.top_k", 7),
    ("method__gen_kwargs", {"use_greedy": False}, "evaluation.top_p", 0.9),
    ("method__gen_kwargs", {}, "evaluation.repetition_penalty", 1.2),
    ("model__peft_config", {"peft_type": "LORA", "r": 4}, "model.lora.rank", 4),
    ("model__peft_config", {"peft_type": "LORA", "lora_alpha": 32}, "model.lora.alpha", 32.0),
    ("model__peft_config", {"peft_type": "LORA", "target_modules": ["q_proj"]}, "model.lora.targets", ["q_proj"]),
    ("model__peft_config", {"peft_type": "LORA", "target_modules": "all-linear"}, "model.lora.targets", ["all-linear"]),
    ("model__peft_config", {"peft_type": "LORA", "use_dora": True, "bias": "none"}, "model.lora.dora", True),
    ("model__peft_config", {"peft_type": "LORA", "use_rslora": True}, "model.lora.rslora", True),
    ("optimizer__kwargs", {"lr": "1e-5"}, "train.optimizer.lr", 1e-5),
    ("optimizer__kwargs", {"betas": [0.8, 0.9]}, "train.optimizer.beta1", 0.8),
    ("optimizer__kwargs", {"betas": [0.8, 0.9]}, "train.optimizer.beta2", 0.9),
    ("optimizer__kwargs", {"eps": 1e-6}, "train.optimizer.eps", 1e-6),
    ("optimizer__kwargs", {"weight_decay": 0.1}, "train.optimizer.weight_decay", 0.1),
    ("scheduler__kwargs", {"T_max": 9.0}, "train.optimizer.decay_steps", 9),
    ("scheduler__kwargs", {"eta_min": 1e-4}, "train.optimizer.min_lr", 1e-4),
    ("scheduler__kwargs", {"eta_min": 3e-3}, "train.optimizer.schedule", "constant"),
    ("train__total_steps", 9, "train.max_steps", 9),
    ("train__seq_length", 9, "data.seq_length", 9),
    ("train__batch_size", 3, "train.global_batch_size", 3),
    ("train__minibatch_size", 2, "train.micro_batch_size", 2),
    ("train__checkpoint_interval", 9, "checkpoint.every", 9),
    ("train__seed", 9, "data.cyclic_seed", 9),
    ("train__seed", 9, "train.seed", 9),
    ("train__tracker", "tensorboard", "logging.tensorboard", True),
]


@pytest.mark.parametrize(("key", "given", "ours", "expected"), ALONE)
def test_settings_are_mapped(key: str, given: Any, ours: str, expected: Any) -> None:
    assert value(ours, **{key: given}) == expected


def test_greedy_answers_have_no_settings_of_sampling() -> None:
    """They would be refused: nothing is drawn."""
    found = settled(method__gen_kwargs={"use_greedy": True, "top_k": 7}).values
    assert not {"evaluation.top_k", "evaluation.top_p"} & found.keys()


def test_the_tracker_wandb_logs_to_the_project() -> None:
    found = value("logging.wandb", train__tracker="wandb", train__project_name="mine")
    assert found == "mine"
    assert (
        "logging.wandb"
        not in settled({**megatron_config(), "exp_manager": {"name": "x"}}, train__tracker="wandb").values
    )


def test_wandb_is_told_entity_group_and_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENTITY", "RUN_GROUP", "TAGS"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that it is removed behind the test
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("WANDB_ENTITY", "mine")
    _name_for_wandb(config(train__entity_name="theirs", train__group_name="g", train__tags=["a", "b"]))
    found = [os.environ[f"WANDB_{name}"] for name in ("ENTITY", "RUN_GROUP", "TAGS")]
    assert found == ["mine", "g", "a,b"]


REFUSED: list[tuple[str, Any, str]] = [
    ("method__gen_kwargs", {"num_beams": 4}, "method.gen_kwargs.num_beams: not supported"),
    ("method__gen_kwargs", {"top_p": [0.5, 0.9]}, "method.gen_kwargs.top_p: [0.5, 0.9]: give one value"),
    ("model__model_arch_type", "seq2seq", "model.model_arch_type: 'seq2seq'; causal"),
    ("model__num_layers_unfrozen", 2, "model.num_layers_unfrozen: 2; layers cannot be frozen"),
    ("model__model_extra_configs", {"a": 1}, "model.model_extra_configs: not passed on"),
    ("model__peft_config", {"peft_type": "PREFIX_TUNING"}, "model.peft_config: peft_type PREFIX_TUNING"),
    ("model__peft_config", {"peft_type": "LORA", "use_qalora": True}, "model.peft_config.use_qalora: not supported"),
    ("model__peft_config", {"peft_type": "LORA", "bias": "all"}, "model.peft_config.bias: not supported"),
    ("tokenizer__truncation_side", "middle", "tokenizer.truncation_side: 'middle'"),
    ("tokenizer__tokenizer_extra_configs", {"a": 1}, "tokenizer.tokenizer_extra_configs: not passed on"),
    ("optimizer__name", "sgd", "optimizer.name: 'sgd' is not supported"),
    ("optimizer__kwargs", {"lrr": 1}, "optimizer.kwargs.lrr: not supported; did you mean 'lr'?"),
    ("scheduler__name", "linear", "scheduler.name: 'linear' is not supported"),
    ("scheduler__kwargs", {"T_mx": 1}, "scheduler.kwargs.T_mx: not supported; did you mean 'T_max'?"),
    ("train__pipeline", "Mine", "train.pipeline: 'Mine' is not supported"),
    ("train__tracker", "aim", "train.tracker: 'aim' is not wandb"),
    ("train__rollout_logging_dir", "x", "train.rollout_logging_dir: there are no rollouts"),
]


@pytest.mark.parametrize(("key", "given", "message"), REFUSED)
def test_settings_are_refused_by_name(key: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        settled(**{key: given})
    (problem,) = error.value.problems
    assert problem.startswith(message)


def test_every_field_is_accounted_for() -> None:
    """A field that a later version adds must be handled; those read elsewhere are listed."""
    elsewhere = {
        "method.name",  # chooses the class
        "model.model_path", "tokenizer.tokenizer_path",  # found on disk by the trainer
        "tokenizer.padding_side",  # no effect: padding is masked by length, on whichever side
        "train.epochs",  # no effect: the order of the data has no epochs, total_steps decides
        "train.eval_interval", "train.trainer", "train.trainer_kwargs", "train.checkpoint_dir", "train.run_name",
        "train.resume_from_checkpoint", "train.project_name",
        "train.entity_name", "train.group_name", "train.tags",  # of W&B, by its own variables
        "train.save_best",  # no effect: no metric is named to compare
        "train.save_optimizer", "train.logging_dir",  # a note, see below
    }  # fmt: skip
    covered = {key.replace("__", ".") for key, *_ in (*ALONE, *REFUSED)} | elsewhere
    sections = {**{name: type(getattr(config(), name)) for name in vars(config())}}
    fields = {f"{name}.{item.name}" for name, section in sections.items() for item in dataclasses.fields(section)}
    assert fields == covered


def test_what_has_no_effect_is_said() -> None:
    notes = settled(train__save_optimizer=False, train__logging_dir="x").notes
    assert [note.partition(": ")[2].split()[0] for note in notes] == ["train.logging_dir:", "train.save_optimizer"]


def test_the_nemo_config_decides_where_both_speak_and_says_so() -> None:
    megatron = megatron_config(global_batch_size=8)
    megatron["trainer"]["max_steps"] = 7
    found = settled(megatron, train__batch_size=4, optimizer__kwargs={"lr": 1.0})
    assert found.values["train.global_batch_size"].value == 8
    assert found.values["train.max_steps"].value == 7
    assert found.values["train.optimizer.lr"].value == 3e-3
    assert "train.batch_size 4 is replaced by model.global_batch_size 8" in found.notes
    assert "train.total_steps 4 is replaced by trainer.max_steps 7" in found.notes
    assert "optimizer.kwargs.lr 1.0 is replaced by model.optim.lr 0.003" in found.notes


def test_where_the_nemo_config_is_silent_the_trlconfig_decides() -> None:
    megatron = megatron_config()
    del megatron["trainer"]["max_steps"], megatron["model"]["optim"]
    found = settled(megatron, scheduler__kwargs={"eta_min": 1e-3}, train__minibatch_size=2)
    assert found.notes == ("train.minibatch_size 2 is replaced by model.micro_batch_size 1",)
    assert found.values["train.max_steps"].value == 4
    assert found.values["train.optimizer.min_lr"].value == 1e-3
    assert found.values["train.optimizer.lr"].value == 3e-3
    assert found.values["train.optimizer.beta2"].value == 0.95


def test_configs_that_agree_say_nothing() -> None:
    assert settled(megatron_config()).notes == ()


def megatron(**sections: Any) -> MegatronConfig:
    return read_megatron_config({**megatron_config(), **sections}, 331)


def test_the_run_directory_is_exp_managers_or_checkpoint_dir() -> None:
    here = Path.cwd()
    assert run_place(config(train__run_name="a"), None) == here / "ckpts" / "a"
    assert run_place(config(), megatron(exp_manager={"explicit_log_dir": "/logs/b"})) == Path("/logs/b")
    assert run_place(config(), megatron(exp_manager={"exp_dir": "/logs", "name": "c"})) == Path("/logs/c")
    assert run_place(config(), megatron(exp_manager={"name": "c"})) == here / "ckpts"


def test_a_nemo_config_is_a_file_a_name_a_dict_or_omegaconf(tmp_path: Path) -> None:
    OmegaConf.save(OmegaConf.create(megatron_config()), tmp_path / "nemo.yaml")
    for given in (str(tmp_path / "nemo.yaml"), megatron_config(), OmegaConf.create(megatron_config())):
        assert read_megatron_config(given, 331).value("trainer.max_steps") == 4
    assert read_megatron_config("megatron_20b.yaml", 331).value("model.num_layers") == 44
    with pytest.raises(ConfigError, match="layernorm1p"):
        read_megatron_config("megatron_2b.yaml", 331)
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        read_megatron_config("nowhere.yaml", 331)
    with pytest.raises(ConfigError, match="sections trainer and model"):
        read_megatron_config({"model": {"seed": 1}}, 331)


@pytest.mark.parametrize("name", ["1_3b", "20b", "65b", "llama2_7b"])
def test_default_shapes_convert(name: str) -> None:
    shape = getattr(trlx, f"default_nemo_{name}_config")()
    found = settle(config(), read_megatron_config(shape, 331), RankEnv()).values
    ranks = found["resources.nodes"].value * found["resources.gpus_per_node"].value
    assert ranks == {"1_3b": 8, "20b": 32, "65b": 128, "llama2_7b": 32}[name]


def test_a_trainer_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    given = TRLConfig.from_dict(trl_config(model))
    with pytest.raises(ConfigError, match="reward_fn: belongs to reinforcement learning"):
        trlx.NeMoSFTTrainer(given, reward_fn=len)
    with pytest.raises(ConfigError, match=r"train\.trainer_kwargs\.megatron_config: not an argument"):
        trlx.NeMoSFTTrainer(given, megatron_config="x")
    with pytest.raises(ConfigError, match="metric_fn: needs eval_prompts"):
        trlx.train(samples=["a"], metric_fn=len, config=given)
    trainer = trlx.NeMoSFTTrainer(given, megatron_cfg=megatron_config(ranks=2))
    trainer.paths = dataclasses.replace(trainer.paths, root=tmp_path / "run")
    with pytest.warns(UserWarning, match=r"samples \[1\] have no token to train on and are left out \(1 of 2\)"):
        trainer.make_experience(["a b c", ""], 64)
    with pytest.raises(ConfigError, match=r"= 2 ranks, but 1 were started; start the program once for each"):
        trainer.learn()


def test_checkpoints_of_another_run_are_not_gone_on_from_unasked(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    done = tmp_path / "run" / "checkpoints" / "step-00000004"
    done.mkdir(parents=True)
    (done / "COMPLETE").touch()
    trainer = trlx.NeMoSFTTrainer(
        TRLConfig.from_dict(trl_config(model, checkpoint_dir=str(tmp_path / "run"))), megatron_cfg=megatron_config()
    )
    trainer.make_experience(["a b c"], 64)
    with pytest.raises(ConfigError, match="already holds checkpoints of a run"):
        trainer.learn()


def test_a_model_unlike_the_one_spelled_out_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    given = TRLConfig.from_dict(trl_config(model, checkpoint_dir=str(tmp_path / "run"), batch_size=32, total_steps=200))
    shape = trlx.default_nemo_llama2_7b_config()
    with pytest.warns(UserWarning, match="is replaced by"):
        trainer = trlx.NeMoSFTTrainer(given, megatron_cfg=shape, pretrained_model=str(model))
    trainer.make_experience(["a b c"], 64)
    with pytest.raises(ConfigError, match=r"hidden_size is 4096, but 64 in model\.path"):
        trainer.learn()


def test_the_metric_function_gets_what_it_takes(tmp_path: Path) -> None:
    """trlx's took samples alone; others take the other keys of the prompts as well."""
    model = make_tiny_model(tmp_path / "model")
    given = TRLConfig.from_dict(trl_config(model))
    called: list[dict[str, Any]] = []

    def whole(samples: list[str], **others: Any) -> dict[str, int]:
        called.append({"samples": samples, **others})
        return {"n": 1}

    def labels(texts: list[str], label: list[int]) -> dict[str, int]:
        called.append({"texts": texts, "label": label})
        return {"n": 2}

    for function in (whole, labels):
        trainer = trlx.NeMoSFTTrainer(given, metric_fn=function)
        trainer.add_eval_pipeline(trlx.PromptPipeline([{"prompt": "a", "label": 3}], 8, trainer.tokenizer))
        metric = trainer._metric()
        assert metric is not None
        metric(samples=["ab"], prompts=["a"], outputs=["b"])
    assert called == [
        {"samples": ["ab"], "prompts": ["a"], "outputs": ["b"], "label": [3]},
        {"texts": ["ab"], "label": [3]},
    ]


def test_pefts_own_object_is_read_and_what_it_sets_beyond_that_refused() -> None:
    """All that it can hold is in it; what somebody set differs from its defaults."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"], use_dora=True, task_type="CAUSAL_LM")
    assert value("model.lora.targets", model__peft_config=lora) == ["q_proj", "v_proj"]
    assert value("model.lora.dora", model__peft_config=lora) is True
    with pytest.raises(ConfigError) as error:
        settled(model__peft_config=peft.LoraConfig(r=4, bias="all", modules_to_save=["lm_head"]))
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "model.peft_config.bias",
        "model.peft_config.modules_to_save",
    ]
