"""Data-parallel workers on the cores of one machine.

Workers are forked processes that share the weights and each step. A worker takes a part of the batch and runs the same
train step as a process alone or a distributed rank. Only the sum over ranks differs: gradients are summed in shared
memory, each parameter's by the worker that owns it, always in the same order, and the owner updates it.
`balance: aux` and `capacity_factor` act on each part, so with them the loss differs by more than the order of sums.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from openm6.core.device import usable_cores
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.worker_pool import WorkerPool, can_fork, share_model, shared_like
from openm6.optim.sharding import assign_owners
from openm6.train.config import LOOP_SECTION, LoopConfig
from openm6.train.feed import BatchFeed
from openm6.train.step import StepReport, TrainStep
from openm6.train.training_task import Batch, TrainingTask

COLLECT = "collect"
Value = TypeVar("Value")


def possible_workers(training: TrainingTask, config: LoopConfig) -> int:
    """Return how many processes may share a step; ConfigError if loop.num_processes is more, except on a GPU."""
    if any(not (parameter.is_cpu or parameter.is_meta) for parameter in training.model.parameters()):
        if config.num_processes not in ("auto", 1):  # of a run that began on a CPU
            get_log().info(f"loop.num_processes={config.num_processes} is for a CPU: this run goes on in one process")
        return 1
    # A stage replaces the weights, and offloading keeps them where other processes have no access.
    alone = config.stages is not None or config.offloaded
    possible = training.max_parts if can_fork() and not alone else 1
    if config.num_processes != "auto" and config.num_processes > possible:
        why = f"its batches make at most {possible} parts" if possible > 1 else "it runs in one process here"
        raise ConfigError(
            f"loop.num_processes={config.num_processes} is too many for this run, {why}: "
            f"set loop.num_processes to {possible}"
        )
    return possible


def number_of_workers(config: LoopConfig, possible: int, run: RunFolder) -> int:
    """Return how many processes share a step, of those `possible`; `auto` is resolved once, in config.yaml."""
    if config.num_processes != "auto":
        return min(config.num_processes, possible)
    written = run.read_config().get(LOOP_SECTION, {}).get("num_processes") if possible > 1 else 1
    if not isinstance(written, int):
        written = min(possible, usable_cores())
        run.set_config(LOOP_SECTION, "num_processes", written)
    return written


class Workers(ProcessGroupContext):
    """Forked processes as ranks of a train step: values pass through pipes to and from the first, not gradients."""

    shares_memory = True

    def __init__(self, training: TrainingTask, train_step: TrainStep, config: LoopConfig, size: int) -> None:
        share_model(training.model)
        self._train_step, self._feed = train_step, BatchFeed(training, config, size)
        self.size, self._parameters = size, train_step.parameters
        self.owner = assign_owners([parameter.numel() for parameter in self._parameters], size)
        self._sent = [shared_like(self._parameters) for _ in range(size)]  # rank -> gradients for others
        self._threads = torch.get_num_threads()
        train_step.ranks = self
        works = [partial(self._work, rank) for rank in range(1, size)]
        self._pipe: Connection | None = None  # of another process than the first, to it
        self._pool = WorkerPool([*works, *self._feed.works], service=len(self._feed.works))
        self._feed.keep_reader(0)
        torch.set_num_threads(1)  # the other cores are in use

    def close(self) -> None:
        """End the other processes; the train step is that of one process again."""
        self._train_step.ranks = ProcessGroupContext()
        torch.set_num_threads(self._threads)
        self._feed.close()
        self._pool.close()

    def read(self) -> Batch:
        return self._feed.read(self.rank)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        """Run `TrainStep.update` in all processes; `batch` is the part of this one."""
        self._pool.send((step, total))
        return self._train_step.update(batch, step, total)

    def collect(self) -> None:
        """Copy the whole optimizer state to this process, which saves it."""
        self._pool.send(COLLECT)
        for parts in self._pool.gather():
            for index, values in parts.items():
                tensors = {key: torch.from_numpy(value) for key, value in values.items()}
                tensors = {key: value.view(torch.bfloat16) if value.dtype == torch.int16 else value
                           for key, value in tensors.items()}  # fmt: skip
                self._train_step.optimizer.state[self._parameters[index]].update(tensors)

    def gather(self, value: Value) -> list[Value]:
        if self._pipe is not None:
            self._pipe.send(value)
            return self._pipe.recv()
        values = [value, *self._pool.gather()]
        self._pool.send(values)
        return values

    def all_reduce_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.from_numpy(np.sum(self.gather(tensor.numpy()), axis=0)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of the parameters that this worker owns, and drop those of the others."""
        present = [parameter.grad is not None for parameter in self._parameters]
        for parameter, owner, sent in zip(self._parameters, self.owner, self._sent[self.rank], strict=True):
            if owner != self.rank and parameter.grad is not None:
                sent.copy_(parameter.grad)
                parameter.grad = None
        everyone = self.gather(present)
        for index, parameter in enumerate(self._parameters):
            if self.owner[index] != self.rank:
                continue
            for rank, has in enumerate(everyone):
                if rank != self.rank and has[index]:
                    part = self._sent[rank][index]
                    parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        norms = [float(torch.linalg.vector_norm(p.grad)) for p in parameters if p.grad is not None]
        square = sum(self.gather(sum((norm**2 for norm in norms), 0.0)))
        return torch.tensor(math.sqrt(square), dtype=torch.float64)

    def barrier(self) -> None:
        self.gather(None)

    def _work(self, rank: int, pipe: Connection) -> None:
        """Take part in every step, in a process of its own."""
        self.rank, self._pipe = rank, pipe
        self._feed.keep_reader(rank)
        while True:
            message = pipe.recv()
            if message != COLLECT:
                self._train_step.update(self.read(), *message)
                continue
            state = self._train_step.optimizer.state
            pipe.send({
                # NumPy has no bf16.
                index: {key: (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
                        for key, value in state[parameter].items()}
                for index, parameter in enumerate(self._parameters)
                if self.owner[index] == rank and parameter in state
            })  # fmt: skip
