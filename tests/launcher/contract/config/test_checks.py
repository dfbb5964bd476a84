"""Rules on single values: each wrong value is refused by its key."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.config.checks import spec_problems
from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError
from launcher.contract.schedulers import SchedulerName
from launcher.contract.secret_names import is_secret_name
from launcher.contract.spec import (
    CheckpointSpec,
    ClusterSpec,
    DataSpec,
    Fp8Spec,
    LoraSpec,
    ModelSpec,
    ResourcesSpec,
    RestartSpec,
    RunSpec,
    TrainSpec,
)

CFG = Path("cfg.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps=0", "train.max_steps: 0 is not at least 1"),
        ("train.optimizer.lr=0", "train.optimizer.lr: 0 is not above 0"),
        ("train.optimizer.lr=nan", "train.optimizer.lr: nan is not above 0"),
        ("train.optimizer.weight_decay=-1", "train.optimizer.weight_decay: -1 is not at least 0"),
        ("train.optimizer.min_lr=1", "train.optimizer.min_lr: 1 is above train.optimizer.lr 1e-05"),
        ("train.optimizer.beta2=1", "train.optimizer.beta2: 1 is not in [0, 1)"),
        ("model.hidden_dropout=1.5", "model.hidden_dropout: 1.5 is not in [0, 1)"),
        ("resources.cpus_per_task=0", "resources.cpus_per_task: 0 is not at least 1"),
        ("resources.nodes=0", "resources.nodes: 0 is not at least 1"),
        ("resources.gpu_hour_limit=-1", "resources.gpu_hour_limit: -1 is not at least 0"),
        ("restart.timeout=-1", "restart.timeout: -1 is not at least 0"),
        ("cluster.gpu_hour_price=inf", "cluster.gpu_hour_price: inf is not at least 0"),
        ("cluster.inter_node_bandwidth=0", "cluster.inter_node_bandwidth: 0 is not above 0"),
        ("train.optimizer.decay_steps=0", "train.optimizer.decay_steps: 0 is not above train.optimizer.warmup_steps 0"),
        ("env_from=[A B]", "env_from: 'A B' is not the name of an environment variable"),
        ("env_from=[SLURM_X]", "env_from: SLURM_X is set by the launcher; drop it"),
        ("data.validation_sets.a b=*.jsonl", "data.validation_sets: 'a b' is not a name: letters, digits, "),
        ("notify.email=me", "notify.email: 'me' is not an address, e.g. me@example.org"),
        ("resources.memory_per_node=lots", "resources.memory_per_node: 'lots' is not a size such as 200G"),
        ("resources.extra_sbatch=-A x", "resources.extra_sbatch: '-A x' is not an option that starts with --; "),
        ("resources.extra_sbatch=--job-name=x", "resources.extra_sbatch: '--job-name=x' is the launcher's own: "),
        ("resources.extra_sbatch=--array=0-3", "resources.extra_sbatch: '--array=0-3' is the launcher's own: --array "),
        ("resources.extra_sbatch=--out=x", "resources.extra_sbatch: '--out=x' is the launcher's own: --output comes "),
        ("resources.extra_sbatch=--nodes 4", "resources.extra_sbatch: '--nodes 4' is the launcher's own: --nodes "),
        ("run_root=$SCRATCH/runs", "run_root: "),
        ("model.path=/$MODELS/a", "model.path: /$MODELS/a: $MODELS is not expanded in a config; write ${oc.env:"),
        ("cluster.srun_args=mpi", "cluster.srun_args: 'mpi' is not an option that starts with -; one"),
        ("cluster.env.A-B=1", "cluster.env: 'A-B' is not the name of an environment variable"),
        ("cluster.env.HF_TOKEN=x", "cluster.env: HF_TOKEN looks like a secret, and would be stored in the run "),
        ("cluster.env.SFT_ATTEMPT=x", "cluster.env: SFT_ATTEMPT is set by the launcher or Slurm, for "),
        ("cluster.env.RANK=0", "cluster.env: RANK is set by the launcher or Slurm"),
        ("cluster.env.SLURM_NTASKS_PER_NODE=0", "cluster.env: SLURM_NTASKS_PER_NODE is set by the launcher or Slurm"),
        ("env_from=[WORLD_SIZE]", "env_from: WORLD_SIZE is set by the launcher; drop it"),
        ("data.validation_split=0.0%", "data.validation_split: '0.0%' is not a percentage above 0% and below 100%"),
        ("logging.wandb=false", "logging.wandb: 'false' is not the name of a project"),
        ("logging.mlflow=True", "logging.mlflow: 'True' is not a tracking URI or local"),
        ("resources.nodes=2", "resources.nodes: 2 on cluster local, which is this machine alone; set it to 1"),
        ("resources.spare_nodes=1", "resources.spare_nodes: 1 on cluster local, which is this machine alone; "),
        (
            "resources.time=2 & resources.signal_seconds=120",
            "resources.signal_seconds: 120 is not below the 120 s of resources.time 2, so that ranks would be told to ",
        ),
        ("resources.time=0:01:30", "resources.signal_seconds: 120 is not below the 90 s of resources.time 0:01:30, "),
        ("restart.node_seconds=0", "restart.node_seconds: 0 is not above 0"),
        ("run_root=a%j", "run_root: '"),
        ("run_root=a:b", "run_root: '"),
        ("cluster.runtime.kind=venv", "cluster.runtime.path: missing; runtime kind venv needs it"),
        ("cluster.runtime.kind=apptainer", "cluster.runtime.image: missing; runtime kind apptainer needs it"),
        ("cluster.runtime.mounts=/a", "cluster.runtime.mounts: '/a' is not SOURCE:TARGET[:OPTIONS]"),
        ("train.eval_every=5", "train.eval_every: 5 needs data.validation, data.validation_split, "),
        ("train.early_stopping.patience=2", "train.early_stopping.metric: 'eval_loss' is not what evaluations "),
        ("checkpoint.keep_best=1", "checkpoint.best_metric: 'eval_loss' is not what evaluations of this "),
        ("train.spike_factor=1", "train.spike_factor: 1 is not above 1"),
        ("evaluation.top_p=0", "evaluation.top_p: 0 is not in (0, 1]"),
        ("evaluation.metric=a.b:c", "evaluation.metric: a.b:c needs evaluation.prompts, which is unset"),
        ("train.on_bad_step=rewind", "train.on_bad_step: rewind needs checkpoint.every: without it "),
        (
            "train.early_stopping.patience=2 & data.validation=a.jsonl",
            "train.early_stopping.patience: 2 needs train.eval_every: without it evaluations are before the first and ",
        ),
        (
            "checkpoint.keep_best=2 & data.validation=a.jsonl",
            "checkpoint.keep_best: 2 needs train.eval_every: without it evaluations are before the first and ",
        ),
        (
            "checkpoint.keep_best=2 & checkpoint.best_metric=metric/x & evaluation.metric=a.b:c & "
            "evaluation.prompts=cfg.yaml",
            "checkpoint.keep_best: 2 needs train.eval_every: ",
        ),
        ("notify.on=failure", "notify.on: failure, and nobody is told; give notify.webhook_env, email or command"),
        ("evaluation.temperature=0.5", "evaluation.temperature: 0.5 needs evaluation.prompts, which is unset"),
        ("evaluation.stop_tokens=x", "evaluation.stop_tokens: ['x'] needs evaluation.prompts, which is unset"),
        ("train.early_stopping.min_delta=1", "train.early_stopping.min_delta: 1 needs train.early_stopping.patience, "),
        ("train.early_stopping.mode=max", "train.early_stopping.mode: max needs train.early_stopping.patience, "),
        ("checkpoint.best_metric=metric/a", "checkpoint.best_metric: metric/a needs checkpoint.keep_best above 0"),
        ("checkpoint.best_mode=max", "checkpoint.best_mode: max needs checkpoint.keep_best above 0"),
        ("cluster.runtime.image=x.sif", "cluster.runtime.image: 'x.sif': runtime kind none starts no container"),
        ("cluster.runtime.mounts=/a:/b", "cluster.runtime.mounts: ['/a:/b']: runtime kind none starts no container"),
        ("cluster.runtime.path=env", "cluster.runtime.path: env: only runtime kinds venv and conda activate one, not"),
        ("preflight.enabled=on", "preflight.enabled: on with cluster local, which is this machine alone; set it to"),
        ("train.attention=flash4 & train.kernels=plain", "train.attention: flash4 is a kernel of fused layers, and "),
        ("train.attention=flash2 & train.kernels=plain", "train.attention: flash2 is a kernel of fused layers, and "),
        ("train.attention=flash2", "train.attention: flash2 is a kernel for GPUs, and resources.gpus_per_node is 0; "),
        ("train.linear_attention=fla", "train.linear_attention: fla needs GPUs, and resources.gpus_per_node is 0; "),
        ("train.linear_attention=fla & train.precision=fp32", "train.linear_attention: fla does not compute in fp32"),
        ("cluster.host_directory=/x", "cluster.host_directory: needs host: without it commands run on this machine"),
        ("restart.node_seconds=5", "restart.node_seconds: 5 with restart.how requeue: only restart.how in_place waits"),
        ("data.on_mismatch=split & data.chat_template=none", "data.on_mismatch: split is for turns that a chat "),
        ("train.precision=fp8 & train.fp8.evaluation=true", "train.fp8.evaluation: true, and nothing is evaluated; "),
        (
            "evaluation.prompts=cfg.yaml & evaluation.seed=5",
            "evaluation.seed: 5 needs evaluation.temperature above 0: nothing is sampled",
        ),
        ("train.attention=flash4 & train.precision=fp32", "train.attention: flash4 computes in half "),
        ("train.attention=flash4 & model.attention_dropout=0.1", "train.attention: flash4 has no dropout, and "),
        ("train.attention=flash4 & train.deterministic=true", "train.attention: flash4: its results depend "),
        ("train.linear_attention=fla & train.deterministic=true", "train.linear_attention: fla: its results "),
        ("train.recompute_layers=2", "train.recompute_layers: 2 needs train.recompute full; with none no whole layers"),
        ("train.recompute=offload & train.recompute_layers=2", "train.recompute_layers: 2 needs train.recompute full"),
        ("train.cuda_graphs=always", "train.cuda_graphs: always: graphs are not made for this run (rows are not "),
        ("train.cuda_graphs=always & data.packing=true", "train.cuda_graphs: always: graphs are not made for this "),
        ("train.cuda_graphs=always & train.kernels=plain", "train.cuda_graphs: always: graphs are not made for this "),
        ("train.precision=fp32 & train.optimizer.grad_reduce=bf16", "train.optimizer.grad_reduce: bf16 with "),
        ("evaluation.prompts=cfg.yaml & evaluation.top_k=5", "evaluation.top_k: 5 needs evaluation.temperature above"),
        ("evaluation.prompts=cfg.yaml & evaluation.top_p=0.5", "evaluation.top_p: 0.5 needs evaluation.temperature "),
        ("evaluation.prompts=nope", "evaluation.prompts: "),
        ("data.validation_sets.maths=nope/*.jsonl", "data.validation_sets: maths: no file matches "),
        ("model.path=cfg.yaml", "model.path: "),
        ("model.tokenizer=nope", "model.tokenizer: "),
        ("data.chat_template=nope.jinja", "data.chat_template: "),
        ("checkpoint.resume_from=model", "checkpoint.resume_from: "),
        ("model.path=package:json/x.gguf", "model.path: package:json/x.gguf: it has no file 'x.gguf'"),
        ("model.path=package:nope_x/x", "model.path: package:nope_x/x: package 'nope_x' is not installed here"),
    ],
)  # fmt: skip
def test_rule(workdir: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CFG, override.split(" & "))
    (problem,) = caught.value.problems
    assert problem.partition(": ")[2].startswith(message)


def test_rules_between_two_values(workdir: Path) -> None:
    with pytest.raises(ConfigError, match=r"logging\.prompts: answers need checkpoint\.export: true$"):
        load_config(CFG, ["logging.prompts=hello?", "checkpoint.export=false"])
    with pytest.raises(ConfigError, match="pyxis is an extension of srun; a local run can use apptainer"):
        load_config(CFG, ["cluster.runtime.kind=pyxis", "cluster.runtime.image=x"])
    with pytest.raises(ConfigError, match=r"model is not a venv: it has no bin/activate$"):
        load_config(CFG, ["cluster.runtime.kind=venv", "cluster.runtime.path=model"])


@pytest.mark.parametrize("limit", ["30", "1:30", "0", "01:00:00", "1-00", "1-00:30", "1-00:30:15", "UNLIMITED"])
def test_time_limits_slurm_takes(workdir: Path, limit: str) -> None:
    given = [f"resources.time={limit}", "resources.signal_seconds=60"]
    assert load_config(CFG, given).spec.resources.time == limit


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("my_password", True),
        ("AWS_SECRET_ACCESS", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("NCCL_IB_PKEY", False),
        ("HOME", False),
    ],
)
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


def test_settings_of_fp8() -> None:
    """Without it they would be of no effect; a linear that does not exist has no gradients."""
    given = Fp8Spec(bf16_first_layers=1, evaluation=True)
    assert {key: text for key, text in spec_problems(RunSpec(train=TrainSpec(fp8=given))) if "fp8" in key} == {
        "train.fp8.evaluation": "True needs train.precision fp8, which is bf16",
        "train.fp8.bf16_first_layers": "1 needs train.precision fp8, which is bf16",
    }

    def problems(**settings: Any) -> dict[str, str]:
        train = TrainSpec(precision="fp8", fp8=Fp8Spec(**settings))
        spec = RunSpec(train=train, data=DataSpec(validation=["held-out.jsonl"]))
        return {key: text for key, text in spec_problems(spec) if "fp8" in key}

    assert not problems(evaluation=True, bf16_last_layers=2, gradients="e5m2", bf16_gradients=["fc1", "proj"])
    assert problems(bf16_gradients=["fc3"]) == {
        "train.fp8.bf16_gradients": "'fc3' is no linear of a layer; known are qkv, proj, fc1, fc2"
    }
    assert "twice" in problems(bf16_gradients=["fc1", "fc1"])["train.fp8.bf16_gradients"]
    every = ["qkv", "proj", "fc1", "fc2"]
    assert problems(bf16_gradients=every).keys() == set()
    assert "of no use" in problems(bf16_gradients=every, gradients="e5m2")["train.fp8.gradients"]
    assert not problems(experts=True)
    assert "takes e4m3 alone" in problems(experts=True, gradients="e5m2")["train.fp8.experts"]


def test_fp8_where_it_cannot_be() -> None:
    """On GPUs without fp8 products, before the queue; adapters over fp8 are fine."""
    plain = RunSpec(train=TrainSpec(precision="fp8"))
    assert "train.precision" not in dict(spec_problems(plain))
    adapted = dataclasses.replace(plain, model=ModelSpec(lora=LoraSpec(rank=4)))
    assert "train.precision" not in dict(spec_problems(adapted))
    for named in ({"gpu": "a100-80gb"}, {"gpu_type": "A100-80GB"}):
        older = dataclasses.replace(plain, cluster=ClusterSpec(**named))
        assert "kind a100-80gb, which have no fp8 products" in dict(spec_problems(older))["train.precision"]
    newer = dataclasses.replace(plain, cluster=ClusterSpec(gpu="h100"))
    assert "train.precision" not in dict(spec_problems(newer))


def test_an_environment_variable_is_spelled_out(workdir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CFG, ["model.path=${MODELS}/a"])
    assert caught.value.problems[0].endswith("not found; an environment variable is ${oc.env:MODELS}")


def test_copies_in_memory_are_for_restarts_in_place_on_nodes() -> None:
    def found(scheduler: SchedulerName, how: str, every: int | None) -> list[str]:
        cluster, checkpoint = ClusterSpec(name="c", scheduler=scheduler), CheckpointSpec(every=every, copy_every=10)
        spec = RunSpec(cluster=cluster, checkpoint=checkpoint, restart=RestartSpec(how=how))  # type: ignore[arg-type]
        return [why for key, why in spec_problems(spec) if key == "checkpoint.copy_every"]

    assert found("slurm", "in_place", 100) == found("slurm", "in_place", None) == []
    assert found("slurm", "none", 100) == ["10 with restart.how none: only restart.how in_place goes on from copies"]
    assert found("local", "in_place", 100) == ["10 on cluster c, which is this machine alone; leave it out"]
    assert found("slurm", "in_place", 10) == [
        "10 is not below checkpoint.every 10: no copy would be newer than the newest checkpoint"
    ]


def test_spare_nodes_are_for_restarts_in_place() -> None:
    def found(how: str, spare: int) -> list[str]:
        cluster = ClusterSpec(name="c", scheduler="slurm")
        resources, restart = ResourcesSpec(nodes=2, spare_nodes=spare), RestartSpec(how=how)  # type: ignore[arg-type]
        spec = RunSpec(cluster=cluster, resources=resources, restart=restart)
        return [f"{key}: {why}" for key, why in spec_problems(spec) if key in ("resources.spare_nodes", "restart.how")]

    assert found("in_place", 1) == found("in_place", 0) == found("requeue", 0) == []
    assert found("requeue", 1) == [
        "resources.spare_nodes: 1 with restart.how requeue: only restart.how in_place uses spare nodes, and they would "
        "be paid for in vain; set one of the two"
    ]
