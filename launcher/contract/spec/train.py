"""train: length, batch and numerics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from launcher.contract.spec.rules import Above, AtLeast, Bits, Fraction, NumberText


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """AdamW and its learning rate schedule."""

    lr: Annotated[float, Above(0)] = 1e-5
    """Peak learning rate."""
    min_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate at the end of the decay, of schedules that have one."""
    schedule: Literal["cosine", "linear", "constant", "wsd", "polynomial", "inverse_sqrt", "cosine_with_restarts"] = (
        "cosine"
    )
    """Shape of the decay after the warm-up. wsd: constant until the last wsd_steps; polynomial: (1 - part done) to the
    power of `power`; inverse_sqrt: sqrt(warm-up / step), not below min_lr; cosine_with_restarts: `cycles` cosines, each
    from lr."""
    wsd_steps: Annotated[int | None, AtLeast(1)] = None
    """For wsd: steps of the decay at the end; default a tenth of all steps, rounded up."""
    wsd_decay: Literal["cosine", "linear", "1-sqrt"] | None = None
    """For wsd: shape of that decay; default cosine."""
    power: Annotated[float | None, Above(0)] = None
    """For polynomial: its exponent."""
    cycles: Annotated[int | None, AtLeast(1)] = None
    """For cosine_with_restarts: how many cosines."""
    warmup_steps: Annotated[int, AtLeast(0)] = 0
    """Steps of linear warm-up from initial_lr."""
    warmup_ratio: Annotated[float | None, Fraction()] = None
    """Instead of warmup_steps: the warm-up's share of all steps, rounded up to a step."""
    initial_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate of the first warm-up step; needs a warm-up."""
    decay_steps: int | None = None
    """The number of steps, warm-up included, after which the learning rate is min_lr; default all of them, so that the
    last step's rate is still a little above it."""
    lr_by_name: Annotated[dict[str, str], NumberText(AtLeast(0))] = field(default_factory=dict)
    """Other peak learning rates for some parameters: pattern of their Hugging Face name -> rate, e.g.
    {"*.embed_tokens.*": 1e-6, "*.lora_B.*": 1e-4}. The first pattern that matches counts; the whole schedule of these
    parameters is scaled by rate / lr. 0 leaves them as they are."""
    loraplus_ratio: Annotated[float | None, Above(0)] = None
    """LoRA+: B of each adapter (and DoRA's magnitudes) learns at this many times the learning rate of A."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    """Decoupled weight decay; never on what has one dimension: norms, biases, DoRA's magnitudes, attention sinks, and
    the rates at which linear attention forgets."""
    beta1: Annotated[float, Fraction()] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, Fraction()] = 0.95
    """Adam's second moment decay."""
    eps: Annotated[float, Above(0)] = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, AtLeast(0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer state over data parallel ranks."""
    overlap: bool | None = None
    """Overlap gradient reduction with the backward pass and, with `distributed`, the gathering of updated weights with
    the next forward pass. Unset: on GPUs. Results are the same."""
    grad_reduce: Literal["fp32", "bf16"] = "fp32"
    """Number type in which gradients are summed over micro-batches and data parallel ranks. bf16 halves their memory
    and traffic, and loses small contributions: of many micro-batches those of the last ones most."""


FP8_LINEARS = ("qkv", "proj", "fc1", "fc2")
"""The linears of a layer: attention's two projections, and those of the MLP."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Spec:
    """What is in fp8 with train.precision fp8."""

    evaluation: bool = False
    """Evaluate in fp8 as well: held-out losses and answers. By default they are computed in bf16, like the exported
    model that you will use, which takes an evaluation about a fifth longer."""
    bf16_first_layers: Annotated[int, AtLeast(0)] = 0
    """So many layers at the beginning of the model compute in bf16."""
    bf16_last_layers: Annotated[int, AtLeast(0)] = 0
    """So many layers at the end of the model compute in bf16."""
    gradients: Literal["e4m3", "e5m2"] = "e4m3"
    """The form of gradients in the products that make gradients of inputs. e5m2 rounds by up to an eighth
    instead of a sixteenth, and keeps values down to 3e-10 of the largest of a token instead of 4e-6."""
    bf16_gradients: list[str] = field(default_factory=list)
    """Linears whose gradients of inputs are computed in bf16: qkv, proj (attention's projections, those of linear
    attention too), fc1, fc2 (those of the MLP). With all four, fp8 is left to the forward pass."""
    experts: bool = False
    """Products of experts in fp8 as well, on Hopper and Blackwell. It pays where experts are wide and each rank has
    few of them, since the matrices of all have to be rounded in every micro-batch."""

    def layers_in_fp8(self, layers: int) -> range:
        """Return which of so many layers, counted from 0, have products in fp8."""
        return range(self.bf16_first_layers, layers - self.bf16_last_layers)


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyStoppingSpec:
    """End the training when evaluations no longer improve."""

    patience: Annotated[int | None, AtLeast(1)] = None
    """Evaluations in a row without improvement after which training ends; needs train.eval_every. Unset: never
    early."""
    metric: str = "eval_loss"
    """What has to improve: eval_loss, eval_loss/<set>, or metric/<name> of evaluation.metric."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""
    min_delta: Annotated[float, AtLeast(0)] = 0.0
    """Improvements smaller than this do not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSpec:
    """Length, batch and numerics of the training."""

    max_steps: Annotated[int | None, AtLeast(1), Bits(63)] = None
    """Optimizer steps. Give either this or epochs."""
    epochs: Annotated[float | None, Above(0)] = None
    """Passes over the training data; with data.sources one pass takes from each source what its weight says. Of a part
    of a pass, e.g. of the last half of 2.5, the steps are rounded up."""
    global_batch_size: Annotated[int, AtLeast(1)] = 8
    """Examples (or tokens, see global_batch_unit) in one optimizer step, over all ranks."""
    global_batch_unit: Literal["examples", "tokens"] = "examples"
    """examples: every step holds the same number of examples; tokens: each epoch is packed into rows of seq_length
    tokens, and a step holds the examples of global_batch_size / seq_length rows, with data.packing or without it."""
    micro_batch_size: Annotated[int, AtLeast(1)] = 1
    """Examples in one forward pass of one rank; with data.packing rows of up to data.seq_length tokens."""
    seed: Annotated[int, Bits(63)] = 1234
    """Seed of data order, random weights and dropout."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32. fp8 is bf16 except for the products of the layers'
    linears, forward and for gradients of inputs, which are in fp8 (E4M3, a scale for each token and each output
    channel) while it trains; it needs GPUs from Ada and Hopper on. See `fp8`."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """plain: torch's own operations; fused: RMSNorm with the residual addition, RoPE, SwiGLU and GeGLU, LM head with
    cross-entropy at supervised positions only, and weight gradients added to the buffer by the product itself, in
    Triton on a GPU; auto: fused on a GPU where Triton is installed."""
    attention: Literal["auto", "flash2", "flash4"] = "auto"
    """Attention kernel of fused layers on a GPU, for packed rows and rows longer than a sliding window. flash2: the one
    in torch; flash4: the package flash-attn-4, for Hopper and Blackwell and heads of 32, 64, 96 or 128; auto: flash4
    where it is installed and works, and `deterministic` is off. Capped scores (Gemma 2) are computed by flash4 or by
    none, and those of gpt-oss with their sinks by either."""
    linear_attention: Literal["auto", "torch", "fla"] = "auto"
    """Kernels of linear attention (Qwen3-Next, Qwen3.5). torch: its own operations, in chunks; fla: the package
    flash-linear-attention, on a GPU and not in fp32; auto: fla where it is installed and works, and `deterministic` is
    off."""
    cuda_graphs: Literal["auto", "never", "always"] = "auto"
    """Whether the layers' kernels are launched as CUDA graphs on a GPU, with fused kernels, in bf16, for packed rows of
    dense models without recomputation, dropout, `deterministic` and model parallelism, with and without adapters.
    auto: where a micro-batch is so small that the GPU would wait for the host; always: also in large micro-batches; a
    run that cannot have them is refused."""
    recompute: Literal["none", "norms", "selective", "full", "offload"] = "none"
    """Activations that are computed again in the backward pass. norms: outputs of norms, a sixth of what layers keep,
    for under 1 % of the time; selective: attention's core; full: whole layers, which keep their inputs; offload: whole
    layers whose inputs wait in the host's memory, for rows of 100,000 tokens and more."""
    recompute_layers: Annotated[int | None, AtLeast(1)] = None
    """With recompute full, how many layers of each pipeline stage are computed again, from its first one on (with
    virtual stages, of each model chunk); unset, all. The fewer that fit, the faster: `launcher plan` finds the number,
    as does `topology: auto` where the config leaves recompute out."""
    eval_every: Annotated[int | None, AtLeast(1)] = None
    """Steps between evaluations; default only before the first and after the last step. Needs something to evaluate:
    data.validation, data.validation_sets or evaluation.prompts."""
    objective: Literal["token_mean", "example_mean", "microbatch_mean"] = "token_mean"
    """What is minimized. token_mean: the mean over all trained tokens of the global batch; example_mean: the mean over
    examples of each one's mean; microbatch_mean: the mean of micro-batch means, which depends on micro_batch_size and
    is there for comparison with trainers that minimize it. Evaluation always uses the token mean."""
    label_smoothing: Annotated[float, Fraction()] = 0.0
    """Share of each target's probability that is spread evenly over the whole vocabulary. Training alone: the loss of
    an evaluation stays the cross-entropy, and its perplexity one."""
    neftune_alpha: Annotated[float | None, Above(0)] = None
    """NEFTune: uniform noise on the token embeddings in training, of at most alpha / sqrt(tokens x hidden size) for an
    example of so many tokens (each one of a packed row by itself). It depends on train.seed, step, example and position
    alone, so that every layout adds the same."""
    router_aux_loss: Annotated[float, AtLeast(0)] = 0.0
    """Of models with experts, the coefficient of a loss that evens out how much each is used; 0, whatever the model's
    config says, leaves it out. It is added up over layers and averaged over examples, so that it does not depend on the
    layout: docs/explanation/experts.md."""
    on_bad_step: Literal["skip", "stop", "rewind"] = "stop"
    """What follows a step whose loss or gradient norm is NaN, infinite or a spike. Its update is never applied, and the
    ids of its examples go to bad_steps.jsonl. skip: go on; stop: save, and end with exit code 1; rewind: restore
    weights and optimizer from the newest checkpoint before that step, and skip the data since then. Ten bad steps in a
    row always stop the run."""
    spike_factor: Annotated[float | None, Above(1)] = None
    """A step is bad if its gradient norm is above this many times the running mean over good steps; unset: only NaN and
    infinity are bad."""
    deterministic: bool = False
    """Refuse kernels whose result depends on timing: attention flash4 and linear_attention fla; launch no layers
    as CUDA graphs."""
    fp8: Fp8Spec = field(default_factory=Fp8Spec)
    """What is in fp8 with precision fp8."""
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    """AdamW and its schedule."""
    early_stopping: EarlyStoppingSpec = field(default_factory=EarlyStoppingSpec)
    """When to end before the last step."""
