"""TRLConfig keeps trlx's fields and defaults, and names every key that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.contract.errors import ConfigError
from sft.compat import trlx
from sft.compat.trlx import TRLConfig, default_sft_config, get_trainer, register_trainer
from tests.sft.compat.material import trl_config


def problems_of(config: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        TRLConfig.from_dict(config)
    return list(error.value.problems)


def test_a_config_is_its_dict_and_its_file(tmp_path: Path) -> None:
    values = trl_config("model", seed=7)
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(values))
    config = TRLConfig.load_yaml(tmp_path / "trl.yaml")
    assert config == TRLConfig.from_dict(values)
    assert TRLConfig.from_dict(config.to_dict()) == config
    assert (config.train.seed, config.train.checkpoint_dir, config.tokenizer.padding_side) == (7, "ckpts", "left")
    assert '"total_steps": 4' in str(config)


def test_to_dict_gives_copies() -> None:
    config = default_sft_config()
    config.to_dict()["optimizer"]["kwargs"]["lr"] = 1.0
    assert config.optimizer.kwargs["lr"] == 1e-4


def test_defaults_are_those_of_trlx() -> None:
    train = default_sft_config().train
    assert (train.total_steps, train.seq_length, train.epochs, train.batch_size) == (1000, 1024, 100, 8)
    assert (train.seed, train.tracker, train.save_best, train.minibatch_size) == (1000, "wandb", True, None)


def test_every_nested_typo_is_named_with_what_was_meant() -> None:
    values = trl_config("model", totl_steps=5)
    values["method"]["gen_kwarg"] = {}
    values["optimiser"] = values.pop("optimizer")
    problems = problems_of(values)
    assert "train.totl_steps: not a known key; did you mean 'total_steps'?" in problems
    assert "method.gen_kwarg: not a known key; did you mean 'gen_kwargs'?" in problems
    assert "optimiser: not a section; did you mean 'optimizer'?" in problems
    assert "optimizer: missing section" in problems


def test_missing_keys_and_sections_that_are_none_are_named() -> None:
    values = trl_config("model")
    del values["train"]["seq_length"]
    values["model"] = 3
    assert problems_of(values) == ["model: 3 is not a section of keys and values", "train.seq_length: missing"]


def test_a_files_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "trl.yaml").write_text("train: [")
    with pytest.raises(ConfigError, match=r"trl\.yaml: cannot be read"):
        TRLConfig.load_yaml(tmp_path / "trl.yaml")
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(trl_config("model", sed=1)))
    with pytest.raises(ConfigError, match=r"trl\.yaml: train\.sed: not a known key; did you mean 'seed'"):
        TRLConfig.load_yaml(tmp_path / "trl.yaml")


def test_evolve_changes_a_copy_at_any_depth() -> None:
    config = default_sft_config()
    evolved = config.evolve(train={"seed": 3}, method={"gen_kwargs": {"max_new_tokens": 9}})
    assert (evolved.train.seed, evolved.method.gen_kwargs["max_new_tokens"]) == (3, 9)  # type: ignore[attr-defined]
    assert evolved.method.gen_kwargs["do_sample"] is True  # type: ignore[attr-defined]
    assert (config.train.seed, config.method.gen_kwargs["max_new_tokens"]) == (1000, 40)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"train\.sed: not a known key; did you mean 'seed'"):
        config.evolve(train={"sed": 3})


def test_update_takes_dotted_names_and_refuses_nested_typos() -> None:
    base = default_sft_config()
    changes = {"train.seed": 5, "method.gen_kwargs.top_k": 2, "optimizer": {"kwargs": {"lr": 1e-3}}}
    for given in (base, base.to_dict()):
        updated = TRLConfig.update(given, changes)
        assert (updated.train.seed, updated.method.gen_kwargs["top_k"]) == (5, 2)  # type: ignore[attr-defined]
        assert updated.optimizer.kwargs == {**base.optimizer.kwargs, "lr": 1e-3}
    for changes in ({"train.sed": 5}, {"trayn.seed": 5}, {"seed": 5}):
        with pytest.raises(ConfigError, match="not a"):
            TRLConfig.update(base, changes)


def test_tags_beside_the_sections_belong_to_train() -> None:
    """As trlx's own example of this trainer writes them."""
    with pytest.warns(UserWarning, match="tags belong to the section train"):
        assert default_sft_config().evolve(tags=["sft"]).train.tags == ["sft"]


@pytest.mark.parametrize("name", ["PPOConfig", "ilqlconfig", "RFTConfig"])
def test_reinforcement_learning_is_refused_by_name(name: str) -> None:
    values = trl_config("model")
    values["method"]["name"] = name
    (problem,) = problems_of(values)
    assert problem.startswith(f"method.name: {name} is reinforcement learning")


def test_trainers_are_found_by_name_whatever_its_case() -> None:
    assert get_trainer("nemosfttrainer") is get_trainer("NEMOSFTTRAINER") is trlx.NeMoSFTTrainer

    @register_trainer
    class MyTrainer(trlx.NeMoSFTTrainer):
        pass

    @register_trainer("Other")
    class Another(trlx.NeMoSFTTrainer):
        pass

    assert get_trainer("mytrainer") is MyTrainer
    assert get_trainer("OTHER") is Another
    with pytest.raises(ConfigError, match="did you mean 'nemosfttrainer'"):
        get_trainer("NeMoSFTrainer")
    with pytest.raises(ConfigError, match="NeMoILQLTrainer is reinforcement learning"):
        get_trainer("NeMoILQLTrainer")
    with pytest.raises(ConfigError, match="trlx's trainer on accelerate"):
        get_trainer("AccelerateSFTTrainer")


@pytest.mark.parametrize("name", ["reward_fn", "rewards", "dataset", "prompts"])
def test_rewards_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: belongs to reinforcement learning"):
        trlx.train(samples=["a"], config=default_sft_config(), **{name: [1.0]})  # type: ignore[arg-type]
