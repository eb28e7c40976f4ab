"""A step shared by processes on the cores of one machine: each takes a part of the batch, and of the update."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from openm6.base.energy.ledger import Work, sum_work
from openm6.base.errors import ConfigError
from openm6.base.run_folder import RunFolder
from openm6.nn.experts import RouterLoad
from openm6.optim.registry import set_rate
from openm6.optim.schedule import rate_factor
from openm6.parallel.crew import Crew, can_fork, usable_cores
from openm6.parallel.shared_memory import share_model, shared_like
from openm6.train.config import LOOP_SECTION, LoopConfig
from openm6.train.feed import Feed
from openm6.train.job import Batch, Job, StepResult
from openm6.train.step import StepReport, Updater, make_report, seed_everything

COLLECT, DONE = "collect", "done"
NORM_EPSILON = 1e-6  # as in torch's clip_grad_norm_


@dataclass(frozen=True)
class PartReport:
    """What one process tells of its part: plain numbers, and which parameters have a gradient."""

    loss: float
    tokens: int
    metrics: dict[str, float]
    loads: list[tuple[int, np.ndarray, float]]  # layer, load, dropped
    present: list[bool]
    work: Work = field(default_factory=dict)


def number_of_workers(job: Job, config: LoopConfig, run: RunFolder) -> int:
    """How many processes share a step; `auto` is settled once and written into the run's config.yaml.

    Raises:
        ConfigError: several are asked for, and this machine or this way of training cannot have them.
    """
    on_cpu = all(parameter.is_cpu for parameter in job.model.parameters())
    # A stage exchanges the weights themselves, and streaming keeps them elsewhere: other processes would not see it.
    alone = config.stages is not None or config.streamed
    possible = job.most_parts if can_fork() and on_cpu and not alone else 1
    if config.workers == "auto":
        if possible == 1:
            return 1
        written = run.read_config().get(LOOP_SECTION, {}).get("workers")
        if not isinstance(written, int):
            written = min(possible, usable_cores())
            run.set_config(LOOP_SECTION, "workers", written)
        return written
    if config.workers > possible:
        where = (
            f"its batches make at most {possible} parts" if possible > 1 else "it runs in one process here"
        )
        raise ConfigError(
            f"loop.workers={config.workers} is too many for this run, {where}: set loop.workers to {possible}"
        )
    return config.workers


class Team:
    """Gives a loop its batches and takes its steps, as `Prefetch` and `Updater` do, with several processes.

    Weights lie in shared memory. Each process finds the gradients of its part, and then sums those of the parameters
    that it owns, always in the same order, and moves them; what it knows of the optimizer's state is of these alone.
    """

    def __init__(self, job: Job, updater: Updater, config: LoopConfig, workers: int) -> None:
        self.job, self.updater, self.config = job, updater, config
        share_model(job.model)
        self.parameters = updater.parameters
        self.owner = deal([parameter.numel() for parameter in self.parameters], workers)
        self.sent = [shared_like(self.parameters) for _ in range(workers)]  # rank -> gradients for others
        self.rank = 0
        self._threads = torch.get_num_threads()
        self._feed = Feed(job, workers, config.prefetch)
        works = [partial(self._serve, rank) for rank in range(1, workers)]
        self._crew = Crew([*works, self._feed.serve], service=1)
        self._feed.keep(reader=0)
        torch.set_num_threads(1)  # the other cores are taken

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads)
        self._crew.close()

    def __iter__(self) -> Team:
        return self

    def __next__(self) -> Batch:
        return self._feed.read(0)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        """Train on the batch whose first part is `batch`, as step number `step`, the first being 1."""
        rate = self.config.optimizer.learning_rate * rate_factor(step, total, self.config.schedule)
        self._crew.send((step, rate))
        reports = [self._compute(batch, step, rate), *self._crew.gather()]
        present = [report.present for report in reports]
        self._crew.send(present)
        norm = math.sqrt(sum([self._sum(present), *self._crew.gather()]))
        result, tokens = combine(reports), sum(report.tokens for report in reports)
        report = make_report(step, tokens, rate, result, torch.tensor(norm))
        factor = min(1.0, (self.config.clip or math.inf) / (norm + NORM_EPSILON)) if report.applied else None
        self._crew.send(factor)
        self._apply(factor)
        self._crew.gather()
        if report.applied:
            self.job.after_step(result)
        return report

    def collect(self) -> None:
        """Brings the whole state of the optimizer into this process, where it is saved."""
        self._crew.send(COLLECT)
        state = self.updater.optimizer.state
        for parts in self._crew.gather():
            for number, values in parts.items():
                state[self.parameters[number]].update(
                    {key: torch.from_numpy(value) for key, value in values.items()}
                )

    def _serve(self, rank: int, pipe: Connection) -> None:
        """Life of another process of the team."""
        self.rank = rank
        self._feed.keep(reader=rank)
        while True:
            message = pipe.recv()
            if message == COLLECT:
                pipe.send(self._own_state())
                continue
            pipe.send(self._compute(self._feed.read(rank), *message))
            pipe.send(self._sum(pipe.recv()))
            self._apply(pipe.recv())
            pipe.send(DONE)

    def _compute(self, part: Batch, step: int, rate: float) -> PartReport:
        """Forward and backward; leaves the gradients of others' parameters where they can read them."""
        set_rate(self.updater.optimizer, rate)
        seed_everything(self.config.seed, "step", step, *((self.rank,) if self.rank else ()))
        with self.updater.autocast():
            result = self.job.loss(part)
        result.loss.backward()
        present = [parameter.grad is not None for parameter in self.parameters]
        mine, theirs = [], []
        for parameter, owner, sent in zip(self.parameters, self.owner, self.sent[self.rank], strict=True):
            if owner != self.rank and parameter.grad is not None:
                mine.append(parameter.grad)
                theirs.append(sent)
                parameter.grad = None
        if mine:
            torch._foreach_copy_(theirs, mine)
        return _part_report(result, part.tokens, present)

    def _sum(self, present: list[list[bool]]) -> float:
        """Adds all parts' gradients of the own parameters; gives the sum of their squares."""
        total = 0.0
        for number, parameter in enumerate(self.parameters):
            if self.owner[number] != self.rank:
                continue
            others = [
                self.sent[rank][number]
                for rank, has in enumerate(present)
                if rank != self.rank and has[number]
            ]
            for gradient in others:
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
            if parameter.grad is not None:
                total += float(torch.linalg.vector_norm(parameter.grad)) ** 2
        return total

    def _apply(self, factor: float | None) -> None:
        """Moves the own parameters by their gradients times `factor`; None skips the step."""
        optimizer = self.updater.optimizer
        if factor is not None:
            if factor < 1.0:
                torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], factor)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _own_state(self) -> dict[int, dict[str, np.ndarray]]:
        state = self.updater.optimizer.state
        return {
            number: {key: value.numpy() for key, value in state[parameter].items()}
            for number, parameter in enumerate(self.parameters)
            if self.owner[number] == self.rank and parameter in state
        }


def deal(sizes: list[int], ranks: int) -> list[int]:
    """The rank that owns each parameter: the largest first, each to the rank with the least so far."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        owner[number] = load.index(min(load))
        load[owner[number]] += sizes[number]
    return owner


def combine(reports: list[PartReport]) -> StepResult:
    """The result of a whole batch: parts are shares, which add up."""
    metrics: dict[str, float | Tensor] = {}
    for report in reports:
        for name, value in report.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + value
    none = torch.zeros(())
    loads = []
    for parts in zip(*(report.loads for report in reports), strict=True):
        load = torch.from_numpy(np.sum([part[1] for part in parts], axis=0))
        dropped = torch.tensor(math.fsum(part[2] for part in parts))
        loads.append(RouterLoad(parts[0][0], load, none, none, dropped, none))
    work = sum_work([report.work for report in reports])
    return StepResult(torch.tensor(math.fsum(report.loss for report in reports)), metrics, loads, work)


def _part_report(result: StepResult, tokens: int, present: list[bool]) -> PartReport:
    metrics = {name: float(value) for name, value in result.metrics.items()}
    loads = [(load.layer, load.load.numpy(), float(load.dropped)) for load in result.loads]
    return PartReport(float(result.loss.detach()), tokens, metrics, loads, present, result.work)
