"""One training step: forward, backward, clip, update; a step whose loss or gradient is not finite changes nothing."""

import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
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
from openm6.optim.adamw import AdamW
from openm6.optim.config import lr_multiplier
from openm6.optim.registry import build_optimizer, default_groups, set_lr
from openm6.optim.sharding import REPLICATED, ShardSpec
from openm6.plan.memory import layers_to_recompute
from openm6.train.config import LoopConfig, Precision
from openm6.train.training_task import Batch, StepResult, TrainingTask

AHEAD = ("cuda",)  # types of devices that the host need not wait for


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


class StepNumbers:
    """The numbers of a report on their way to the host, in one copy; `skip` there is NaN if one is not finite."""

    def __init__(self, step: int, rate: float, result: StepResult, counts: Tensor, norm: Tensor) -> None:
        """`counts` as of `sum_over_ranks`; `norm`: that of the gradients."""
        self._step, self._rate, self._work = step, rate, result.work
        self._layers, self._counts = len(result.loads), counts
        self._metrics = dict(result.metrics)
        loss = result.loss.detach().float()
        norm = norm.detach().to(loss)  # without any gradient, it is on the CPU
        self.skip = loss * 0 + norm * 0
        balance = [*(stats.load_cv for stats in result.loads), *(stats.dropped for stats in result.loads)]
        tensors = (value for value in result.metrics.values() if isinstance(value, Tensor))
        scalars = [value.detach().float().reshape(()) for value in (*balance, *tensors)]
        numbers = torch.stack([loss.reshape(()), norm.reshape(()), *scalars]).double()
        if counts.device == numbers.device:
            numbers = torch.cat([numbers, counts])
        self._numbers, self._event = numbers, None
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> StepReport:
        """Wait for the numbers, and return the report; a step is applied if its loss and norm are finite."""
        if self._event is not None:
            self._event.synchronize()
        values = iter(self._numbers.tolist())
        loss, grad_norm = next(values), next(values)
        expert_load_cv, dropped = (list(islice(values, self._layers)) for _ in range(2))
        metrics = {x: next(values) if isinstance(value, Tensor) else float(value) for x, value in self._metrics.items()}
        left = iter(list(values) or self._counts.tolist())
        tokens = round(next(left))
        work = {
            kind: {name: WorkCount(round(next(left)), next(left)) for name in named}
            for kind, named in self._work.items()
        }
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        return StepReport(
            self._step, tokens, loss, grad_norm, self._rate, applied, metrics, expert_load_cv, dropped, work
        )


class TrainStep:
    """Train a training task's model on one batch at a time."""

    num_shards = 0  # offloaded groups of layers, which the model does not hold and which are saved one by one

    def __init__(self, training: TrainingTask, config: LoopConfig) -> None:
        self.training, self.config = training, config
        self.ranks = training.ranks  # or the workers that share the steps of this process
        self.lr_scale = 1.0  # a callback's factor on the learning rate
        self._unread: StepNumbers | None = None
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
        """Fill model and optimizer from a checkpoint; raise CheckpointError if it does not fit or cannot be read."""
        layout = self.training.ranks.layout
        load_model(folder, self.training.model, layout)
        load_optimizer(folder, self.optimizer, self.training.model, layout)

    def close(self) -> None:
        """Release what was allocated besides the model."""

    def delink(self, moments: Moments, noise: float = 0.0) -> None:
        """Copy the weights for each layer, moments as `moments` has it, with `noise` on copies, as `matrix_noise`."""
        tensors, ranks = optimizer_state_dict(self.optimizer, self.training.model), self.training.ranks
        sources = self.training.delink()
        model, backbone = self.training.model, self.training.backbone  # a sharded one was built again
        if backbone is not None:  # how blocks run is chosen again: separate weights need more memory
            backbone.executor = LayerExecutor(backbone.executor.dispatcher)
        self._build()
        inherited = delink_moments(tensors, sources, moments)
        load_optimizer_state(inherited.items(), self.optimizer, model, "the stage before")
        uses, named = Counter(sources.values()), dict(model.named_parameters())
        delinked = {new for new, old in sources.items() if uses[old] > 1 and named[new].ndim > 1}
        for name in sorted(one for one in delinked if noise and not named[one].is_meta):  # offloaded ones are on meta
            spec = ranks.shard_spec(named[name])
            with torch.no_grad():
                values = spec.local(named[name])
                first = ranks.first_expert(len(values)) if values.ndim > 2 else 0
                seed = derive_seed(self.config.seed, "delink", name)
                values.add_(matrix_noise(values, noise, seed, spec, first))

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
        result, numbers = self._launch(batch, step, total)
        report = numbers.read()
        if report.applied:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.barrier()
        if report.applied and (self.ranks.is_main_process or not self.ranks.shares_memory):
            self.training.after_step(result)
        return report

    def update_ahead(self, batch: Batch, step: int, total: int | None) -> StepReport | None:
        """As `update`, but the device decides whether to apply it, without a wait; return the last unread report."""
        result, numbers = self._launch(batch, step, total)
        before = self.read_report()  # the device has this step's passes to compute meanwhile
        assert isinstance(self.optimizer, AdamW)
        self.optimizer.skip = numbers.skip
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        applied = torch.isfinite(numbers.skip)
        self.training.after_step(replace(result, loads=[replace(x, load=x.load * applied) for x in result.loads]))
        self._unread = numbers
        return before

    def read_report(self) -> StepReport | None:
        """Return the report of the last `update_ahead`, once; None if there is none."""
        numbers, self._unread = self._unread, None
        if numbers is None:
            return None
        report = numbers.read()
        if not report.applied:
            assert isinstance(self.optimizer, AdamW)
            self.optimizer.uncount()
        return report

    @property
    def runs_ahead(self) -> bool:
        possible = (
            self.device.type in AHEAD and self.training.after_step_needs_loads_alone and not self.config.offloaded
        )
        return possible and isinstance(self.optimizer, AdamW) and self.optimizer.skips_on_device

    def _launch(self, batch: Batch, step: int, total: int | None) -> tuple[StepResult, StepNumbers]:
        """Run both passes; return their result and the numbers of the report on their way to the host."""
        ranks, schedule = self.ranks, self.config.schedule
        rate = self.config.optimizer.learning_rate * lr_multiplier(step, total, schedule) * self.lr_scale
        set_lr(self.optimizer, rate)
        own = (ranks.rank,) if ranks.shares_memory and ranks.rank else ()
        seed_everything(self.config.seed, "step", step, *own)
        result, norm = self._backward(batch, step, rate)
        result, counts = sum_over_ranks(result, batch.tokens, ranks)
        return result, StepNumbers(step, rate, result, counts, norm)

    def _backward(self, batch: Batch, step: int, rate: float) -> tuple[StepResult, Tensor]:
        """Run the forward and the backward pass and clip; return the result, and the gradient norm before clipping."""
        with self.autocast():
            if not self._prepared:
                self.choose_execution(batch.tokens)
                self._prepared = True
            result = self.training.loss(batch)
        if result.loss.requires_grad:  # of some batches, frozen weights leave nothing to train
            result.loss.backward()
        self.ranks.sum_gradients(self.parameters)
        self.ranks.forget_unused(self.training.optional_parameters())
        return result, self._clip()

    def choose_execution(self, tokens: int) -> None:
        """Set how blocks run, if nobody has: compiled or not, and how many again backwards, by `tokens` of a step."""
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
            ranks = self.training.ranks
            free -= copies * sum(ranks.shard_spec(one).local(one).nbytes for one in self.parameters)
            half = torch.is_autocast_enabled("cuda") or weight.dtype == torch.bfloat16
            own = layers_to_recompute(backbone.config, tokens, 2 if half else 4, free, self.training.stem_elements)
            recomputed = max(ranks.gather(own))  # the same on all ranks, as recomputation contains collectives
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


def sum_over_ranks(result: StepResult, tokens: int, ranks: ProcessGroupContext) -> tuple[StepResult, Tensor]:
    """Return sums over ranks, by one all-reduce, and in fp64 the tokens and the numbers of `work` in their order."""
    counts = [float(tokens), *(value for named in result.work.values() for count in named.values() for value in count)]
    numbers = torch.tensor(counts, dtype=torch.float64)  # fp64, so that numbers of tokens stay whole numbers
    if ranks.size == 1:
        return result, numbers
    device = result.loss.device
    metrics = {name: torch.as_tensor(value, device=device) for name, value in result.metrics.items()}
    routed = [tensor for stats in result.loads for tensor in (stats.load, stats.dropped)]
    numbers = numbers.to(device, non_blocking=True)
    tensors = [tensor.detach() for tensor in (result.loss, *metrics.values(), *routed, numbers)]
    flat = ranks.all_reduce_tensor(torch.cat([tensor.reshape(-1).double() for tensor in tensors]))
    parts = zip(flat.split([tensor.numel() for tensor in tensors]), tensors, strict=True)
    sums = (part.view_as(tensor).to(tensor.dtype) for part, tensor in parts)
    loss, summed = next(sums), {name: next(sums) for name in metrics}
    loads = [replace(stats, load=next(sums), dropped=next(sums)) for stats in result.loads]
    return StepResult(loss, {**summed}, loads, result.work), next(sums)


def matrix_noise(values: Tensor, noise: float, seed: int, spec: ShardSpec = REPLICATED, first: int = 0) -> Tensor:
    """Normal noise of `noise` times the deviation of each matrix; R' C, or E R' C for a stack, as `values`.

    The matrices of a stack have index `first` and following. Each is drawn from the seed and its index, on the
    CPU: the same noise whatever device the weights are on, and whichever of their rows and experts this rank holds.
    """
    stack = values if values.ndim > 2 else values.unsqueeze(0)
    start, rows = spec.rows(stack.shape[-2])
    whole, count = stack.double(), rows * stack.shape[-1]
    mean = spec.all_reduce(whole.sum((-2, -1), keepdim=True)) / count
    squares = spec.all_reduce((whole - mean).square().sum((-2, -1), keepdim=True))
    deviation = (squares / max(1, count - 1)).sqrt()  # E 1 1: that of each whole matrix
    draws = []
    for index in range(first, first + len(stack)):
        words = (index,) if values.ndim > 2 else ()
        generator = torch.Generator().manual_seed(derive_seed(seed, "matrix", *words))
        draw = torch.randn(rows, stack.shape[-1], generator=generator)
        draws.append(draw[start : start + stack.shape[-2]])
    draw = torch.stack(draws).to(values.device) * (noise * deviation.float())
    return draw.view(values.shape).to(values.dtype)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return the precision that `auto` means on a device; bf16-products on another one than a CPU is a ConfigError."""
    if precision == "bf16-products" and device.type != "cpu":
        raise ConfigError("loop.precision=bf16-products is for processors: on a GPU use bf16, or auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if capabilities(device).bf16 else "fp32"
    # bf16 for everything between the products too is slower on a CPU: see docs/benchmarks.md.
    return "bf16-products" if device.type == "cpu" and has_bf16() else "fp32"
