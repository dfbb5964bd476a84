"""The text of a first config: settings with the reason beside each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.divisors import rounded_up
from launcher.first_config.answers import Answers
from launcher.first_config.survey import Survey

Row = tuple[int, str, object, str]
"""Depth, key, value (None for a section) and reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Batch and number of steps."""

    batch: int
    epochs: int
    steps: int | None
    """None where the number of rows is not known."""

    @staticmethod
    def of(answers: Answers, survey: Survey) -> Lengths:
        """Return a batch of a twentieth to a hundredth of the rows, every GPU having one, and two or three epochs."""
        rows = survey.data.rows
        wanted = 32 if rows is None or rows >= 2_000 else 16 if rows >= 500 else 8
        ranks = max(1, answers.gpus)
        batch = rounded_up(wanted, ranks)
        epochs = 3 if rows is None or rows < 50_000 else 2
        steps = None if rows is None else max(1, epochs * math.ceil(rows / batch))  # an epoch's last step may be short
        return Lengths(batch=batch, epochs=epochs, steps=steps)


def config_text(answers: Answers, survey: Survey, layout: Mapping[str, object], why_layout: str) -> str:
    """Return the YAML of a first config. `layout` has dotted keys of topology and train."""
    nodes, per_node = answers.nodes()
    lengths = Lengths.of(answers, survey)
    rows: list[Row] = [
        (0, "name", answers.run_name, "the run's directory is runs/NAME"),
        (0, "cluster", answers.cluster, "a file in cluster_configs/"),
        (0, "resources", None, ""),
        (1, "nodes", nodes, ""),
        (1, "gpus_per_node", per_node, "" if per_node else "trains on CPU ranks"),
        *_topology(layout, why_layout),
        (0, "model", None, f"{survey.billions:.2g} billion parameters"),
        (1, "path", answers.model, ""),
        *_lora(answers, survey),
        *_data(answers, survey),
        *_train(answers, survey, lengths, layout),
        (0, "checkpoint", None, ""),
        (1, "every", _checkpoint_every(lengths), "steps; the last step always has one"),
    ]
    return _written(rows)


def _topology(layout: Mapping[str, object], why: str) -> list[Row]:
    sizes = [(key, value) for key, value in layout.items() if key.startswith("topology.")]
    if not sizes:
        return []
    return [(0, "topology", None, why), *((1, key.partition(".")[2], value, "") for key, value in sizes)]


def _lora(answers: Answers, survey: Survey) -> list[Row]:
    if answers.lora_rank is None:
        return []
    rows: list[Row] = [
        (1, "lora", None, "adapters on every linear layer; without this section all weights are trained"),
        (2, "rank", answers.lora_rank, ""),
        (2, "alpha", 2 * answers.lora_rank, "adapters are scaled by alpha / rank"),
    ]
    if survey.shape.num_experts:
        rows[0] = (1, "lora", None, "adapters; without this section all weights are trained")
        rows.append(
            (
                2,
                "targets",
                ["q_proj", "k_proj", "v_proj", "o_proj"],
                "attention alone; without this line experts have adapters, too",
            )
        )
    return rows


def _data(answers: Answers, survey: Survey) -> list[Row]:
    longest = survey.data.longest
    reason = "a guess" if longest is None else f"the longest of the first rows has {longest:,} bytes"
    if survey.seq_length == survey.longest_row:
        reason += "; beyond this length the model's RoPE depends on the batch"
    rows: list[Row] = [
        (0, "data", None, "look at it before you train: python -m sft audit CONFIG"),
        (1, "train", list(answers.data), "" if survey.data.rows is None else f"about {survey.data.rows:,} rows"),
        (1, "seq_length", survey.seq_length, f"tokens; {reason}; prepare says what longer rows lose"),
        (1, "packing", True, "several examples in a row, without attention between them"),
    ]
    if survey.template is not None:
        rows.append((1, "chat_template", survey.template, "the tokenizer has none of its own"))
    return rows


def _train(answers: Answers, survey: Survey, lengths: Lengths, layout: Mapping[str, object]) -> list[Row]:
    rate, why_rate = learning_rate(answers, survey)
    steps = "" if lengths.steps is None else f"about {lengths.steps:,} steps"
    chosen = [(key.partition(".")[2], value) for key, value in layout.items() if key.startswith("train.")]
    return [
        (0, "train", None, ""),
        (1, "epochs", lengths.epochs, steps),
        (1, "global_batch_size", lengths.batch, "examples a step"),
        *((1, key, value, "") for key, value in chosen),
        (1, "precision", "bf16" if answers.gpus else "fp32", "" if answers.gpus else "CPUs have no fast bf16"),
        (1, "optimizer", None, ""),
        (2, "lr", f"{rate:.1e}", why_rate),
        (2, "min_lr", f"{rate / 10:.1e}", "at the end of the cosine"),
        (2, "warmup_ratio", 0.03, "of all steps"),
    ]


def learning_rate(answers: Answers, survey: Survey) -> tuple[float, str]:
    """Return a peak learning rate and why: adapters take ten times that of all weights, large models less."""
    if answers.lora_rank is not None:
        large = survey.billions > 20
        return (1e-4 if large else 2e-4), "usual for adapters" + (" of a model this large" if large else "")
    large = survey.billions > 3
    return (1e-5 if large else 2e-5), "usual for all weights" + (" of a model this large" if large else "")


def _checkpoint_every(lengths: Lengths) -> int:
    return 100 if lengths.steps is None else max(10, lengths.steps // 5)


def _written(rows: list[Row]) -> str:
    lines = []
    for depth, key, value, reason in rows:
        text = f"{'  ' * depth}{key}:{'' if value is None else f' {_scalar(value)}'}"
        lines.append((text, reason))
    width = min(48, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {reason}\n" if reason else f"{text}\n" for text, reason in lines)


def _scalar(value: object) -> str:
    """Return a value as YAML in one line: words as they are where that is safe, else as JSON, which YAML reads."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, str) and not all(letter.isalnum() or letter in "-_./" for letter in value):
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if not isinstance(value, str) else value
