"""One training step: forward, backward, clip, update; a step whose loss or gradient is not finite changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from openm6.checkpoint.load import load_model, load_optimizer
from openm6.checkpoint.optimizer import Moments, delink_moments, load_optimizer_state, optimizer_state_dict
from openm6.checkpoint.save import Shard
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.log import get_log
from openm6.core.seeds import derive_seed
from openm6.energy.tracker import Work, sum_work
from openm6.models.backbone import Backbone
from openm6.models.running import CompiledBlocks, RecomputedBlocks, RunBlock, run_plainly
from openm6.ops.matmul import HALF, bf16_matmul, has_bf16
from openm6.optim.registry import build_optimizer, set_lr
from openm6.optim.schedule import lr_multiplier
from openm6.parallel.process_group import ProcessGroupContext
from openm6.plan.memory import layers_to_recompute
from openm6.train.config import LoopConfig, Precision
from openm6.train.pseudo_to_real import break_symmetry, shared_matrices
from openm6.train.training_task import Batch, StepResult, TrainingTask


@dataclass(frozen=True)
class StepReport:
    """The numbers of one step."""

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
    work: Work = field(default_factory=dict)  # what the step was used for


def seed_everything(seed: int, *purpose: str | int) -> None:
    """Seed torch (all devices), numpy and random from the run's seed and the purpose."""
    value = derive_seed(seed, *purpose)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


class TrainStep:
    """Train a training task's model on one batch at a time."""

    def __init__(self, training: TrainingTask, config: LoopConfig) -> None:
        self.training = training
        self.config = config
        self.ranks = training.ranks  # or the workers that share the steps of this process
        self.lr_scale = 1.0  # a callback's factor on the learning rate
        self._build()
        self.device = self.parameters[0].device
        resolved = resolve_precision(config.precision, self.device)
        if resolved == "bf16-products" != config.precision:
            get_log().info("large products run in bf16, as this CPU is fast at it (loop.precision=auto)")

    def _build(self) -> None:
        groups = self.training.ranks.groups(self.training.parameter_groups())
        self.optimizer = build_optimizer(groups, self.config.optimizer, self.training.ranks.shard_spec)
        self.parameters = [
            parameter for group in self.optimizer.param_groups for parameter in group["params"]
        ]
        self._prepared = False

    @property
    def num_shards(self) -> int:
        """The number of weight sets that the model itself does not hold and that are saved one by one."""
        return 0

    def shards(self) -> Iterator[Shard]:
        """Yield those sets one at a time."""
        return iter(())

    def load(self, folder: Path) -> None:
        """Fill model and optimizer from a checkpoint.

        Raises:
            CheckpointError: names or shapes differ, or a file is missing or unreadable.
        """
        layout = self.training.ranks.layout
        load_model(folder, self.training.model, layout)
        load_optimizer(folder, self.optimizer, self.training.model, layout)

    def free_optimizer_state(self) -> None:
        """Free what only training needs; the model remains, for evaluation."""
        self.optimizer.state.clear()

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
            shared = shared_matrices(sources, self.training.model)
            break_symmetry(shared, noise, self.config.seed, self.training.ranks)

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which forward passes run."""
        return in_precision(self.config.precision, self.device)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        """Train on one batch as step number `step`, the first being 1."""
        rate = self.config.optimizer.learning_rate * lr_multiplier(step, total, self.config.schedule)
        rate *= self.lr_scale
        set_lr(self.optimizer, rate)
        ranks = self.ranks
        own = (ranks.rank,) if ranks.shares_memory and ranks.rank else ()
        seed_everything(self.config.seed, "step", step, *own)
        with self.autocast():
            self._prepare(batch)
            result = self.training.loss(batch)
        result.loss.backward()
        ranks.sum_gradients(self.parameters)
        ranks.forget_unused(self.training.optional_parameters())
        norm = self._clip()
        result, tokens = sum_over_ranks(result, batch.tokens, ranks)
        report = make_report(step, tokens, rate, result, norm)
        if report.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        ranks.barrier()
        if report.applied and (ranks.is_main_process or not ranks.shares_memory):
            self.training.after_step(result)
        return report

    def _prepare(self, batch: Batch) -> None:
        """Choose how blocks run, before the first step, when the size of a batch is known."""
        if not self._prepared:
            size = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
            copies = 1 if self.optimizer.state else 3  # a gradient, and two moments if they are not there yet
            sharded = self.training.ranks.layout is not None
            choose_execution(self.training.model, self.config, batch.tokens, copies * size, sharded)
            self._prepared = True

    def _clip(self) -> Tensor:
        norm = self.ranks.norm(self.parameters)
        if self.config.max_grad_norm is not None:
            self.ranks.clip(self.parameters, self.config.max_grad_norm, norm)
        return norm


def sum_over_ranks(result: StepResult, tokens: int, ranks: ProcessGroupContext) -> tuple[StepResult, int]:
    """Loss, metrics and router loads of all ranks together, and their tokens, in one exchange."""
    if ranks.size == 1:
        return result, tokens
    device = result.loss.device
    metrics = [torch.as_tensor(value, device=device).detach() for value in result.metrics.values()]
    pieces = [result.loss.detach(), *metrics, torch.tensor(float(tokens), device=device)]
    for report in result.loads:
        pieces += [report.load, report.dropped]
    # fp64, so that the number of tokens stays a whole number.
    flat = ranks.all_reduce_tensor(torch.cat([piece.reshape(-1).double() for piece in pieces]))
    summed = [
        part.view_as(piece).to(piece.dtype)
        for part, piece in zip(flat.split([piece.numel() for piece in pieces]), pieces, strict=True)
    ]
    named = dict(zip(result.metrics, summed[1 : 1 + len(metrics)], strict=True))
    rest = summed[2 + len(metrics) :]
    loads = [
        replace(report, load=load, dropped=dropped)
        for report, load, dropped in zip(result.loads, rest[::2], rest[1::2], strict=True)
    ]
    work = sum_work(ranks.gather(result.work)) if ranks.shares_memory else {}
    return StepResult(summed[0], {**named}, loads, work), round(float(summed[1 + len(metrics)]))


def make_report(step: int, tokens: int, rate: float, result: StepResult, norm: Tensor) -> StepReport:
    """The report of a step whose gradients have this norm; it is applied if its loss and norm are finite."""
    measured = _measure(result, norm)
    expert_load_cv, dropped = (_take_layers(measured, f"{name} ") for name in ("expert_load_cv", "dropped"))
    loss, grad_norm = measured.pop("loss"), measured.pop("grad_norm")
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    return StepReport(
        step, tokens, loss, grad_norm, rate, applied, measured, expert_load_cv, dropped, result.work
    )


def _measure(result: StepResult, norm: Tensor) -> dict[str, float]:
    """Every scalar of a step as a float, fetched from the device in one transfer: each one costs a wait."""
    scalars = {name: value.detach() for name, value in result.metrics.items() if isinstance(value, Tensor)}
    for index, report in enumerate(result.loads):
        scalars[f"expert_load_cv {index}"] = report.load_cv.detach()
        scalars[f"dropped {index}"] = report.dropped.detach()
    scalars |= {"loss": result.loss.detach(), "grad_norm": norm}
    stacked = torch.stack([value.to(norm.device, torch.float32).reshape(()) for value in scalars.values()])
    plain = {name: float(value) for name, value in result.metrics.items() if not isinstance(value, Tensor)}
    return {**plain, **dict(zip(scalars, stacked.tolist(), strict=True))}


def _take_layers(measured: dict[str, float], prefix: str) -> list[float]:
    return [measured.pop(name) for name in list(measured) if name.startswith(prefix)]


def in_precision(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """Return the context of a forward pass on a device; the backward pass follows it."""
    resolved = resolve_precision(precision, device)
    if resolved == "bf16-products":
        return bf16_matmul()
    return torch.autocast(device.type, dtype=HALF, enabled=resolved == "bf16")


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
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    # bf16 for everything between the products too is slower on a CPU: see docs/benchmarks.md.
    return "bf16-products" if device.type == "cpu" and has_bf16() else "fp32"


def choose_execution(
    model: nn.Module, config: LoopConfig, tokens: int, pending: int, sharded: bool = False
) -> None:
    """Set `run_block` of each backbone in the model that still runs plainly.

    tokens: of a step; pending: bytes that gradients and optimizer will take beside what is allocated now;
    sharded: whether blocks gather weights or exchange rows with other ranks, which is not compiled.
    """
    for backbone in (module for module in model.modules() if isinstance(module, Backbone)):
        if backbone.run_block is run_plainly:
            backbone.run_block = _block_runner(backbone, config, tokens, pending, sharded)


def _block_runner(
    backbone: Backbone, config: LoopConfig, tokens: int, pending: int, sharded: bool
) -> RunBlock:
    device = backbone.final_norm.weight.device
    # On a CPU compiling takes minutes and saves little: see docs/benchmarks.md.
    compiles = device.type == "cuda" if config.compile == "auto" else config.compile
    run: RunBlock = CompiledBlocks() if compiles and not sharded else run_plainly
    again = config.activation_checkpointing
    if again == "auto":
        again = 0 if device.type != "cuda" else _by_memory(backbone, tokens, pending, device)
    if again:
        get_log().info(
            f"{again} of {backbone.config.num_layers} layers are computed again in the backward pass"
        )
        run = RecomputedBlocks(run, again)
    return run


def _by_memory(backbone: Backbone, tokens: int, pending: int, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    half = torch.is_autocast_enabled("cuda") or backbone.final_norm.weight.dtype == torch.bfloat16
    return layers_to_recompute(backbone.config, tokens, 2 if half else 4, free - pending)


@contextmanager
def device_failures(step: Callable[[], int], offloaded: bool = True) -> Iterator[None]:
    """Turn a GPU's failures into one sentence; the run's checkpoints are complete in any case.

    `step` returns the number of the step that is under way.

    Raises:
        TrainingError: the GPU's memory ran out, or the GPU is gone.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "raise loop.offload.gradient_accumulation_steps or margin_gib"
        remedy = (
            remedy
            if offloaded
            else "raise loop.activation_checkpointing, make batches smaller, or add loop.offload"
        )
        raise TrainingError(
            f"the GPU's memory ran out in step {step()}: {remedy}, then go on with --resume"
        ) from error
    except torch.AcceleratorError as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(
            f"the GPU failed in step {step()} ({reason}): what was saved is whole, go on with --resume"
        ) from error
