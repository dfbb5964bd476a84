"""sft.compat.trlx trains: the defects of the trainer it takes over are gone, each with a test named for it."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import read_resolved
from sft.compat import trlx
from sft.compat.trlx.samples import Tokens
from tests.ranks import run_ranks
from tests.sft.compat.material import megatron_config, trl_config
from tests.tiers import thinned
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.parity

ANIMALS = ("otter", "heron", "lynx", "badger", "finch", "newt", "marten", "stoat")
SAMPLES = [f"Human: I saw {n + 2} {name}s. Assistant: {n + 2} {name}s." for n, name in enumerate(ANIMALS)]
PROMPTS = [f"Human: I saw {name}s. Assistant:" for name in ANIMALS[:3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied."""
    return make_tiny_model(tmp_path_factory.mktemp("trlx") / "model")


def learn(
    config: dict[str, Any], megatron: Any, prompts: list[Any] | None = None, stop_sequences: list[str] | None = None
) -> tuple[Path, list[list[str]]]:
    """Runs on a rank: trains; where, and the answers that the metric function was given on this rank."""
    answers: list[list[str]] = []

    def metric(samples: list[str], prompts: list[str], outputs: list[str]) -> dict[str, list[float]]:
        answers.append(outputs)
        return {"length": [float(len(output)) for output in outputs]}

    trl = trlx.TRLConfig.from_dict(copy.deepcopy(config))
    trl.train.trainer_kwargs = {"megatron_cfg": OmegaConf.create(megatron), **trl.train.trainer_kwargs}
    trainer = trlx.train(
        samples=SAMPLES,
        eval_prompts=prompts,
        metric_fn=metric if prompts else None,
        config=trl,
        stop_sequences=stop_sequences,
    )
    return trainer.paths.root, answers


def run(ranks: int, *args: Any) -> tuple[RunPaths, list[list[str]]]:
    results = run_ranks(ranks, learn, *args, timeout=240.0)
    return RunPaths(results[0][0]), results[0][1]


def losses(paths: RunPaths) -> list[float]:
    return [record["loss"] for record in read_lines(paths.metrics) if "loss" in record]


def metrics(paths: RunPaths, name: str) -> list[float]:
    return [record[name] for record in read_lines(paths.metrics) if name in record]


def row_losses(model_dir: Path, rows: list[Tokens]) -> list[torch.Tensor]:
    """transformers' loss of each target of each row."""
    reference = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.input_ids])
            logits = reference(input_ids=ids).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return found


def first_batch(model_dir: Path, count: int = 4, steps: int = 4) -> list[Tokens]:
    """What the original would have trained on in its first step."""
    trl = trlx.TRLConfig.from_dict(trl_config(model_dir))
    trainer = trlx.NeMoSFTTrainer(trl, megatron_cfg=megatron_config())
    trainer.make_experience(SAMPLES, trl.train.seq_length)
    order = trlx.ShuffledCyclicSequence(count * steps, trainer.store, trl.train.seed)
    return [order[place] for place in range(count)]


def test_defect_pipeline_parallel_works_and_defect_untied_heads_load(tmp_path: Path, model: Path) -> None:
    """The first loss under tp2 pp2 is transformers' own, which neither random heads nor lost stages would give."""
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    paths, _ = run(4, trl_config(model, checkpoint_dir=str(tmp_path / "run")), megatron_config(4, **layout))
    expected = torch.cat(row_losses(model, first_batch(model))).mean()
    assert losses(paths)[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses(paths)[-1] < losses(paths)[0]
    assert not read_resolved(paths.config).evaluation.prompts
    exported = AutoModelForCausalLM.from_pretrained(paths.export, dtype=torch.float32)
    assert not torch.equal(exported.lm_head.weight, exported.model.embed_tokens.weight)


def test_defect_metrics_are_of_all_ranks_and_defect_stop_sequences_are_obeyed(tmp_path: Path, model: Path) -> None:
    """Three prompts over two data parallel ranks: one metric call with all answers, each cut at the stop sequence."""
    one, answers = run(1, trl_config(model, checkpoint_dir=str(tmp_path / "one")), megatron_config(), PROMPTS)
    expected = [sum(map(len, outputs)) / len(PROMPTS) for outputs in answers]
    assert metrics(one, "metric/length") == pytest.approx(expected)
    assert len(answers) == 3  # before the first step, after the second, after the last
    stop = next(character for output in answers[0] for character in output[1:] if character.strip())
    config = trl_config(model, checkpoint_dir=str(tmp_path / "two"))
    two, cut = run(2, config, megatron_config(2), PROMPTS, [stop])
    assert cut[0] == [output[: output.index(stop)].rstrip() if stop in output else output for output in answers[0]]
    assert cut[0] != answers[0]
    assert metrics(two, "metric/length")[0] == pytest.approx(sum(map(len, cut[0])) / len(PROMPTS))


def test_defect_validation_is_optional(tmp_path: Path, model: Path) -> None:
    """Without prompts nothing is answered, and with limit_val_batches 0 neither."""
    off = megatron_config()
    off["trainer"]["limit_val_batches"] = 0.0
    off["trainer"]["max_steps"] = 1
    paths, answers = run(1, trl_config(model, checkpoint_dir=str(tmp_path / "off")), off, PROMPTS)
    assert answers == []
    assert not paths.generations.exists()
    assert len(losses(paths)) == 1


def test_defect_resume_keeps_the_data_position(tmp_path: Path, model: Path) -> None:
    """Steps 3 and 4 behind a checkpoint are those of the run that never stopped, bit for bit."""
    megatron = megatron_config()
    megatron["exp_manager"] = {"explicit_log_dir": str(tmp_path / "run"), "resume_if_exists": True}
    config = trl_config(model, checkpoint_interval=2)
    paths, _ = run(1, config, megatron)
    whole = losses(paths)
    shutil.rmtree(paths.checkpoint(4))
    again, _ = run(1, config, megatron)
    assert losses(again) == whole
    started = [event["step"] for event in read_lines(paths.events) if event["event"] == "training_started"]
    assert started == [0, 2]


def test_microbatch_mean_is_the_old_loss_and_is_off_by_default(tmp_path: Path, model: Path) -> None:
    """Against an independent mean of means over transformers' losses: it depends on the micro-batch, ours does not."""
    rows = row_losses(model, first_batch(model))
    old = {
        1: float(torch.stack([row.mean() for row in rows]).mean()),
        2: float(torch.stack([torch.cat(rows[:2]).mean(), torch.cat(rows[2:]).mean()]).mean()),
    }
    assert abs(old[1] - old[2]) > 1e-4
    for micro_batch, expected in old.items():
        megatron = megatron_config(micro_batch_size=micro_batch)
        config = trl_config(model, checkpoint_dir=str(tmp_path / f"old-{micro_batch}"))
        config["train"]["trainer_kwargs"] = {"overrides": {"train.objective": "microbatch_mean"}}
        paths, _ = run(1, config, megatron)
        assert losses(paths)[0] == pytest.approx(expected, rel=1e-5)
    config = trl_config(model, checkpoint_dir=str(tmp_path / "new"))
    paths, _ = run(1, config, megatron_config(micro_batch_size=2))
    assert losses(paths)[0] == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)


def learn_alone(config: dict[str, Any]) -> Path:
    """Runs on a rank: pairs and a dialog, and no NeMo config."""
    samples = [("Human: hello", "Assistant: hi"), ["a", "b", "c", "d"]]
    return trlx.train(samples=samples, config=trlx.TRLConfig.from_dict(config)).paths.root  # type: ignore[no-any-return]


def test_without_a_nemo_config_the_trlconfig_decides_alone(tmp_path: Path, model: Path) -> None:
    """train.batch_size is of each rank, as for trlx's other trainer; overrides are above all."""
    overrides = {"data.cyclic_seed": None, "data.packing": True, "train.micro_batch_size": 1}
    config = trl_config(model, checkpoint_dir=str(tmp_path / "run"), trainer_kwargs={"overrides": overrides})
    paths = RunPaths(run_ranks(2, learn_alone, config, timeout=240.0)[0])
    spec = read_resolved(paths.config)
    assert (spec.train.global_batch_size, spec.train.max_steps, spec.data.packing) == (8, 4, True)
    assert (spec.train.optimizer.lr, spec.train.optimizer.min_lr) == (3e-3, 3e-4)
    assert losses(paths)[-1] < losses(paths)[0]


def learn_twice(first: dict[str, Any], second: dict[str, Any]) -> list[Path]:
    """Runs on a rank."""
    return [learn(config, megatron_config())[0] for config in (first, second)]


def test_a_program_may_train_twice(tmp_path: Path, model: Path) -> None:
    configs = [trl_config(model, checkpoint_dir=str(tmp_path / name)) for name in ("a", "b")]
    first, second = (RunPaths(root) for root in run_ranks(1, learn_twice, *configs, timeout=240.0)[0])
    assert losses(first) == losses(second)
    assert len(losses(first)) == 4


def lightning_trainer(cfg: dict[str, Any]) -> tuple[int, int, str, int]:
    """Runs on a rank: what megatron_trainer makes of a NeMo config."""
    trainer = trlx.megatron_trainer(cfg)
    return trainer.max_steps, trainer.world_size, type(trainer.strategy).__name__, torch.initial_seed()


def test_megatron_trainer_is_a_lightning_trainer_of_the_nemo_config() -> None:
    (found,) = run_ranks(1, lightning_trainer, megatron_config(seed=77))
    assert found == (4, 1, "MegatronStrategy", 77)


def small(config: DictConfig, ranks: int, directory: Path, **model: Any) -> dict[str, Any]:
    """One of the original shapes on CPU ranks: fewer layers and a hidden size that tests can afford."""
    sizes = {
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 8,
        "num_layers": 4,
        "encoder_seq_length": 64,
        "max_position_embeddings": 64,
        "padded_vocab_size": 331,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tokenizer": {"type": None},
        "optim": {"lr": 3e-3, "sched": {"warmup_steps": 0, "constant_steps": 0, "min_lr": 3e-4}},
        **model,
    }
    trainer = {"devices": ranks, "num_nodes": 1, "accelerator": "cpu", "precision": 32, "max_steps": 8}
    where = {"explicit_log_dir": str(directory)}
    changed = OmegaConf.merge(config, {"trainer": trainer, "exp_manager": where, "model": sizes})
    return OmegaConf.to_container(changed)  # type: ignore[return-value]


TP2 = {"tensor_model_parallel_size": 2}
SHAPES: dict[str, tuple[int, DictConfig, dict[str, Any]]] = {
    "gpt-1.3b tp1 dp2": (2, trlx.default_nemo_1_3b_config(), {}),
    "gpt-20b tp4": (4, trlx.default_nemo_20b_config(), {"data": {"add_bos": False}}),
    "gpt-65b tp2 pp2": (4, trlx.default_nemo_65b_config(), {**TP2, "pipeline_model_parallel_size": 2}),
    "llama2 tp4": (4, trlx.default_nemo_llama2_7b_config(), {}),
    "gpt-65b tp2 pp4": (8, trlx.default_nemo_65b_config(), TP2),
}


@pytest.mark.parametrize("name", thinned(SHAPES, "gpt-65b tp2 pp2"))
def test_original_shapes_train_under_their_own_layout(tmp_path: Path, model: Path, name: str) -> None:
    """From random weights, as the original does without a pretrained_model."""
    ranks, config, changes = SHAPES[name]
    trl = trl_config(tmp_path / "nowhere")
    trl["tokenizer"]["tokenizer_path"] = str(model)
    paths, _ = run(ranks, trl, small(config, ranks, tmp_path / "run", **changes))
    spec = read_resolved(paths.config)
    sizes = {"tp": spec.topology.tensor_parallel, "pp": spec.topology.pipeline_parallel}
    assert {f"{kind}{size}" for kind, size in sizes.items() if size > 1} <= set(name.split())
    assert f"tp{sizes['tp']}" in name.split()
    found = losses(paths)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.3
