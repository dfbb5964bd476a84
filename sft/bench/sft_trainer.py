"""Training with TRL's SFTTrainer, each step timed. unsloth trains with it as well, after changing it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sft.bench.plain_loop import IGNORED
from sft.bench.result import StepClock
from sft.bench.workload import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train_with_trl(
    workload: Workload,
    clock: StepClock,
    model: object,
    tokenizer: object,
    *,
    micro_batches: int,
    lengths_of: Callable[[dict[str, Tensor]], Tensor],
    peft_config: object = None,
    **options: object,
) -> float:
    """Train the steps of the clock and return the mean loss, with the lengths and targets in the clock.

    `lengths_of` takes the lengths of a micro-batch's examples from its inputs; `options` are more arguments of
    SFTConfig.
    """
    import trl
    from transformers import TrainerCallback

    # They stay on the device while steps are timed: reading a length would make the host wait.
    rows: list[tuple[Tensor, Tensor]] = []  # lengths and labels of each micro-batch of the step
    pending: list[list[tuple[Tensor, Tensor]]] = []  # of each step
    slots = [0]

    class Trainer(trl.SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: object, inputs: dict[str, Tensor], *args: object, **kwargs: object) -> Tensor:
            if not rows:
                clock.before_step()
            rows.append((lengths_of(inputs), inputs["labels"]))
            slots[0] += inputs["input_ids"].numel()
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss

    class Count(TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            pending.append(rows.copy())
            clock.after_step([], slots[0], 0)
            rows.clear()
            slots[0] = 0

    steps, world = clock.warmup + clock.steps, int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=workload.rows // micro_batches,
                gradient_accumulation_steps=micro_batches,
                max_length=workload.seq_length,
                **{**_arguments(on_gpu=torch.cuda.is_available()), **options},
            ),
            train_dataset=_dataset(workload, (steps + 1) * world),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Count()],
        )
        output = trainer.train()
    timed = [each for step in pending[clock.warmup :] for each in step]
    clock.lengths = [int(length) for lengths, _ in timed for length in lengths.tolist()]
    clock.supervised = sum(int((labels != IGNORED).sum()) for _, labels in timed)
    return float(output.training_loss)


def _arguments(*, on_gpu: bool) -> dict[str, object]:
    """Return the arguments of SFTConfig that do not depend on the workload."""
    return {
        "packing": True,
        "packing_strategy": "bfd",
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "dataloader_num_workers": 4 if on_gpu else 0,
        "logging_steps": 10_000,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,
    }


def _dataset(workload: Workload, steps: int) -> object:
    """Return the examples of `steps` steps of one GPU as a data set with input_ids and labels."""
    import datasets

    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for ids, trained in workload.examples(steps):
        # A `full` example has one token more than fits into a row of TRL, whose inputs and labels are the same tokens.
        length = len(ids) - 1 if workload.data == "full" else len(ids)
        columns["input_ids"].append(ids[:length].tolist())
        columns["labels"].append(np.where(trained, ids, IGNORED)[:length].tolist())
    return datasets.Dataset.from_dict(columns)


def tokenizer_of_two() -> PreTrainedTokenizerFast:
    """Return a tokenizer of two tokens: SFTTrainer asks for one, although the data are tokenized."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
