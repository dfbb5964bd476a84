"""Settings of a run that depend on its model: checked by `prepare`, before a rank starts, and by each rank."""

from __future__ import annotations

from launcher.contract.errors import ModelError
from launcher.contract.spec import RunSpec
from sft.hf.adapter import lora_problems
from sft.hf.learning_rates import rate_problems
from sft.models.architecture import Architecture


def check_model_settings(spec: RunSpec, architecture: Architecture) -> None:
    """Raise ModelError with every setting that this model cannot follow."""
    problems = [
        *_position_problems(spec, architecture),
        *lora_problems(spec.model.lora, architecture, spec.topology.tensor_parallel),
    ]
    if not problems:  # the names of adapters come from targets that exist
        problems += rate_problems(spec.train.optimizer, spec.model.lora, architecture)
    if problems:
        raise ModelError(problems)


def _position_problems(spec: RunSpec, architecture: Architecture) -> list[str]:
    positions, length, rope = architecture.shape.max_position_embeddings, spec.data.seq_length, architecture.rope
    if rope is None and length > positions:
        return [
            f"data.seq_length {length}: this model has learned {positions} positions; set it to at most {positions}"
        ]
    if rope is None or rope.longest is None:
        return []
    answers = f" + evaluation.max_new_tokens {spec.evaluation.max_new_tokens}" if spec.evaluation.prompts else ""
    whole = length + (spec.evaluation.max_new_tokens if answers else 0)
    if whole <= rope.longest:
        return []
    return [
        f"data.seq_length {length}{answers}: beyond {rope.longest} tokens this model's RoPE depends on the length of "
        f"the batch (rope_type dynamic or longrope), which is not supported; keep to at most {rope.longest}"
    ]
