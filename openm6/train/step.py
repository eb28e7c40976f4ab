"""One training step: forward, backward, clip, update; a step whose loss or gradient is not finite changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from openm6.checkpoint.load import load_model, load_optimizer
from openm6.checkpoint.optimizer import Moments, delink_moments, load_optimizer_state, optimizer_state_dict
from openm6.checkpoint.save import Shard
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.core.seeds import derive_seed
from openm6.distributed.process_group import ProcessGroupContext
from openm6.energy.tracker import Work, WorkCount
from openm6.kernels.probe import capabilities, compile_failure
from openm6.nn.executor import CheckpointedExecutor, CompiledExecutor, LayerExecutor
from openm6.ops.matmul import HALF, bf16_matmul, has_bf16
from openm6.optim.config import lr_multiplier
from openm6.optim.registry import build_optimizer, default_groups, set_lr
from openm6.plan.memory import layers_to_recompute
from openm6.train.config import LoopConfig, Precision
from openm6.train.pseudo_to_real import break_symmetry
from openm6.train.training_task import Batch, StepResult, TrainingTask


@dataclass(frozen=True)
class StepReport:
    """The metrics of one step."""

    step: int
    tokens: int
    loss: float
    grad_norm: float
    learning_rate: float
    applied: bool  # False: not finite, so nothing was changed
    metrics: dict[str, float]
    # Per sparse layer the load's σ/μ (M6-T, arXiv 2105.15082, section 3.1), where 0 is a perfect balance.
    expert_load_cv: list[float]
    dropped: list[float]  # per sparse layer, the fraction of expert assignments that were dropped
    work: Work = field(default_factory=dict)  # operations by modality and by task


def seed_everything(seed: int, *purpose: str | int) -> None:
    """Seed torch (all devices), numpy and random from the run's seed and the purpose."""
    value = derive_seed(seed, *purpose)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


class TrainStep:
    """Train a training task's model on one batch at a time."""

    num_shards = 0  # offloaded groups of layers, which the model does not hold and which are saved one by one

    def __init__(self, training: TrainingTask, config: LoopConfig) -> None:
        self.training, self.config = training, config
        self.ranks = training.ranks  # or the workers that share the steps of this process
        self.lr_scale = 1.0  # a callback's factor on the learning rate
        self._build()
        self.device = self.parameters[0].device
        self.precision = resolve_precision(config.precision, self.device)
        if self.precision == "bf16-products" != config.precision:
            get_log().info("large products run in bf16, as this CPU is fast at it (loop.precision=auto)")

    def _build(self) -> None:
        groups = self.training.ranks.groups(default_groups(self.training.model))
        self.optimizer = build_optimizer(groups, self.config.optimizer, self.training.ranks.shard_spec)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._prepared = False

    def shards(self) -> Iterator[Shard]:
        """Yield the offloaded groups of layers one at a time."""
        return iter(())

    def load(self, folder: Path) -> None:
        """Fill model and optimizer from a checkpoint.

        Raises:
            CheckpointError: names or shapes differ, or a file is missing or unreadable.
        """
        layout = self.training.ranks.layout
        load_model(folder, self.training.model, layout)
        load_optimizer(folder, self.optimizer, self.training.model, layout)

    def close(self) -> None:
        """Release what was allocated besides the model."""

    def delink(self, moments: Moments, noise: float = 0.0) -> None:
        """Copy the weights so that each layer has its own, and of the optimizer's moments what `moments` selects."""
        tensors = optimizer_state_dict(self.optimizer, self.training.model)
        sources = self.training.delink()
        self._build()
        inherited = delink_moments(tensors, sources, moments)
        load_optimizer_state(inherited.items(), self.optimizer, self.training.model, "the stage before")
        if noise:
            break_symmetry(sources, self.training.model, noise, self.config.seed, self.training.ranks)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run; the backward pass follows it."""
        if self.precision == "bf16-products":
            return bf16_matmul()
        return torch.autocast(self.device.type, dtype=HALF, enabled=self.precision == "bf16")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """While entered, the model is in evaluation mode, without gradients, in the precision of training."""
        model = self.training.model
        model.eval()
        with torch.no_grad(), self.autocast():
            yield
        self.training.ranks.reshard(model)
        model.train()

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        """Train on one batch as step `step`, the first being 1."""
        ranks, schedule = self.ranks, self.config.schedule
        rate = self.config.optimizer.learning_rate * lr_multiplier(step, total, schedule) * self.lr_scale
        set_lr(self.optimizer, rate)
        own = (ranks.rank,) if ranks.shares_memory and ranks.rank else ()
        seed_everything(self.config.seed, "step", step, *own)
        result, norm = self._backward(batch, step, rate)
        result, tokens = sum_over_ranks(result, batch.tokens, ranks)
        report = make_report(step, tokens, rate, result, norm)
        if report.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ranks.barrier()
        if report.applied and (ranks.is_main_process or not ranks.shares_memory):
            self.training.after_step(result)
        return report

    def _backward(self, batch: Batch, step: int, rate: float) -> tuple[StepResult, Tensor]:
        """Run the forward and the backward pass and clip; return the result, and the gradient norm before clipping."""
        with self.autocast():
            if not self._prepared:
                self.choose_execution(batch.tokens)
                self._prepared = True
            result = self.training.loss(batch)
        result.loss.backward()
        self.ranks.sum_gradients(self.parameters)
        self.ranks.forget_unused(self.training.optional_parameters())
        return result, self._clip()

    def choose_execution(self, tokens: int) -> None:
        """Set how blocks run, if nobody has: compiled or not, and how many are computed again in the backward pass.

        `tokens` are those of a step: the memory that layers need follows from the size of a batch.
        """
        backbone = self.training.backbone
        if backbone is None or type(backbone.executor) is not LayerExecutor:
            return
        executor, weight = backbone.executor, backbone.final_norm.weight
        recomputed, on_gpu = self.config.activation_checkpointing, weight.is_cuda
        # On a CPU compiling takes minutes and saves little: see docs/benchmarks.md.
        compiles = on_gpu if self.config.compile == "auto" else self.config.compile
        # Sharded blocks gather weights and exchange tokens with other ranks, which is not compiled.
        if compiles and self.training.ranks.layout is None:
            if reason := compile_failure(weight.device):
                get_log().warning(f"blocks are not compiled, so slower: {reason}")
            else:
                executor = CompiledExecutor(executor.dispatcher)
        if recomputed == "auto" and on_gpu:
            free, _ = torch.cuda.mem_get_info(weight.device)
            free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
            copies = 1 if self.optimizer.state else 3  # a gradient, and two moments if they are not there yet
            free -= copies * sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
            half = torch.is_autocast_enabled("cuda") or weight.dtype == torch.bfloat16
            recomputed = layers_to_recompute(backbone.config, tokens, 2 if half else 4, free)
        if recomputed not in ("auto", 0):
            get_log().info(
                f"{recomputed} of {backbone.config.num_layers} layers are computed again in the backward pass"
            )
            executor = CheckpointedExecutor(executor, int(recomputed))
        backbone.executor = executor

    def _clip(self) -> Tensor:
        norm = self.ranks.norm(self.parameters)
        if self.config.max_grad_norm is not None:
            self.ranks.clip(self.parameters, self.config.max_grad_norm, norm)
        return norm


def sum_over_ranks(result: StepResult, tokens: int, ranks: ProcessGroupContext) -> tuple[StepResult, int]:
    """Return the sums over ranks of loss, metrics, router loads and work, and of the tokens, in one all-reduce."""
    if ranks.size == 1:
        return result, tokens
    device = result.loss.device
    metrics = {name: torch.as_tensor(value, device=device) for name, value in result.metrics.items()}
    routed = [tensor for stats in result.loads for tensor in (stats.load, stats.dropped)]
    counts = [float(tokens), *(value for named in result.work.values() for count in named.values() for value in count)]
    # fp64, so that numbers of tokens stay whole numbers.
    numbers = torch.tensor(counts, dtype=torch.float64, device=device)
    tensors = [tensor.detach() for tensor in (result.loss, *metrics.values(), *routed, numbers)]
    flat = ranks.all_reduce_tensor(torch.cat([tensor.reshape(-1).double() for tensor in tensors]))
    parts = zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    sums = (part.view_as(tensor).to(tensor.dtype) for part, tensor in parts)
    loss, summed = next(sums), {name: next(sums) for name in metrics}
    loads = [replace(stats, load=next(sums), dropped=next(sums)) for stats in result.loads]
    left = iter(next(sums).tolist())
    total = round(next(left))
    work = {
        kind: {name: WorkCount(round(next(left)), next(left)) for name in named} for kind, named in result.work.items()
    }
    return StepResult(loss, {**summed}, loads, work), total


def make_report(step: int, tokens: int, rate: float, result: StepResult, norm: Tensor) -> StepReport:
    """Return the report of a step whose gradients have this norm; it is applied if its loss and norm are finite.

    All scalars are fetched from the device in one transfer, since each transfer waits for the device.
    """
    plain = {name: float(value) for name, value in result.metrics.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in result.metrics.items() if isinstance(value, Tensor)}
    balance = [*(stats.load_cv for stats in result.loads), *(stats.dropped for stats in result.loads)]
    scalars = [result.loss, norm, *balance, *tensors.values()]
    loss, grad_norm, *rest = torch.stack(
        [value.detach().to(norm.device, torch.float32).reshape(()) for value in scalars]
    ).tolist()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    layers = len(result.loads)
    metrics = {**plain, **dict(zip(tensors, rest[2 * layers :], strict=True))}
    expert_load_cv, dropped = rest[:layers], rest[layers : 2 * layers]
    return StepReport(step, tokens, loss, grad_norm, rate, applied, metrics, expert_load_cv, dropped, result.work)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision that `auto` means on a device; any other is returned as it is.

    Raises:
        ConfigError: bf16-products on another device than a CPU.
    """
    if precision == "bf16-products" and device.type != "cpu":
        raise ConfigError("loop.precision=bf16-products is for processors: on a GPU use bf16, or auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if capabilities(device).bf16 else "fp32"
    # bf16 for everything between the products too is slower on a CPU: see docs/benchmarks.md.
    return "bf16-products" if device.type == "cpu" and has_bf16() else "fp32"
