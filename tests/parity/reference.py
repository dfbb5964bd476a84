"""What training must give: one process, transformers and plain PyTorch, no Megatron-core, no Lightning.

Only the tokenized examples and the order of global batches are shared with the code under test; both have tests of
their own.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import PreTrainedModel

from launcher.contract.spec import OptimizerSpec, RunSpec
from sft.data.batches.sampler import EMPTY_SLOT, BatchSchedule
from sft.data.cache.store import TokenCache
from sft.hf.loaded_model import load_transformers_model


@dataclass(frozen=True, slots=True)
class Curve:
    """Loss, gradient norm and gradients (before clipping) of each step; the loss of each target of the first step."""

    losses: list[float]
    grad_norms: list[float]
    first_step: dict[int, list[float]]
    """By example."""
    gradients: list[dict[str, torch.Tensor]]
    balance: list[float]
    """Mean over examples and layers of the loss that evens out the use of experts."""
    margins: list[float]
    """How far the nearest choice of an expert was from another one, in the router's logits; infinite without one.
    Rounding that is larger chooses otherwise, and from there on training is another."""


def train_reference(spec: RunSpec, model_dir: Path, cache: TokenCache, schedule: BatchSchedule, steps: int) -> Curve:
    """Train with a constant learning rate by the definition: sum(w * nll) / sum(w) over each global batch.

    With `train.router_aux_loss` that is a loss by example and layer, averaged over examples and summed over layers.
    """
    model: Any = load_transformers_model(model_dir, torch.float32, attn_implementation="eager")
    # transformers drops the input side of the padding token's embedding gradient. Where padding and end token are one,
    # as in SmolLM2, that is the gradient of a real token.
    model.get_input_embeddings().padding_idx = None
    model.train()
    optimizer = torch.optim.AdamW(_groups(model, spec.train.optimizer), **_adamw(spec.train.optimizer))
    losses, norms, first_step, gradients, balance, margins = [], [], {}, [], [], []
    routers = RouterWatch(model)
    for step in range(steps):
        examples = [int(example) for example in schedule.examples_at(step) if example != EMPTY_SLOT]
        total, weight, uneven = torch.zeros(()), 0.0, torch.zeros(())
        for example in examples:
            nll, weights = target_losses(model, cache, example)
            total = total + (nll * weights).sum()
            weight += float(weights.sum())
            uneven = uneven + routers.loss()
            if step == 0:
                first_step[example] = nll.tolist()
        optimizer.zero_grad()
        loss = total / weight + spec.train.router_aux_loss * uneven / len(examples)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients.append(_gradients(model))
        norms.append(clip_gradients(model, spec.train.optimizer.clip_grad))
        optimizer.step()
        losses.append(float(total.detach() / weight))
        balance.append(float(uneven.detach()) / (len(examples) * max(1, routers.layers)))
        margins.append(routers.take_margin())
    return Curve(losses, norms, first_step, gradients, balance, margins)


class RouterWatch:
    """Sees what the routers of a model choose. An example's last token is a target alone, and left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._sigmoid = model.config.model_type.startswith(("deepseek_v3", "glm4"))
        self._margin = math.inf
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        routers = [name for name, module in model.named_modules() if type(module).__name__.endswith("Router")]
        self.layers = len(routers)
        for name in routers:
            bias = _choice_bias(model, name)
            model.get_submodule(name).register_forward_hook(
                lambda _, __, output, bias=bias: self._see(output[0][:-1], output[2][:-1], bias)
            )

    def _see(self, logits: torch.Tensor, chosen: torch.Tensor, bias: torch.Tensor | float) -> None:
        self._seen.append((logits, chosen))
        self._margin = min(self._margin, _margin(logits.detach(), chosen, bias))

    def take(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return logits, probabilities and chosen experts of the example that was last computed, by layer."""
        seen, self._seen[:] = list(self._seen), []
        scores = [logits.sigmoid() if self._sigmoid else logits.softmax(-1) for logits, _ in seen]
        return [
            (logits, score / score.sum(-1, keepdim=True), chosen)
            for (logits, chosen), score in zip(seen, scores, strict=True)
        ]

    def take_margin(self) -> float:
        """Return the smallest margin of a choice since the last call: infinite where choices are made in groups."""
        found, self._margin = self._margin, math.inf
        return found

    def loss(self) -> torch.Tensor:
        """Return E * sum of f * P (share, mean probability) of the example last computed, summed over layers."""
        found = torch.zeros(())
        for _, probabilities, chosen in self.take():
            count, mean = probabilities.size(-1), probabilities.mean(0)
            share = torch.bincount(chosen.flatten(), minlength=count) / chosen.numel()
            found = found + count * (share * mean).sum()
        return found


def _choice_bias(model: PreTrainedModel, router: str) -> torch.Tensor | float:
    """Return what is added to scores when experts are chosen, which is in the router or beside it; 0.0 for nothing."""
    beside = router.rpartition(".")[0]
    tensors = [*model.named_buffers(), *model.named_parameters()]
    found = [tensor for name, tensor in tensors if name.startswith(f"{beside}.") and "correction_bias" in name]
    return found[0].detach().flatten() if found else 0.0


def _margin(logits: torch.Tensor, chosen: torch.Tensor, bias: torch.Tensor | float) -> float:
    """Return the smallest step in any token's scores [tokens, experts] from a chosen expert down to one that is not.

    Scores are logits, or whichever of their sigmoids or softmax, with the bias, have led to the choice.
    """
    count = chosen.size(-1)
    forms = [logits] if isinstance(bias, float) else [logits.sigmoid() + bias, logits.softmax(-1) + bias]
    for scores in forms:
        best = scores.topk(count + 1)
        if torch.equal(best.indices[:, :count].sort(-1).values, chosen.sort(-1).values):
            return float((best.values[:, -2] - best.values[:, -1]).min())
    return math.inf


def _gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the gradients by the names that files have: in memory names may differ, and weights of experts are joined.

    Parts of a multimodal model that are not trained have none.
    """
    if any(".experts." in name or ".language_model." in name for name, _ in model.named_parameters()):
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            copy = type(model)(model.config)
            for parameter, own in zip(model.parameters(), copy.parameters(), strict=True):
                own.copy_(torch.full_like(own, torch.nan) if parameter.grad is None else parameter.grad)
            for buffer in copy.buffers():  # not trained either, and files may have other names for them
                buffer.fill_(torch.nan)
            copy.save_pretrained(directory)
            saved = load_file(Path(directory) / "model.safetensors")
            return {name: gradient for name, gradient in saved.items() if not gradient.isnan().all()}
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.clone()
    return found


def clip_gradients(model: PreTrainedModel, limit: float) -> float:
    """Clip to the global norm `limit`; the norm before. In fp64: torch's own norm sums in fp32 on a CPU."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    for gradient in gradients:
        gradient.mul_(min(1.0, limit / (norm + 1e-6)))
    return norm


def target_losses(model: PreTrainedModel, cache: TokenCache, example: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target of one example, alone in its batch, and the targets' weights."""
    ids, weights = cache.tokens(example)
    tokens = torch.tensor(ids, dtype=torch.int64)
    logits = model(tokens[None]).logits[0, :-1]
    return F.cross_entropy(logits, tokens[1:], reduction="none"), torch.tensor(weights[1:])


def _groups(model: PreTrainedModel, spec: OptimizerSpec) -> list[dict[str, object]]:
    """Return the optimizer's parameter groups. Vectors, which are norms and biases, have no weight decay."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _adamw(spec: OptimizerSpec) -> dict[str, object]:
    return {"lr": spec.lr, "betas": (spec.beta1, spec.beta2), "eps": spec.eps}
