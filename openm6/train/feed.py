"""Batches made ahead by processes of their own, and the shared memory through which they reach the training.

One process packs batches. On a GPU, which trains faster, others make the examples for it. None of them uses a GPU.
"""

import io
import math
import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from openm6.core.device import usable_cores
from openm6.core.errors import OpenM6Error, TrainingError
from openm6.core.log import get_log
from openm6.data.mixture import DataShard, MixtureSampler, SampleIndex
from openm6.data.packing import Packer
from openm6.data.prepare import ExampleTransform
from openm6.distributed.worker_pool import ALIGNMENT, Work, WorkerPool, can_fork
from openm6.modalities.batch import PackedExample, wait_for_copies
from openm6.modalities.codes import encode_together
from openm6.offload.pinned_memory import forget_error
from openm6.train.config import LoopConfig
from openm6.train.training_task import Batch, TrainingTask

CPU = torch.device("cpu")
MAX_AUTO_WORKERS = 8  # that make examples: one process packs them, which limits what more would add
SAMPLES_AHEAD = 16  # of each data shard, that other processes make examples of
UNANSWERED = 64  # samples sent to one of them: more might fill its pipe while it waits to send an example itself
SLOT_BYTES = 2**24  # of the shared memory of a batch at least; untouched memory takes no space
TOKEN_BYTES = 2**13  # per token; a batch that needs more passes through a pipe
ENDED = TrainingError("the data ended before the run did: batches() must go on for ever")


@contextmanager
def batches_ahead(training: TrainingTask, config: LoopConfig, device: torch.device) -> Iterator[Callable[[], Batch]]:
    """Enter with a function that returns the next batch, valid until the next call. Processes make `prefetch` ahead; a
    thread does where none can be forked.
    """
    if can_fork():
        feed = BatchFeed(training, config, device=device)
        with closing(WorkerPool(feed.works, service=len(feed.works))), closing(feed):
            feed.keep_reader(0)
            yield feed.read
        return
    made, waiting = _made(training, 1), deque[Future[list[Any]]]()
    # One thread: two pools of OpenMP threads on the same cores would wait for each other.
    pool = ThreadPoolExecutor(1, "openm6-batches", partial(torch.set_num_threads, 1))

    def read() -> Batch:
        while len(waiting) <= config.prefetch:
            waiting.append(pool.submit(next, made, [ENDED]))
        return _checked(waiting.popleft().result()[0])

    try:
        yield read
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _made(training: TrainingTask, parts: int) -> Iterator[list[Any]]:
    """Yield the parts of each batch, and at last the error because of which there are no more."""
    error: OpenM6Error = ENDED
    try:
        for batch in training.batches():
            yield training.split(batch, parts) if parts > 1 else [batch]
    except Exception as found:
        error = _expected(found)
    yield [error]


def _expected(error: Exception) -> OpenM6Error:
    if isinstance(error, OpenM6Error):
        return error
    return TrainingError(f"making a batch failed: {type(error).__name__}: {error}")


def _checked(item: Any) -> Any:
    if isinstance(item, OpenM6Error):
        raise item
    return item


def number_of_data_workers(config: LoopConfig, device: torch.device) -> int:
    """Return how many processes make examples: on a CPU, which trains on all cores, the one that packs them is all."""
    if config.num_data_workers != "auto":
        return config.num_data_workers
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1 if device.type == "cpu" else max(1, min(MAX_AUTO_WORKERS, usable_cores() // ranks_here - 1))


class BatchFeed:
    """The functions of the processes that make batches, and the batches' way to one reader or several.

    Each of several readers gets its part of every batch. A process that uses the feed calls `keep_reader`, and closes
    by it the ends of pipes that are not its own: an open one hides that its owner has ended.
    """

    def __init__(
        self, training: TrainingTask, config: LoopConfig, readers: int = 1, device: torch.device = CPU
    ) -> None:
        self._training = training
        capacity = max(SLOT_BYTES, TOKEN_BYTES * -(-training.tokens_per_step // training.ranks.size))
        self._slots = [Slots(config.prefetch + 1, capacity, device) for _ in range(readers)]
        workers = number_of_data_workers(config, device) if training.packer is not None else 1
        # Of each process that makes examples: the end of the one that packs them, and its own.
        self._pipes = [multiprocessing.Pipe() for _ in range(workers if workers > 1 else 0)]
        producers = [partial(self._make_examples, index) for index in range(len(self._pipes))]
        self.works: list[Work] = [self._pack, *producers]

    def keep_reader(self, rank: int) -> None:
        """Prepare this process to read the batches, or the parts, of `rank`."""
        self._keep(self._slots[rank].reader)

    def read(self, rank: int = 0) -> Batch:
        """Return the next batch, or this reader's part of it, valid until the next call; or raise why there is none."""
        try:
            item = self._slots[rank].receive()
        except (EOFError, OSError):
            raise TrainingError("the process that makes batches has ended: go on with --resume") from None
        return _checked(item)

    def close(self) -> None:
        """Close this process's ends, by which the other processes end."""
        for slots in self._slots:
            slots.close()
        self._keep()

    def _pack(self, pipe: Connection) -> None:
        """Make batches until nobody reads them; the first reader gets an error."""
        own = [mine for mine, _ in self._pipes]
        self._keep(*own, *(slots.writer for slots in self._slots))
        packer = self._training.packer
        if own and packer is not None:
            packer.transform = ExamplesAhead(packer, own)
        for items in _made(self._training, len(self._slots)):
            for slots, item in zip(self._slots, items, strict=False):
                slots.send(item)
        pipe.recv()  # until the pool is closed

    def _make_examples(self, index: int, pipe: Connection) -> None:
        """Answer each sample with its example, or with the error instead."""
        own = self._pipes[index][1]
        self._keep(own)
        assert self._training.packer is not None
        transform = self._training.packer.transform
        while True:
            sample = own.recv()
            made: PackedExample | OpenM6Error
            try:
                with encode_together():  # codes are rounded as in the process that packs
                    made = transform(sample)
            except Exception as error:
                made = _expected(error)
            own.send((sample.global_index, made))

    def _keep(self, *own: Connection) -> None:
        ends = [end for pair in self._pipes for end in pair]
        for end in [*ends, *(end for slots in self._slots for end in (slots.reader, slots.writer))]:
            if end not in own:
                end.close()


class ExamplesAhead(ExampleTransform):
    """The transform of a packer for which other processes make the examples, of the same samples, sent to them ahead.

    A record is always sent to the same process, which may have cached parts of it.
    """

    def __init__(self, packer: Packer, workers: Sequence[Connection]) -> None:
        vars(self).update(vars(packer.transform))
        self._workers = workers
        self._waiting = [deque[SampleIndex]() for _ in workers]  # samples to be sent to each
        self._unanswered = [0] * len(workers)
        self._made: dict[int, PackedExample | OpenM6Error] = {}  # by global index of the sample
        self._ahead = MixtureSampler(self.sampler.components, self.sampler.seed)
        self._ahead.set_shards(self.sampler.num_shards, packer.rank, packer.size)
        self._ahead.restore(packer.state())
        self._shard_of = {sample.global_index: shard for shard in self._ahead.shards for sample in shard.buffer}
        for shard in self._ahead.shards:
            for sample in shard.buffer:
                self._send(sample)
            for _ in range(SAMPLES_AHEAD):
                self._send_next(shard)

    def __call__(self, sample: SampleIndex) -> PackedExample:
        try:
            self._send_next(self._shard_of.pop(sample.global_index))
            worker = self._worker_of(sample)
            while sample.global_index not in self._made:
                index, made = self._workers[worker].recv()
                self._made[index] = made
                self._unanswered[worker] -= 1
                self._send_waiting(worker)
        except (EOFError, OSError):
            raise TrainingError("a process that makes examples has ended: go on with --resume") from None
        return _checked(self._made.pop(sample.global_index))

    def _send_next(self, shard: DataShard) -> None:
        sample = self._ahead.take(shard)
        self._shard_of[sample.global_index] = shard
        self._send(sample)

    def _send(self, sample: SampleIndex) -> None:
        worker = self._worker_of(sample)
        self._waiting[worker].append(sample)
        self._send_waiting(worker)

    def _send_waiting(self, worker: int) -> None:
        while self._waiting[worker] and self._unanswered[worker] < UNANSWERED:
            self._workers[worker].send(self._waiting[worker].popleft())
            self._unanswered[worker] += 1

    def _worker_of(self, sample: SampleIndex) -> int:
        return sample.index % len(self._workers)


class Slots:
    """A pipe for batches whose arrays pass through slots of shared memory, of which those of the reader are views."""

    def __init__(self, count: int, capacity: int, device: torch.device = CPU) -> None:
        self.reader, self.writer = multiprocessing.Pipe()
        self._memory = [mmap.mmap(-1, capacity) for _ in range(count)]
        self._capacity, self._device = capacity, device
        self._free = deque(range(count))  # the writer's
        self._read: int | None = None  # the slot that the reader uses
        self._pinned: dict[int, tuple[int, int]] = {}  # slot -> address and size of what a GPU may copy from directly

    def send(self, item: Any) -> None:
        """Write an item into the next free slot, as soon as there is one."""
        head, buffers = io.BytesIO(), list[Any]()
        _Pickler(head, 5, True, lambda buffer: buffers.append(buffer.raw())).dump(item)
        while not self._free or self.writer.poll():
            self._free.append(self.writer.recv())
        slot, parts = self._free.popleft(), list[bytearray]()
        ends = list(accumulate((math.ceil(len(raw) / ALIGNMENT) * ALIGNMENT for raw in buffers), initial=0))
        if ends[-1] > self._capacity:
            parts = [bytearray(raw) for raw in buffers]
        else:
            for start, raw in zip(ends, buffers, strict=False):
                self._memory[slot][start : start + len(raw)] = raw
        self.writer.send((head.getvalue(), slot, [len(raw) for raw in buffers], parts))

    def receive(self) -> Any:
        """Return the next item, whose arrays are valid until the next call."""
        if self._read is not None:
            wait_for_copies(self._device)
            self.reader.send(self._read)
        head, self._read, sizes, parts = self.reader.recv()
        if not parts and sizes:
            ends = list(accumulate((math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
            self._pin(self._read, ends[-1])
            memory = memoryview(self._memory[self._read])
            parts = [memory[start : start + size] for start, size in zip(ends, sizes, strict=False)]
        return ForkingPickler.loads(head, buffers=parts)

    def close(self) -> None:
        """Let a GPU forget the memory."""
        with suppress(RuntimeError):  # a GPU that is gone
            wait_for_copies(self._device)
        for address, _ in self._pinned.values():
            if address:
                torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned.clear()

    def _pin(self, slot: int, size: int) -> None:
        """Let a GPU copy the first `size` bytes of a slot without the processor; some more, as batches differ."""
        address, pinned = self._pinned.get(slot, (0, 0))
        if self._device.type != "cuda" or size <= pinned:
            return
        runtime: Any = torch.cuda.cudart()
        if address:
            runtime.cudaHostUnregister(address)
        size = min(self._capacity, math.ceil(1.25 * size / mmap.PAGESIZE) * mmap.PAGESIZE)
        address = torch.frombuffer(self._memory[slot], dtype=torch.uint8).data_ptr()
        self._pinned[slot] = address, size
        if code := int(runtime.cudaHostRegister(address, size, 0)):
            self._pinned[slot] = 0, self._capacity  # not to be tried again
            forget_error()
            get_log().warning(f"the system lets no memory of batches be pinned (error {code}): copies are slower")


class _Pickler(ForkingPickler):
    """Pickles tensors as arrays: torch would open a file for each."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented
