"""Our own contender: the trainer, module, data loader and optimizer of `sft train`, on random weights and tokens."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from launcher.contract.spec import (
    DataSpec,
    Fp8Spec,
    LoraSpec,
    ModelSpec,
    OptimizerSpec,
    ResourcesSpec,
    RunSpec,
    TopologySpec,
    TrainSpec,
)
from launcher.contract.topology import Topology, build_topology
from sft.bench.overlap import Interval, busy, exposed
from sft.bench.phases import PhaseTimers
from sft.bench.result import Result, StepClock
from sft.bench.topology import expected_tokens_per_second, micro_batch_rows, parse_topology
from sft.bench.workload import INITIAL_STD, Workload
from sft.data.batches.batch import StepBatch
from sft.data.cache.store import TokenPair
from sft.data.prepared.schedule import batch_schedule
from sft.engine.module import SFTGPT
from sft.models.registry import read_architecture
from sft.runtime import lightning as pl
from sft.runtime.rank_env import RankEnv
from sft.training.datamodule import StepBatches, StepLoader
from sft.training.trainer import megatron_trainer

PROFILED_STEPS = 2
_LARGEST = 25
_ANNOTATIONS = ("Optimizer.step#", "nccl:")
"""Prefixes of events that are ranges around kernels, not kernels."""
_NAME_LENGTH = 160
_KERNELS = {
    "communication": r"nccl",
    "attention": r"flash|fmha|sdpa|attention",
    "fp8 quantization": r"^_rows$|^_column_peaks|^_transposed$",
    "experts' products": r"^_weight_gradients|[Gg]rouped",
    "sorting of tokens": r"^_sum_rows|index|[Ss]ort|gather|scatter|searchsorted|topk|softmax",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK|cublas",
    "optimizer": r"adam|multi_tensor|lpnorm",
    "cross-entropy": r"^_statistics|^_gradient",
    "norm, RoPE, SwiGLU": r"^_forward|^_backward|^_rotate|^_gated|^_weighted_swiglu",
    "copies": r"memcpy|memset|copy|cat",
}
"""Kinds of GPU kernels, with the patterns of their names. The first that matches counts."""


def run_ours(
    workload: Workload,
    folder: Path,
    *,
    topology: str,
    train: dict[str, Any],
    micro_batches: int,
    warmup: int,
    steps: int,
) -> Result:
    """Train `warmup` steps, then `steps` timed ones, then a few under the profiler, and return the result.

    `train` holds fields of TrainSpec, and of `fp8` those of Fp8Spec.
    """
    env = RankEnv.from_environ()
    max_steps = warmup + steps + PROFILED_STEPS
    spec = run_spec(workload, folder, env.world_size, parse_topology(topology), train, micro_batches, max_steps)
    (folder / "config.json").write_text(json.dumps(workload.model_config))
    architecture = read_architecture(folder)
    built = build_topology(spec, architecture.shape)
    clock = StepClock(warmup, steps, built.world_size // built.data_parallel)
    module = BenchModule(spec, architecture, built, folder, max_steps, clock=clock, router_std=workload.router_std)
    trainer = megatron_trainer(spec, built, env, max_steps=max_steps, data_key={})
    trainer.fit(module, datamodule=BenchData(workload, spec, built, max_steps))
    assert module.result is not None
    return module.result


def run_spec(
    workload: Workload,
    folder: Path,
    ranks: int,
    topology: TopologySpec,
    train: dict[str, Any],
    micro_batches: int,
    max_steps: int,
) -> RunSpec:
    """Return the config of the benchmark's run. Each GPU has `workload.rows` rows a step, whatever the topology."""
    own = {**train, "fp8": Fp8Spec(**train.get("fp8", {}))}
    return RunSpec(
        name="bench",
        resources=ResourcesSpec(gpus_per_node=ranks if torch.cuda.is_available() else 0, tasks_per_node=ranks),
        topology=topology,
        model=ModelSpec(path=str(folder), init="random", lora=LoraSpec(rank=workload.lora_rank)),
        data=DataSpec(train=["random"], seq_length=workload.seq_length, packing=True, pad_to_multiple=64),
        train=TrainSpec(
            max_steps=max_steps,
            global_batch_size=workload.rows * workload.seq_length * ranks,
            global_batch_unit="tokens",
            micro_batch_size=micro_batch_rows(topology, workload.rows, micro_batches),
            optimizer=OptimizerSpec(lr=1e-5, schedule="constant"),
            **own,
        ),
    )


class BenchModule(SFTGPT):
    """SFTGPT with random weights made on the device, a clock around its steps, and a profiler after them."""

    def __init__(self, *args: Any, clock: StepClock, router_std: float) -> None:
        super().__init__(*args)
        self.clock = clock
        self.router_std = router_std
        self.result: Result | None = None
        self.timers = PhaseTimers()
        self._profile: profile | None = None

    def configure_model(self) -> None:
        device = self.trainer.strategy.root_device
        chunks = self.build(on_gpu=device.type == "cuda")
        self.config.timers = self.timers
        self.gpt = torch.nn.ModuleList(chunk.to(device) for chunk in chunks)
        torch.manual_seed(self.spec.train.seed)
        zeros = ("bias", "layernorm.weight") if self.config.layernorm_zero_centered_gamma else ("bias",)
        with torch.no_grad():
            for name, parameter in self.gpt.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=self.router_std if name.endswith("router.weight") else INITIAL_STD)
                else:
                    parameter.fill_(0.0 if name.endswith(zeros) else 1.0)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        timed = not self.clock.over
        if timed:
            self.clock.before_step()
            if self.clock.begins:
                self.timers.reset()
        self.timers("step").start()
        super().training_step(batch, batch_idx)
        self.timers("optimizer").stop()
        self.timers("step").stop()
        if timed:
            lengths = [length for part in batch.micro_batches for length in part.seq_lengths or ()]
            slots = sum(part.tokens.numel() for part in batch.micro_batches)
            replicas = self.topology.data_parallel  # the batch's numbers are those of all of them
            real, supervised = batch.tokens // replicas, batch.supervised_tokens // replicas
            self.clock.after_step(without_padding(lengths, real), slots, supervised)
        if timed and self.clock.over:
            self.result = self._measured()
            self._profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profile.__enter__()

    def _measured(self) -> Result:
        """Return the result of the timed steps, without the kernels, which are profiled in the steps after them."""
        assert self.last_step is not None
        train, topology, rank = self.spec.train, self.topology, self.spec.model.lora.rank
        settings: dict[str, object] = {
            "layout": topology.describe(),
            **({"stages": topology.describe_stages()} if topology.pipeline_parallel > 1 else {}),
            "weights": "bf16 with fp32 master",
            "rows": train.global_batch_size // self.spec.data.seq_length // topology.world_size,
            "micro_batch_size": train.micro_batch_size,
            "kernels": self.kernels.describe(),
            "recompute": train.recompute,
            **({} if train.recompute_layers is None else {"recompute_layers": train.recompute_layers}),
            "precision": train.precision,
            **({"experts": "fp8"} if train.fp8.experts else {}),
            "lora": rank,
            "launches": "graphs" if self.kernels.graphs else None,
            "attention": self.kernels.attention if self.kernels.fused_layers else "torch",
        }
        loss = self.last_step.loss.item()
        found = self.clock.result("ours", settings, self.architecture.shape, loss, self._expected(), lora_rank=rank)
        found.phases_ms.update(self.timers.milliseconds(found.steps, found.step_ms))
        return found

    def _expected(self) -> float | None:
        """Return the speed that the planner predicts for the lengths and targets that were seen, None if it cannot."""
        lengths, slots = self.clock.lengths, self.clock.slots
        tokens = sum(lengths)
        return expected_tokens_per_second(
            self.spec,
            self.topology,
            self.architecture.shape,
            attended=sum(length * length for length in lengths) / tokens,
            fill=tokens / slots,
            trained=self.clock.supervised / tokens,
        )

    def _set_learning_rate(self, step: int) -> float:
        rate = super()._set_learning_rate(step)
        self.timers("optimizer").start()  # the update comes next
        return rate

    def on_train_end(self) -> None:
        if self._profile is not None and self.result is not None:
            self._profile.__exit__(None, None, None)
            kinds, kernels = kernel_times(self._profile, PROFILED_STEPS)
            self.result.breakdown_ms.update(kinds)
            self.result.largest_kernels_ms.update(kernels)


def without_padding(lengths: list[int], tokens: int) -> list[int]:
    """Return the lengths of examples alone. Padding comes last: lengths are cut from the end to `tokens` in all."""
    if sum(lengths) == tokens:
        return lengths
    kept, left = [], sum(lengths) - tokens
    for length in reversed(lengths):
        taken = min(length, left)
        left -= taken
        kept.append(length - taken)
    return [length for length in kept if length]


def kernel_times(profiled: profile, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the milliseconds of a step by kind of kernel, and those of the kernels that take most.

    Two of the kinds are none: `no kernel` is the time in which none ran, `exposed communication` the time in which only
    communication ran.
    """
    times: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    spans: dict[bool, list[Interval]] = {True: [], False: []}
    begin, end = float("inf"), 0.0
    for event in profiled.events() or []:
        if event.device_type != DeviceType.CUDA or event.name.startswith(_ANNOTATIONS):
            continue
        kind = next((kind for kind, names in _KERNELS.items() if re.search(names, event.name, re.I)), "other")
        times[kind] += event.time_range.elapsed_us()
        kernels[event.name[:_NAME_LENGTH]] += event.time_range.elapsed_us()
        spans[kind == "communication"].append((event.time_range.start, event.time_range.end))
        begin, end = min(begin, event.time_range.start), max(end, event.time_range.end)
    if not times:
        return {}, {}
    idle = end - begin - busy([*spans[True], *spans[False]])
    kinds = [*times.most_common(), ("no kernel", idle)]
    if spans[True]:
        kinds.append(("exposed communication", exposed(spans[True], spans[False])))
    by_kind = {kind: time / steps / 1e3 for kind, time in kinds}
    largest = {name: time / steps / 1e3 for name, time in kernels.most_common(_LARGEST)}
    return _rounded(by_kind), _rounded(largest)


def _rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(time, 2) for name, time in times.items()}


class RandomExamples:
    """A workload's examples in the form that schedules and batches read."""

    key = "random"

    def __init__(self, workload: Workload, steps: int) -> None:
        self._examples = list(workload.examples(steps))

    def __len__(self) -> int:
        return len(self._examples)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        return np.array([len(ids) for ids, _ in self._examples], dtype=np.int64)

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        return np.array([trained[1:].sum() for _, trained in self._examples], dtype=np.int64)

    @property
    def target_weights(self) -> NDArray[np.float64]:
        return self.supervised.astype(np.float64)

    def tokens(self, example: int) -> TokenPair:
        ids, trained = self._examples[example]
        return ids, trained.astype(np.float32)


class BenchData(pl.LightningDataModule):
    """The loader of `sft train` over random examples."""

    def __init__(self, workload: Workload, spec: RunSpec, topology: Topology, max_steps: int) -> None:
        super().__init__()
        self._spec, self._topology, self._max_steps = spec, topology, max_steps
        # A step has the workload's rows for each GPU, also where several GPUs train one replica.
        self.examples = RandomExamples(workload, max_steps * topology.world_size)
        self.schedule = batch_schedule(spec, self.examples, shuffle=True)

    def train_dataloader(self) -> StepLoader:
        batches = StepBatches(self.examples, self.schedule, self._spec, self._topology, self._max_steps)
        assert self.trainer is not None
        return StepLoader(batches, self.trainer, pin_memory=self._spec.resources.gpus_per_node > 0)

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        return batch.to(device)
