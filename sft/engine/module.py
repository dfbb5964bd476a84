"""SFTGPT: the Lightning module around this rank's Megatron-core chunks, and the one objective.

The loss is sum(weight * nll) / sum(weight) over the whole global batch, whatever the topology, micro-batch size or
padding. Every rank knows the divisor beforehand (`StepBatch.global_weight`), so gradients are summed over micro-batches
and data parallel ranks as they are and divided once, after the reduction and before clipping. Megatron-core's default,
a mean over micro-batches of means over tokens, is another objective and changes with the topology.

Lightning keeps the loop, the callbacks and the step count; Megatron-core's schedules run forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.data.batches.batch import MicroBatch, StepBatch
from sft.engine.divide_gradients import divide_weights, reduce_and_divide_gradients
from sft.engine.objective import weighted_for
from sft.engine.results import EvalResult, StepResult
from sft.engine.routing import routing_numbers
from sft.engine.rows import rows_of, token_seeds
from sft.hf.learning_rates import rates
from sft.megatron.config import transformer_config
from sft.megatron.core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    MegatronOptimizer,
    TransformerConfig,
    get_forward_backward_func,
    parallel_state,
)
from sft.megatron.decoder_graphs import DecoderGraphs
from sft.megatron.initial_weights import load_initial_weights
from sft.megatron.kernel_choice import Kernels, choose_kernels
from sft.megatron.model import SFTGPTModel, Targets, build_chunks
from sft.megatron.optim.multipliers import of_parameters
from sft.megatron.optim.optimizer import LightningOptimizerShell, build_optimizer
from sft.megatron.optim.schedule import Schedule
from sft.megatron.optim.step_check import StepJudge
from sft.megatron.parallel.documents import RouterStep
from sft.megatron.parallel.groups import sum_over
from sft.models.architecture import Architecture
from sft.runtime import lightning as pl

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the last stage's output to (loss to differentiate, number of targets, sum for the log)."""


class SFTGPT(pl.LightningModule):
    """A GPTModel, spread over ranks, that is fine-tuned."""

    def __init__(
        self,
        spec: RunSpec,
        architecture: Architecture,
        topology: Topology,
        model_dir: Path,
        max_steps: int,
        *,
        resumes: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec = spec
        self.architecture = architecture
        self.topology = topology
        self.model_dir = model_dir
        self.max_steps = max_steps
        self.resumes = resumes
        """Whether a checkpoint fills the weights after they are built."""
        self.model_chunks: list[DistributedDataParallel] = []
        self.judge = StepJudge(spec.train.spike_factor)
        self.last_step: StepResult | None = None
        self.config: TransformerConfig
        self.kernels: Kernels
        self.megatron_optimizer: MegatronOptimizer
        self.schedule: Schedule

    # Building, in the order in which Lightning calls ------------------------------------------------------------

    def configure_model(self) -> None:
        """Build this rank's chunks and load its slices of the weights."""
        device = self.trainer.strategy.root_device
        model_chunks = self.build(on_gpu=device.type == "cuda")
        load_initial_weights(
            model_chunks,
            self.spec,
            self.architecture,
            self.config,
            self.model_dir,
            ranks_per_node=self.topology.ranks_per_node,
            resumes=self.resumes,
        )
        self.gpt = torch.nn.ModuleList(model_chunk.to(device) for model_chunk in model_chunks)

    def build(self, *, on_gpu: bool) -> list[SFTGPTModel]:
        """Return this rank's chunks with uninitialised weights."""
        self.kernels = choose_kernels(self.spec, self.architecture, on_gpu=on_gpu)
        self.config = transformer_config(self.spec, self.architecture, self.topology, self.kernels, on_gpu=on_gpu)
        return build_chunks(self.spec, self.architecture, self.topology, self.config, self.kernels)

    def wrap_chunks(self) -> None:
        """Put Megatron-core's data parallelism (gradient buffers and their reduction) around the chunks."""
        optimizer = self.spec.train.optimizer
        wanted = self.device.type == "cuda" if optimizer.overlap is None else optimizer.overlap
        overlap = wanted and self.topology.reducing_ranks > 1
        adapted = self.spec.model.lora.rank is not None  # adapters are used outside of modules that hooks could wait in
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=optimizer.distributed,
            grad_reduce_in_fp32=optimizer.grad_reduce == "fp32",
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap and optimizer.distributed and not adapted,
        )
        self.model_chunks = [
            DistributedDataParallel(self.config, ddp, model_chunk, disable_bucketing=index > 0)
            for index, model_chunk in enumerate(self.gpt)
        ]
        if self.kernels.graphs:
            for model_chunk in self.model_chunks:
                model_chunk.module.graphs = DecoderGraphs(
                    model_chunk.module.decoder.layers, model_chunk, required=self.spec.train.cuda_graphs == "always"
                )
        no_sync = [model_chunk.no_sync for model_chunk in self.model_chunks]
        self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = self.spec.train.optimizer
        by_name = rates(optimizer, self.spec.model.lora, self.architecture)
        self.megatron_optimizer = build_optimizer(
            optimizer,
            self.model_chunks,
            self.config.params_dtype,
            of_parameters(by_name, self.model_chunks, self.config),
            one_pass=self.kernels.fused,
        )
        self.schedule = Schedule(optimizer, self.megatron_optimizer, self.max_steps)
        self.config.grad_scale_func = self.megatron_optimizer.scale_loss
        return LightningOptimizerShell(self.megatron_optimizer, self.judge)

    def gather_weights(self) -> None:
        """Fetch what other ranks have updated, where that waits for the next forward pass of a training step."""
        for model_chunk in self.model_chunks:
            if model_chunk.ddp_config.overlap_param_gather:
                model_chunk.start_param_sync(force_sync=True)

    # Training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Run one optimizer step over this rank's micro-batches of the global batch."""
        optimizer = self.optimizers()
        for model_chunk in self.model_chunks:
            model_chunk.zero_grad_buffer()
        optimizer.zero_grad()  # type: ignore[union-attr]
        batch = weighted_for(self.spec.train.objective, batch, self.topology.data_parallel)
        self.config.finalize_model_grads_func = partial(
            reduce_and_divide_gradients, divisor=1.0 if self.kernels.fused else batch.global_weight
        )
        loss = _divide(self.forward_backward(batch, forward_only=False), batch.global_weight)
        learning_rate = self._set_learning_rate(batch.step)
        shell: LightningOptimizerShell = optimizer.optimizer  # type: ignore[union-attr,assignment]
        shell.loss = loss
        optimizer.step()  # type: ignore[union-attr]
        self.last_step = StepResult(
            step=batch.step + 1,
            loss=loss,
            grad_norm=shell.grad_norm,
            bad=shell.bad,
            lr=learning_rate,
            examples=batch.examples,
            tokens=batch.tokens,
            squared_lengths=batch.squared_lengths,
            supervised_tokens=batch.supervised_tokens,
            routing=self._routing_numbers(batch),
        )

    def _routing_numbers(self, batch: StepBatch) -> Tensor | None:
        """Return the numbers of `routing.NUMBERS`, of a step that is logged and in a model with experts."""
        if not (self.architecture.has_experts and self._is_logged(batch)):
            return None
        chunks = [model_chunk.module for model_chunk in self.model_chunks]
        return routing_numbers(chunks, self.architecture, self.topology, batch.examples, self.device)

    def _set_learning_rate(self, step: int) -> float:
        """Set and return the schedule's learning rate. It depends on `step` alone: there is nothing to resume."""
        self.schedule.num_steps = step
        self.schedule.step(0)
        return self.learning_rate

    @property
    def learning_rate(self) -> float:
        """The current learning rate, of parameters that have none of their own."""
        return self.schedule.rate

    def forward_backward(self, batch: StepBatch, *, forward_only: bool) -> Tensor:
        """Run the schedule and return the summed weighted loss of the global batch, on every rank."""
        parts = [micro_batch.own_part() for micro_batch in batch.micro_batches]
        iterators: list[Iterator[MicroBatch]] = [iter(parts) for _ in self.model_chunks]
        rows, seq_length = batch.micro_batches[0].tokens.shape
        routers = self._router_step(batch)
        forward_step = partial(_forward_step, routers=routers)
        if self.kernels.fused:
            forward_step = partial(_fused_step, routers=routers, divisor=batch.global_weight)
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.model_chunks) > 1 else iterators[0],
            model=self.model_chunks if len(self.model_chunks) > 1 else self.model_chunks[0],
            num_microbatches=len(batch.micro_batches),
            seq_length=seq_length,  # of whole rows: the schedule divides it by cp and tp itself
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        total = torch.stack(outputs).sum() if outputs else torch.zeros((), device=self.device)
        sum_over(total, parallel_state.get_data_parallel_group(with_context_parallel=True))
        if self.topology.pipeline_parallel > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(total, last, group=parallel_state.get_pipeline_model_parallel_group())
        return total

    def _router_step(self, batch: StepBatch) -> RouterStep | None:
        """Return what routers do in this step, or None for a model without any."""
        if not self.architecture.has_experts:
            return None
        # Gradients are divided by the weight afterwards, unless fused kernels have done so.
        divided = 1.0 if self.kernels.fused else batch.global_weight
        scale = self.spec.train.router_aux_loss / batch.examples * divided if batch.global_weight > 0 else 0.0
        return RouterStep(
            aux_scale=scale, recorded=self._is_logged(batch), sequence_parallel=self.topology.sequence_parallel
        )

    def _is_logged(self, batch: StepBatch) -> bool:
        return self.spec.logging.is_due(batch.step + 1, self.max_steps)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[StepBatch]) -> EvalResult:
        """Return the exact mean loss over `batches`: each token counts once, however they are split."""
        self.gather_weights()
        for model_chunk in self.model_chunks:
            model_chunk.eval()
        loss_sum, weight, examples, supervised = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
        for batch in batches:
            loss_sum += self.forward_backward(batch.to(self.device), forward_only=True).double().cpu()
            weight += batch.global_weight
            examples += batch.examples
            supervised += batch.supervised_tokens
        for model_chunk in self.model_chunks:
            model_chunk.train()
        return EvalResult(loss=float(loss_sum) / weight, examples=examples, supervised_tokens=supervised)


def _forward_step(
    iterator: Iterator[MicroBatch], model: DistributedDataParallel, *, routers: RouterStep | None
) -> tuple[Tensor, LossFunction]:
    """Run Megatron-core's forward step, which on the last stage returns the loss of each target, [b, s]."""
    batch = next(iterator)
    rows = rows_of(batch, routers)
    output = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        packed_seq_params=rows,
        noise_of=token_seeds(batch),
    )
    return output, partial(_weighted_sum, batch.loss_weights)


def _fused_step(
    iterator: Iterator[MicroBatch], model: DistributedDataParallel, *, routers: RouterStep | None, divisor: float
) -> tuple[Tensor, LossFunction]:
    """Run the forward step with fused kernels, which on the last stage returns the divided sum of weighted losses.

    Gradients then need not be divided any more.
    """
    batch = next(iterator)
    places = batch.supervised
    assert places is not None
    weights, labels = (rows.t().reshape(-1)[places] for rows in (batch.loss_weights, batch.labels))
    targets = Targets(places, labels, divide_weights(weights, divisor))
    rows = rows_of(batch, routers)
    output = model(
        batch.tokens,
        batch.position_ids,
        None,
        packed_seq_params=rows,
        targets=targets,
        noise_of=token_seeds(batch),
    )
    return output, partial(_as_sum, len(places), divisor or 1.0)


def _as_sum(count: int, divisor: float, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `_weighted_sum` does, except for the first, which stays divided because gradients come from it."""
    return mean, torch.full((), count, dtype=torch.int32, device=mean.device), mean.detach() * divisor


def _weighted_sum(weights: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum(w * loss), number of targets, the sum again for the log).

    Unsupervised positions are selected away, not multiplied by 0: 0 * NaN is NaN. The logged copy must be a copy,
    because the schedule scales the loss in place.
    """
    supervised = weights != 0
    total = torch.where(supervised, losses.float() * weights, 0.0).sum()
    return total, supervised.sum().int(), total.detach().clone()


def _divide(total: Tensor, weight: float) -> Tensor:
    return total / weight if weight > 0 else torch.zeros_like(total)
