"""The config of a run as frozen dataclasses: the one schema that launcher, rank program and docs share.

Every field's docstring is its reference documentation (docs/config.md is made from it). Defaults are here and
nowhere else. `launcher.contract.config.load` reads what a user wrote into a `RunSpec`; `read_resolved` reads back what
the launcher resolved, which is what every rank runs.

Rejected: plain dicts with `.get(key, default)` at the point of use (a typo is then silent), and one class for
all settings (a rank would carry scheduler settings, the launcher would carry optimizer code).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

from launcher.contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesSpec:
    """What is asked of the scheduler. Unset values come from the cluster's own `resources` section."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 0
    """GPUs on each node; 0 trains on CPU ranks over gloo."""
    tasks_per_node: Optional[int] = None
    """Ranks on each node; default one a GPU, and 1 without GPUs."""
    cpus_per_task: Optional[int] = None
    """CPU cores for each rank."""
    memory_per_node: Optional[str] = None
    """Host memory of a node in Slurm's notation, e.g. 200G; 0 asks for all of it."""
    time: Optional[str] = None
    """Time limit in Slurm's notation: minutes, HH:MM:SS or D-HH:MM:SS."""
    partition: Optional[str] = None
    """Slurm partition."""
    account: Optional[str] = None
    """Account the job is charged to."""
    qos: Optional[str] = None
    """Quality of service."""
    constraint: Optional[str] = None
    """Node features that are required."""
    reservation: Optional[str] = None
    """Reservation to run in."""
    nodelist: Optional[str] = None
    """Run on these nodes, in Slurm's host list notation."""
    exclude: Optional[str] = None
    """Never run on these nodes."""
    exclusive: bool = False
    """Ask for whole nodes."""
    signal_seconds: int = 120
    """Seconds before the time limit at which ranks are told to save and stop."""
    gpu_hour_limit: Optional[float] = None
    """Submitting asks before a run that may take more GPU hours than this; `--yes` answers. Unset: never asks."""
    extra_sbatch: list[str] = field(default_factory=list)
    """Further sbatch options, one a list item, e.g. --mail-type=END."""

    @property
    def ranks_per_node(self) -> int:
        """Processes started on each node."""
        return self.tasks_per_node if self.tasks_per_node is not None else max(1, self.gpus_per_node)

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSpec:
    """The environment in which a rank's Python starts."""

    kind: Literal["none", "venv", "conda", "pyxis", "apptainer"] = "none"
    """none: `python` as it is; venv / conda: activated on each node; pyxis / apptainer: a container."""
    python: Optional[str] = None
    """Python program; default the launcher's own for kind none, else `python`."""
    path: Optional[str] = None
    """The venv's directory, or the conda environment's name or directory."""
    image: Optional[str] = None
    """Container image: a file or a registry reference."""
    mounts: list[str] = field(default_factory=list)
    """Bind mounts SOURCE:TARGET[:OPTIONS] for containers; the run directory is always mounted."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first, with any kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSpec:
    """One machine or site: how its jobs are written and started. One YAML file each in cluster_configs/."""

    name: str = "local"
    """Name, the same as its file's."""
    scheduler: Literal["slurm", "local"] = "local"
    """slurm: sbatch; local: processes on this machine."""
    template: Optional[str] = None
    """Batch script template; default slurm.sh.j2 or local.sh.j2."""
    gpu_directive: Literal["gpus_per_node", "gres", "gpus_per_task", "none"] = "gpus_per_node"
    """How this site wants GPUs asked for; none where whole nodes are given out."""
    gpu_type: Optional[str] = None
    """GPU type for the directive, e.g. h100 gives --gres=gpu:h100:8."""
    gpu: Optional[str] = None
    """Kind of GPU for planning: h100, a100-80gb and others of launcher/contract/gpu_kinds.yaml; default what gpu_type
    names. A run that cannot fit into its memory is refused; where the kind is not known, nothing is planned or
    refused."""
    inter_node_bandwidth: Optional[float] = None
    """GB/s between nodes, one direction a GPU, for planning; default that of the GPU's reference node."""
    gpu_hour_price: Optional[float] = None
    """Price of a GPU hour, in whatever unit the site counts; plans then show cost."""
    rendezvous: Literal["hostname", "node_addr"] = "hostname"
    """How ranks address the first node: its host name, or the address Slurm itself uses for it."""
    runtime: RuntimeSpec = field(default_factory=RuntimeSpec)
    """The environment a rank starts in."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of every rank. Never secrets, which env_from is for: these are written into the script."""
    env_from: list[str] = field(default_factory=list)
    """Names of variables whose values every run takes from the shell that submits it, e.g. HF_TOKEN; never stored in
    the run directory."""
    secrets_dir: Optional[str] = None
    """Private folder for the values of env_from on their way to a job, on a file system that all nodes see; default
    ~/.config/slurm-sft-launcher/secrets."""
    srun_args: list[str] = field(default_factory=list)
    """Further srun options, one a list item, e.g. --mpi=none."""
    host: Optional[str] = None
    """Login node of the cluster, as your ssh knows it: every command that concerns the cluster runs there. Unset: the
    commands run on this machine."""
    host_directory: Optional[str] = None
    """Directory on the host, seen by all nodes, in which commands run: runs/ is there, relative paths begin there."""
    host_python: str = "python3"
    """Python on the host that has the launcher's packages; the launcher's code is sent."""
    host_options: list[str] = field(default_factory=list)
    """Further ssh options, one word a list item, e.g. [-J, gateway.site.org]."""
    node_ledger: Optional[str] = None
    """File with the nodes to keep away from; default one of the user's own, in ~/.local/state."""
    node_days: float = 3.0
    """Days for which evidence against a node counts."""
    max_excluded: int = 4
    """Never keep away from more nodes than this because of the ledger."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologySpec:
    """How the model is spread over ranks. Data parallel size is derived: world size / (tp * pp * cp).

    The word auto in place of this section takes the fastest layout that fits, with train.micro_batch_size and
    train.recompute, as `launcher plan` lists them.
    """

    tensor_parallel: int = 1
    """Ranks that share each layer's matrices; within one node."""
    pipeline_parallel: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks on each stage (interleaved schedule); 1 is the plain 1F1B schedule."""
    context_parallel: int = 1
    """Ranks that share each row, for long ones: two chunks of it each, and keys and values gathered for attention.
    data.seq_length must be a multiple of twice as many."""
    sequence_parallel: bool = False
    """Spread norms and residuals over the tensor parallel ranks as well."""
    check_memory: bool = True
    """Refuse a run that the memory model says cannot fit; see docs/explanation/planning.md for how good it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Train low-rank adapters and leave the model's own weights as they are."""

    rank: Optional[int] = None
    """Rank of each adapter; unset trains all weights."""
    alpha: Optional[float] = None
    """Adapters count alpha / rank; default the rank, which makes that 1."""
    targets: list[str] = field(default_factory=list)
    """Linear layers by their Hugging Face names, e.g. [q_proj, v_proj]; empty adapts every one of them."""
    dropout: float = 0.0
    """Dropout on each adapter's input."""

    @property
    def scale(self) -> float:
        """What an adapter's output is multiplied by."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """The model to start from."""

    path: str = ""
    """A Hugging Face model directory, a NeMo 1.x checkpoint (.nemo, or its folder), a NeMo 2 checkpoint, a
    Megatron-core sharded checkpoint with a config.json beside it, a .gguf file, or package:NAME/FILE for a file of an
    installed package."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: load its weights; random: take only its shape and draw weights from train.seed."""
    tokenizer: Optional[str] = None
    """Tokenizer directory; default model.path."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    hidden_dropout: float = 0.0
    """Dropout on each residual branch."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """Train low-rank adapters instead of all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """A source of training data by a name of your own, one of several in place of data.train."""

    files: list[str] = field(default_factory=list)
    """Files of this source, as in data.train."""
    weight: float = 1.0
    """How often an epoch holds the source's n examples: it takes weight x n of them, rounded to the nearest whole
    number (a half up). 2.5 is two whole copies and half of the examples; 0.1 is a tenth. What is no whole copy goes on
    where the epoch before ended, round and round in one shuffled order: over any number of epochs no example is
    used more than once more often than another."""
    format: Optional[Literal["auto", "prompt_completion", "messages", "sharegpt", "tokens", "text"]] = None
    """How rows are read; unset: data.format."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the row's name; empty: data.columns."""
    loss_on: Optional[Literal["assistant", "last_assistant", "all"]] = None
    """Tokens with loss; unset: data.loss_on."""
    chat_template_kwargs: dict[str, str] = field(default_factory=dict)
    """Variables for the chat template; empty: data.chat_template_kwargs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What to train on and which tokens count."""

    train: list[str] = field(default_factory=list)
    """Training files: jsonl, json, csv, tsv, parquet, saved Hugging Face datasets; globs allowed, order counts. An
    epoch is every example once. For several sources with weights give data.sources instead."""
    sources: dict[str, SourceSpec] = field(default_factory=dict)
    """Several sources of training data, by name."""
    validation: list[str] = field(default_factory=list)
    """Held-out files, one data set; its loss is eval_loss. Empty, with no validation_sets: no held-out loss."""
    validation_sets: dict[str, str] = field(default_factory=dict)
    """Further held-out data sets, name -> file or glob; the loss of each is eval_loss/<name>."""
    format: Literal["auto", "prompt_completion", "messages", "sharegpt", "tokens", "text"] = "auto"
    """How rows are read; auto looks at the first row's keys."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name -> the row's name, e.g. {prompt: question, completion: instances.0.output}; dots go down."""
    chat_template: str = "tokenizer"
    """tokenizer: the tokenizer's own; none: prompt and completion are joined as they are; or a Jinja2 file."""
    chat_template_kwargs: dict[str, str] = field(default_factory=dict)
    """Variables for the chat template, read as YAML, e.g. {enable_thinking: true}."""
    loss_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Tokens with loss: completions / every assistant turn, the last assistant turn only, or all."""
    on_mismatch: Literal["error", "split"] = "error"
    """Chat templates that rewrite earlier turns: refuse them, or train such turns as examples of their own."""
    seq_length: int = 1024
    """Longest example in tokens."""
    length_policy: Literal["drop", "truncate_left", "truncate_right", "split", "error"] = "truncate_right"
    """What happens to longer examples (split: pieces of seq_length); what is lost is counted and printed."""
    max_lost_percent: float = 100.0
    """Refuse data of which the length policy takes away more of the tokens to be trained than this."""
    packing: bool = False
    """Put several examples into one row of up to seq_length tokens, kept apart from each other. A micro-batch is
    train.micro_batch_size such rows, joined. The same examples make the same steps with or without it."""
    pad_to_multiple: int = 8
    """Batches are padded to their longest row, rounded up to this."""
    group_by_length: bool = False
    """Without packing: draw batches of examples of similar lengths, which need less padding; needs shuffle."""
    shuffle: bool = True
    """Draw a new order each epoch from train.seed."""
    cyclic_seed: Optional[int] = None
    """Take examples in the order of trlx's NeMo trainers, drawn from this seed: one permutation of global_batch_size x
    max_steps places, each of which stands for an example by its remainder. There are no epochs in it, and a run shorter
    than its data sees a part of them only; for comparison with such runs."""
    workers: Optional[int] = None
    """Tokenizing processes; default one a core."""
    cache_dir: Optional[str] = None
    """Where tokenized data and converted models are kept; default .cache in run_root. Must be shared by all nodes."""

    def of_source(self, name: str) -> DataSpec:
        """The settings of one source, its files as `train`: its own where it has some, else those of all."""
        source = self.sources[name]
        special = ("format", "columns", "loss_on", "chat_template_kwargs")
        own = {key: value for key in special if (value := getattr(source, key))}
        return dataclasses.replace(self, train=source.files, sources={}, **own)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """AdamW and its learning rate schedule."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from initial_lr."""
    initial_lr: float = 0.0
    """Learning rate of the first step of a warm-up."""
    decay_steps: Optional[int] = None
    """The step, warm-up included, from which on the learning rate is min_lr; default the last one."""
    weight_decay: float = 0.0
    """Decoupled weight decay; never on norms and biases."""
    beta1: float = 0.9
    """Adam's first moment decay."""
    beta2: float = 0.95
    """Adam's second moment decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Spread optimizer state over data parallel ranks."""
    overlap: Optional[bool] = None
    """Reduce gradients behind the backward pass and, with `distributed`, gather updated weights behind the next forward
    pass; unset: on GPUs. Changes no number."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Number type in which gradients are added up, over micro-batches and over data parallel ranks. bf16 halves their
    memory and traffic, and loses small contributions: of many micro-batches the last ones most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingSpec:
    """End the training when evaluations no longer improve."""

    patience: Optional[int] = None
    """Evaluations in a row without improvement after which training ends; unset never ends it early."""
    metric: str = "eval_loss"
    """What has to improve: eval_loss, eval_loss/<set>, or metric/<name> of evaluation.metric."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""
    min_delta: float = 0.0
    """Smaller improvements than this count as none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """Length, batch and numerics of the training."""

    max_steps: Optional[int] = None
    """Optimizer steps. Give either this or epochs."""
    epochs: Optional[int] = None
    """Passes over the training data; with data.sources one pass takes of each source what its weight says."""
    global_batch_size: int = 8
    """Examples (or tokens, see global_batch_unit) in one optimizer step, over all ranks."""
    global_batch_unit: Literal["examples", "tokens"] = "examples"
    """examples: a step holds equally many of them; tokens: each epoch is packed into rows of seq_length tokens, and a
    step holds the examples of global_batch_size / seq_length rows. Means the same with data.packing or without it."""
    micro_batch_size: int = 1
    """Examples in one forward pass of one rank; with data.packing rows of up to data.seq_length tokens."""
    seed: int = 1234
    """Seed of data order, random weights and dropout."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32. fp8 is bf16 with products of the layers' linears in
    fp8 (E4M3, a scale for each token and each output channel), forward and for the gradients of inputs; gradients of
    weights, LM head, attention, master weights and the update are those of bf16. GPUs from Ada and Hopper on."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """plain: torch's own operations; fused: RMSNorm with the residual addition, RoPE, SwiGLU, LM head with
    cross-entropy at supervised positions only, and weight gradients added to the buffer by the product itself, in
    Triton on a GPU; auto: fused on a GPU where Triton is installed."""
    attention: Literal["auto", "flash2", "flash4"] = "auto"
    """Kernel of fused layers for packed rows on a GPU. flash2: the one in torch; flash4: the package flash-attn-4, for
    Hopper and Blackwell and heads of 32, 64, 96 or 128; auto: flash4 where it is installed and can be, and
    `deterministic` is off."""
    recompute: Literal["none", "norms", "selective", "full", "offload"] = "none"
    """Activations that are computed again in the backward pass. norms: outputs of norms, a sixth of what layers keep,
    for under 1 % of the time; selective: attention's core; full: whole layers, which keep their inputs; offload: whole
    layers whose inputs wait in the host's memory, for rows of 100,000 tokens and more."""
    eval_every: Optional[int] = None
    """Steps between evaluations; default only before the first and after the last step. Needs something to evaluate:
    data.validation, data.validation_sets or evaluation.prompts."""
    objective: Literal["token_mean", "example_mean", "microbatch_mean"] = "token_mean"
    """What is minimised. token_mean: the mean over all trained tokens of the global batch; example_mean: the mean over
    examples of each one's mean; microbatch_mean: the mean of micro-batch means, which depends on micro_batch_size and
    is there for comparison with trainers that minimise it. Evaluation is always the token mean."""
    on_bad_step: Literal["skip", "stop", "rewind"] = "stop"
    """What follows a step whose loss or gradient norm is NaN or infinite, or a spike. Its update is never applied, and
    the ids of its examples go to bad_steps.jsonl. skip: go on; stop: save, and end with exit code 1; rewind: weights
    and optimizer go back to the newest checkpoint from before that step, and the data since then are left out. Ten bad
    steps in a row stop the run in any case."""
    spike_factor: Optional[float] = None
    """A gradient norm above this many times its running mean over good steps makes a bad step; unset: only NaN and
    infinity do."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """AdamW and its schedule."""
    early_stopping: EarlyStoppingSpec = field(default_factory=EarlyStoppingSpec)
    """When to end before the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """Answers during training, at every evaluation, and what is measured on them."""

    prompts: Optional[str] = None
    """A jsonl file of prompts to answer: rows with prompt, or with messages that end before an answer."""
    metric: Optional[str] = None
    """package.module:function, called as function(samples=, prompts=, outputs=) with lists of texts; returns name ->
    number, or name -> one number a prompt. Logged as metric/<name>, averaged over all prompts."""
    max_new_tokens: int = 64
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above it tokens are drawn."""
    top_k: Optional[int] = None
    """Draw from this many likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Logits of tokens that prompt or answer already hold are divided by this where they are above 0, else multiplied;
    1 leaves them alone."""
    seed: int = 1234
    """Seed of the draws; each prompt has a stream of its own, whatever the topology."""
    stop_tokens: list[str] = field(default_factory=list)
    """Further tokens that end an answer, beside the end tokens of model and tokenizer."""
    stop_sequences: list[str] = field(default_factory=list)
    """Texts that end an answer: it is cut before the first of them, with the white space in front of it."""
    batch_size: int = 8
    """Prompts that one model replica answers together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """What is kept, and how often."""

    every: Optional[int] = None
    """Steps between checkpoints; the last step always has one."""
    keep_last: int = 2
    """Newest complete checkpoints to keep."""
    keep_best: int = 0
    """Checkpoints to keep beside the newest: those with the best best_metric. An evaluation that is among the best so
    far saves one. With early_stopping the best by its metric is kept also at 0."""
    best_metric: str = "eval_loss"
    """What keep_best compares: eval_loss, eval_loss/<set>, or metric/<name> of evaluation.metric."""
    best_mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""
    asynchronous: bool = False
    """Train on while a checkpoint is written; takes host memory for a copy of what each rank saves."""
    resume_from: Optional[str] = None
    """A complete checkpoint directory of another run to start from (weights, optimizer, data position), or a run's
    checkpoints folder for the newest in it when the ranks start (with after)."""
    export_step: Literal["best", "newest"] = "best"
    """Which checkpoint is exported. best: the one with the best best_metric, where keep_best is set; with
    early_stopping and without keep_best the best by its metric, which is kept for that; without either the newest."""
    export: bool = True
    """Write a Hugging Face directory to export/ when training is done; of a LoRA run the PEFT adapter."""
    export_merged: bool = False
    """Of a LoRA run: write the model with the adapter added to its weights, and the adapter into export/adapter/."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartSpec:
    """When a run goes on by itself. Each number is a budget: restarts in a row, for this cause, of attempts that wrote
    no new checkpoint; 0 is never. A restart after progress is free. Errors in code, data or settings are never retried.
    """

    how: Literal["requeue", "resubmit", "none"] = "requeue"
    """requeue: the same job starts again (a site that forbids it gets a new job instead); resubmit: always a new job;
    none: a person decides."""
    preempted: int = 10
    """Ended for another job."""
    timeout: int = 3
    """Reached its time limit."""
    node_failure: int = 3
    """A node was lost."""
    communication: int = 3
    """NCCL, gloo or the rendezvous failed."""
    hang: int = 2
    """No rank finished a step for too long."""
    bad_node: int = 3
    """A node failed its preflight; the next attempt avoids it."""
    out_of_memory: int = 1
    """Of the GPU or of the host."""
    disk_full: int = 0
    """No space for a checkpoint."""
    unknown: int = 2
    """Anything else, e.g. a rank that was killed."""

    def budget(self, cause: str) -> int:
        """Restarts without progress for a cause that can be restarted at all."""
        value: int = getattr(self, cause)
        return value


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingSpec:
    """What is written down."""

    every: int = 1
    """Steps between log lines."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
    plot: bool = True
    """Draw loss.png at the end."""
    tensorboard: bool = False
    """Curves for TensorBoard in RUN/tensorboard."""
    wandb: Optional[str] = None
    """Log to this Weights & Biases project: kept in RUN/wandb for `wandb sync`, or sent with WANDB_MODE=online in
    cluster.env and WANDB_API_KEY in env_from."""
    mlflow: Optional[str] = None
    """Log to MLflow: a tracking URI, or `local` for RUN/mlflow.db."""
    nemo: bool = False
    """Write the numbers of each log line by NeMo's logger, too (package nemo_toolkit 3), where its exp_manager does."""
    prompts: list[str] = field(default_factory=list)
    """Questions answered greedily before and after training, printed side by side (needs checkpoint.export)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreflightSpec:
    """What every node has to show before training starts; a node that fails is named, and the run ends with 77."""

    enabled: Literal["auto", "on", "off"] = "auto"
    """auto: on Slurm, with several nodes or with GPUs."""
    timeout_seconds: float = 60.0
    """The whole of it; a node that has said nothing by then is bad."""
    min_shm_mib: int = 256
    """Free space that /dev/shm must have."""
    min_disk_gib: float = 1.0
    """Free space that the run directory must have."""
    max_clock_skew_seconds: float = 5.0
    """Clocks may differ by this from the first node's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogSpec:
    """When a run that makes no progress is ended, with exit code 76 and the stacks of all ranks."""

    enabled: bool = True
    """Watch."""
    multiple: float = 10.0
    """A step may take this many times the median of the steps before it."""
    floor_seconds: float = 600.0
    """A step may always take this long."""
    first_step_seconds: float = 1800.0
    """The first step of an attempt, which compiles and warms up."""
    loading_seconds: float = 3600.0
    """Meeting the other ranks, data, weights and checkpoint before the first step."""
    evaluation_seconds: float = 3600.0
    """One evaluation, its answers included."""
    checkpoint_seconds: float = 3600.0
    """One save."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifySpec:
    """Who is told when an attempt ends. What cannot be sent is said in batch.log, and changes nothing else."""

    on: Literal["end", "failure"] = "end"
    """end: of every attempt, completed, interrupted or failed; failure: only the last."""
    webhook_env: Optional[str] = None
    """Variable of the submitting shell that holds a http(s) address, to which a JSON object is posted. Like all of
    env_from it is passed past script and run directory."""
    email: Optional[str] = None
    """Address to write to by the node's own sendmail."""
    command: list[str] = field(default_factory=list)
    """A program and its arguments, run without a shell on the first node; it reads the same JSON object."""

    @property
    def any(self) -> bool:
        """Whether anybody is told."""
        return bool(self.webhook_env or self.email or self.command)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """Everything about one run."""

    name: str = ""
    """Name of the run: letters, digits, dot, dash, underscore."""
    run_root: str = "runs"
    """Directory that holds run directories; on a cluster on the shared file system."""
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    """A cluster's name (a file in cluster_configs/), or its settings."""
    env_from: list[str] = field(default_factory=list)
    """Like cluster.env_from, for this run: names of variables, e.g. [WANDB_API_KEY]."""
    after: Optional[str] = None
    """Start when this run, a name in run_root or a directory, has succeeded; model.path, model.tokenizer and
    checkpoint.resume_from may then name what it has not written yet, e.g. RUN/export or RUN/checkpoints."""
    resources: ResourcesSpec = field(default_factory=ResourcesSpec)
    """What is asked of the scheduler."""
    topology: TopologySpec = field(default_factory=TopologySpec)
    """How the model is spread over ranks."""
    model: ModelSpec = field(default_factory=ModelSpec)
    """The model to start from."""
    data: DataSpec = field(default_factory=DataSpec)
    """What to train on."""
    train: TrainSpec = field(default_factory=TrainSpec)
    """How to train."""
    evaluation: EvaluationSpec = field(default_factory=EvaluationSpec)
    """Answers during training."""
    checkpoint: CheckpointSpec = field(default_factory=CheckpointSpec)
    """What is kept."""
    restart: RestartSpec = field(default_factory=RestartSpec)
    """When it goes on by itself."""
    logging: LoggingSpec = field(default_factory=LoggingSpec)
    """What is written down."""
    notify: NotifySpec = field(default_factory=NotifySpec)
    """Who is told when an attempt ends."""
    preflight: PreflightSpec = field(default_factory=PreflightSpec)
    """What nodes have to show before training."""
    watchdog: WatchdogSpec = field(default_factory=WatchdogSpec)
    """When a run that hangs is ended."""

    @property
    def after_directory(self) -> Path | None:
        """Directory of the run that `after` names."""
        return Path(self.run_root) / self.after if self.after else None

    def comes_later(self, path: str) -> bool:
        """Whether `path` is something that the run before this one has yet to write."""
        return self.after_directory is not None and Path(path).is_relative_to(self.after_directory)

    @property
    def secret_names(self) -> tuple[str, ...]:
        """Variables whose values come from the submitting shell."""
        webhook = [self.notify.webhook_env] if self.notify.webhook_env else []
        return tuple(dict.fromkeys([*self.cluster.env_from, *self.env_from, *webhook]))

    @property
    def checkpoint_ranking(self) -> CheckpointSpec:
        """Which checkpoints count as the best: keep_best, best_metric and best_mode as they are meant."""
        early = self.train.early_stopping
        if self.checkpoint.keep_best or early.patience is None:
            return self.checkpoint
        return dataclasses.replace(self.checkpoint, keep_best=1, best_metric=early.metric, best_mode=early.mode)

    @property
    def has_preflight(self) -> bool:
        """Whether nodes are looked at before training; only Slurm gives other nodes to go to."""
        wanted = self.resources.nodes > 1 or self.resources.gpus_per_node > 0
        chosen = {"auto": wanted, "on": True, "off": False}[self.preflight.enabled]
        return chosen and self.cluster.scheduler == "slurm"

    @property
    def cache_dir(self) -> Path:
        """Where tokenized data and converted models are kept."""
        return Path(self.data.cache_dir) if self.data.cache_dir else Path(self.run_root) / ".cache"


_YAML_LINE_BREAKS = "\x85\u2028\u2029"


def to_yaml(spec: RunSpec) -> str:
    """The spec as YAML, keys in schema order: what config.yaml holds."""
    values = dataclasses.asdict(spec)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    if any(character in text for character in _YAML_LINE_BREAKS):  # the writer would leave them bare, and fold them
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False, width=120)
    return text


def read_resolved(path: Path) -> RunSpec:
    """Read a config that `to_yaml` wrote, here or by an earlier version; nothing is interpolated or converted.

    ConfigError on a file that was edited into something else: a resolved config is not an input form.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    spec: RunSpec = _build(RunSpec, values, f"{path}: ")
    return spec


def _build(section: Any, values: Any, where: str) -> Any:
    """The dataclass `section` with these values."""
    types = typing.get_type_hints(section)
    _check_keys(values, types, where)
    return section(**{name: _value(types[name], value, f"{where}{name}.") for name, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    inner = mapped_section(kind)
    if inner is not None:
        _check_keys(value, value, where)
        return {name: _build(inner, item, f"{where}{name}.") for name, item in value.items()}
    return _build(kind, value, where) if dataclasses.is_dataclass(kind) else value


def _check_keys(values: Any, wanted: Any, where: str) -> None:
    """A key that is absent came with a later version: its default is what the run was made with."""
    unknown = sorted(map(str, values.keys() - wanted.keys())) if isinstance(values, dict) else ["no mapping"]
    if unknown:
        raise ConfigError(
            f"{where}not of a resolved config: {', '.join(unknown)}; it was edited, or made by a newer version"
        )


def mapped_section(kind: Any) -> type | None:
    """The dataclass that a field of this type maps names of the user's own to; None for fields of other types."""
    arguments = typing.get_args(kind)
    is_mapped = typing.get_origin(kind) is dict and dataclasses.is_dataclass(arguments[1])
    return typing.cast(type, arguments[1]) if is_mapped else None
