"""Work beside the loop's thread: batches made ahead, and data-parallel workers on the cores of one machine.

Workers are forked processes that share the weights and each step. A worker takes a part of the batch and runs the same
train step as a process alone or a distributed rank. Only the sum over ranks differs: gradients are summed in shared
memory, each parameter's by the worker that owns it, always in the same order, and the owner updates it.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from openm6.core.device import usable_cores
from openm6.core.errors import ConfigError, OpenM6Error, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.worker_pool import Failure, WorkerPool, can_fork, share_model, shared_like
from openm6.train.config import LOOP_SECTION, LoopConfig
from openm6.train.step import StepReport, TrainStep
from openm6.train.training_task import Batch, TrainingTask

COLLECT = "collect"
ENDED = "the data ended before the run did: batches() must go on for ever"
NORM_EPSILON = 1e-6  # as in torch's clip_grad_norm_
Item = TypeVar("Item")
Value = TypeVar("Value")


class Prefetch(Generic[Item]):
    """An iterator over `source` that stays up to `ahead` items in front; a failure in the thread is raised by `next`.

    The order is that of `source`, so nothing depends on timing.
    """

    def __init__(self, source: Iterator[Item], ahead: int) -> None:
        self._source = source
        self._ready: queue.Queue[Item | BaseException] = queue.Queue(maxsize=ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="openm6-batches", daemon=True)

    def __enter__(self) -> Prefetch[Item]:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)  # a thread stuck in a slow read is left to end with the program

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._put(item)  # a later call raises it again
            raise item
        return item

    def _fill(self) -> None:
        # For this thread alone: two pools of OpenMP threads on the same cores would wait for each other.
        torch.set_num_threads(1)
        try:
            for item in self._source:
                if not self._put(item):
                    return
            error: BaseException = TrainingError(ENDED)
        except BaseException as failure:  # raised again where the batch is asked for
            error = failure
        self._put(error)

    def _put(self, item: Item | BaseException) -> bool:
        """Return False if the reader has gone."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def number_of_workers(training: TrainingTask, config: LoopConfig, run: RunFolder) -> int:
    """Return the number of processes that share a step; `auto` is resolved once and written to the run's config.yaml.

    Raises:
        ConfigError: this machine or this kind of training cannot have as many as are set.
    """
    on_cpu = all(parameter.is_cpu for parameter in training.model.parameters())
    # A stage replaces the weights, and offloading keeps them where other processes have no access.
    alone = config.stages is not None or config.offloaded
    possible = training.max_parts if can_fork() and on_cpu and not alone else 1
    if config.num_processes == "auto":
        if possible == 1:
            return 1
        written = run.read_config().get(LOOP_SECTION, {}).get("num_processes")
        if not isinstance(written, int):
            written = min(possible, usable_cores())
            run.set_config(LOOP_SECTION, "num_processes", written)
        return written
    if config.num_processes > possible:
        why = f"its batches make at most {possible} parts" if possible > 1 else "it runs in one process here"
        raise ConfigError(
            f"loop.num_processes={config.num_processes} is too many for this run, {why}: "
            f"set loop.num_processes to {possible}"
        )
    return config.num_processes


class WorkerGroupContext(ProcessGroupContext):
    """The workers as ranks of a train step: values pass through pipes to the first and back, gradients in memory."""

    shares_memory = True

    def __init__(self, parameters: Sequence[Tensor], size: int) -> None:
        self.size, self.parameters = size, parameters
        self.owner = assign_owners([parameter.numel() for parameter in parameters], size)
        self._sent = [shared_like(parameters) for _ in range(size)]  # rank -> gradients for others
        self.pool: WorkerPool | None = None  # of the first rank
        self.pipe: Connection | None = None  # of another one, to the first

    def gather(self, value: Value) -> list[Value]:
        if self.pool is not None:
            values = [value, *self.pool.gather()]
            self.pool.send(values)
            return values
        assert self.pipe is not None
        self.pipe.send(value)
        received: list[Value] = self.pipe.recv()
        return received

    def all_reduce_tensor(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.from_numpy(np.sum(self.gather(tensor.numpy()), axis=0)))

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of the parameters that this worker owns, and drop those of the others."""
        present = [parameter.grad is not None for parameter in self.parameters]
        own, shared = [], []
        for parameter, owner, sent in zip(self.parameters, self.owner, self._sent[self.rank], strict=True):
            if owner != self.rank and parameter.grad is not None:
                own.append(parameter.grad)
                shared.append(sent)
                parameter.grad = None
        if own:
            torch._foreach_copy_(shared, own)
        everyone = self.gather(present)
        for index, parameter in enumerate(self.parameters):
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

    def clip(self, parameters: Sequence[Tensor], bound: float, norm: Tensor) -> None:
        factor = bound / (float(norm) + NORM_EPSILON)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if factor < 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)

    def barrier(self) -> None:
        self.gather(None)


class DataWorker:
    """A process that makes batches ahead and sends a part of each to `parts` readers; create it before they are forked.

    A thread would compete with the training for its interpreter lock and its core.
    """

    def __init__(self, training: TrainingTask, parts: int, ahead: int) -> None:
        self.training, self.ahead = training, ahead
        pairs = [multiprocessing.Pipe(duplex=False) for _ in range(parts)]
        self.readers = [reader for reader, _ in pairs]
        self.writers = [writer for _, writer in pairs]

    def read(self, part: int) -> Batch:
        """Return the next part of a batch.

        Raises:
            OpenM6Error: the error that making it failed with.
            TrainingError: the process that makes batches failed otherwise, or was killed.
        """
        try:
            item = self.readers[part].recv()
        except EOFError:
            raise TrainingError("the process that makes batches has ended: go on with --resume") from None
        if isinstance(item, OpenM6Error):
            raise item
        if isinstance(item, Failure):
            raise TrainingError(f"making a batch failed: {item.words}")
        batch: Batch = item
        return batch

    def serve(self, pipe: Connection) -> None:
        """Make batches until nobody reads them."""
        self.keep(reader=None)
        queues: list[queue.Queue[Any]] = [queue.Queue(self.ahead) for _ in self.writers]
        for waiting, writer in zip(queues, self.writers, strict=True):
            threading.Thread(target=_send, args=(waiting, writer), daemon=True).start()
        try:
            for batch in self.training.batches():
                for waiting, part in zip(queues, self.training.split(batch, len(queues)), strict=True):
                    waiting.put(part)
            queues[0].put(TrainingError(ENDED))
        except OpenM6Error as error:
            queues[0].put(error)
        except Exception as error:  # reported by the first reader, who ends the run
            queues[0].put(Failure(error))
        pipe.recv()  # until the pool is closed

    def keep(self, reader: int | None) -> None:
        """Close the ends of pipes that this process does not use: an open one hides that its owner has ended."""
        unused = [end for index, end in enumerate(self.readers) if index != reader]
        for end in [*unused, *(self.writers if reader is not None else ())]:
            end.close()


def _send(waiting: queue.Queue[Any], writer: Connection) -> None:
    try:
        while True:
            writer.send(waiting.get())
    except OSError:
        os._exit(0)  # no reader is left


class Workers:
    """Batches and train steps of several processes, with the methods of `Prefetch` and `TrainStep`."""

    def __init__(self, training: TrainingTask, train_step: TrainStep, config: LoopConfig, workers: int) -> None:
        share_model(training.model)
        self._train_step = train_step
        self._ranks = WorkerGroupContext(train_step.parameters, workers)
        self._threads = torch.get_num_threads()
        self._data = DataWorker(training, workers, config.prefetch)
        works = [partial(self._work, rank) for rank in range(1, workers)]
        self._pool = WorkerPool([*works, self._data.serve], service=1)
        self._ranks.pool = self._pool
        self._data.keep(reader=0)
        torch.set_num_threads(1)  # the other cores are in use

    def __enter__(self) -> Workers:
        self._train_step.ranks = self._ranks
        return self

    def __exit__(self, *failure: object) -> None:
        self._train_step.ranks = ProcessGroupContext()
        torch.set_num_threads(self._threads)
        self._pool.close()

    def __iter__(self) -> Workers:
        return self

    def __next__(self) -> Batch:
        return self._data.read(0)

    def update(self, batch: Batch, step: int, total: int | None) -> StepReport:
        """Train on the batch whose first part is `batch`, as step `step`, the first being 1."""
        self._pool.send((step, total))
        return self._train_step.update(batch, step, total)

    def collect(self) -> None:
        """Copy the whole optimizer state to this process, which saves it."""
        self._pool.send(COLLECT)
        state = self._train_step.optimizer.state
        for parts in self._pool.gather():
            for index, values in parts.items():
                state[self._ranks.parameters[index]].update(
                    {key: torch.from_numpy(value) for key, value in values.items()}
                )

    def _work(self, rank: int, pipe: Connection) -> None:
        """Take part in every step, in a process of its own."""
        self._ranks.rank, self._ranks.pipe = rank, pipe
        self._train_step.ranks = self._ranks
        self._data.keep(reader=rank)
        while True:
            message = pipe.recv()
            if message == COLLECT:
                pipe.send(self._own_state())
            else:
                self._train_step.update(self._data.read(rank), *message)

    def _own_state(self) -> dict[int, dict[str, np.ndarray]]:
        state = self._train_step.optimizer.state
        return {
            index: {key: value.numpy() for key, value in state[parameter].items()}
            for index, parameter in enumerate(self._ranks.parameters)
            if self._ranks.owner[index] == self._ranks.rank and parameter in state
        }


def assign_owners(sizes: list[int], ranks: int) -> list[int]:
    """Return the rank that owns each parameter: the largest first, each to the rank with the least so far."""
    load, owner = [0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += sizes[index]
    return owner
