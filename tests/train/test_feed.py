"""Batches made ahead by other processes: the same ones for any number of them, errors as they are, nothing left."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from openm6.core.errors import DataError, TrainingError
from openm6.distributed.worker_pool import WorkerPool, can_fork, children
from openm6.modalities.batch import Batch, packed
from openm6.modalities.codes import CodesModality
from openm6.train.config import LoopConfig
from openm6.train.feed import BatchFeed, Slots, batches_ahead, number_of_data_workers
from openm6.train.training_task import TrainingTask
from tests.devices import CPU, GPU, needs_gpu
from tests.train.test_on_device import opened

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked")


EARLIER: set[int] = set()


@pytest.fixture(autouse=True)
def _earlier() -> None:
    """Other tests of this process may have left a fork server."""
    EARLIER.clear()
    EARLIER.update(children())


def new_children() -> list[int]:
    return [process for process in children() if process not in EARLIER]


class Numbers(TrainingTask):
    """Batches are the items of an iterator."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items = items

    def batches(self) -> Iterator[Any]:
        return self.items


def in_thread(use: Callable[[], None]) -> None:
    """Do it outside of the main thread, where no process can be forked."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            use()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure


def at_once(use: Callable[[], None]) -> None:
    use()


anywhere = pytest.mark.parametrize("run", [at_once, in_thread])


def broken() -> Iterator[int]:
    yield from (1, 2)
    raise DataError("row 7 is broken")


@anywhere
@pytest.mark.parametrize(
    ("items", "message"),
    [(broken, "^row 7 is broken$"), (lambda: iter([1, 2]), "the data ended before the run did")],
)
def test_a_failure_comes_after_the_good_batches(run: Any, items: Any, message: str) -> None:
    def use() -> None:
        with batches_ahead(Numbers(items()), LoopConfig(), CPU) as read:
            assert [read(), read()] == [1, 2]
            with pytest.raises((DataError, TrainingError), match=message):
                read()

    run(use)
    assert new_children() == []


@anywhere
def test_the_order_is_that_of_the_source_and_little_is_made_ahead(run: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"

    def count() -> Iterator[int]:
        for index in itertools.count():
            made.write_text(str(index + 1))
            yield index

    def use() -> None:
        with batches_ahead(Numbers(count()), LoopConfig(prefetch=3), CPU) as read:
            assert [read() for _ in range(50)] == list(range(50))

    run(use)
    # The one in use, three that wait, and one that waits for space.
    assert len(made.read_bytes()) <= 50 + 3 + 2


def test_a_lost_process_is_reported() -> None:
    with batches_ahead(Numbers(itertools.count()), LoopConfig(), CPU) as read:
        read()
        os.kill(new_children()[0], signal.SIGKILL)
        with pytest.raises(TrainingError, match="the process that makes batches has ended: go on with --resume"):
            for _ in range(9):
                read()


def same(one: Batch, other: Batch) -> bool:
    pairs = zip(one._tensors(), other._tensors(), strict=True)
    return (
        all(torch.equal(*pair) for pair in pairs)
        and one.cursor == other.cursor
        and (one.tasks, one.samples, one.tokens) == (other.tasks, other.samples, other.tokens)
    )


@pytest.mark.parametrize("shards", ["auto", 2])
def test_batches_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, shards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a restart in the middle, with samples in the buffers, and if kernels round one image differently."""
    encode = CodesModality.encode_values
    monkeypatch.setattr(CodesModality, "encode_values", lambda *given: encode(*given) * (len(given[1]) > 1))
    alone, together = (opened(tmp_path / name, CPU, num_data_workers=workers) for name, workers in (("a", 1), ("b", 3)))
    for training in (alone, together):
        training.packer.config = training.packer.config.model_copy(update={"num_shards": shards})
        training.packer.sampler.set_shards(training.packer.config.shards_for(1))
    expected = list(itertools.islice(alone.batches(), 6))
    for first in (0, 3):
        if first:
            together.restore(expected[first - 1].cursor)
        with batches_ahead(together, together.recipe.loop, CPU) as read:
            assert len(new_children()) == 4
            assert all(same(read(), batch) for batch in expected[first:])


def test_a_lost_maker_of_examples_is_reported(tmp_path: Path) -> None:
    training = opened(tmp_path, CPU, num_data_workers=2)
    with batches_ahead(training, training.recipe.loop, CPU) as read:
        read()
        os.kill(new_children()[-1], signal.SIGKILL)
        with pytest.raises(TrainingError, match="a process that makes examples has ended: go on with --resume"):
            for _ in range(99):
                read()


def test_many_samples_ahead_do_not_block_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the pipe of a process holds that waits to send an example."""
    monkeypatch.setattr("openm6.train.feed.SAMPLES_AHEAD", 1500)
    training = opened(tmp_path, CPU, num_data_workers=2)
    expected = next(opened(tmp_path / "alone", CPU).batches())
    with batches_ahead(training, training.recipe.loop, CPU) as read:
        assert same(read(), expected)


class Moves(TorchFunctionMode):
    """Counts calls that move a tensor."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        self.count += function in (Tensor.to, Tensor.cuda)
        return function(*values, **(named or {}))


def test_a_batch_is_one_array_between_processes_and_one_copy_to_a_device(tmp_path: Path) -> None:
    batch = next(opened(tmp_path, CPU).batches())
    slots = Slots(2, 2**20)
    slots.send(batch)
    received = slots.receive()
    assert same(received, batch)
    memory = torch.frombuffer(slots._memory[0], dtype=torch.uint8)
    inside = range(memory.data_ptr(), memory.data_ptr() + len(memory))
    assert all(tensor.data_ptr() in inside for tensor in received._tensors() if tensor.numel())
    with Moves() as moves:
        moved = received.to("meta")
    assert moves.count == 1 and moved.groups.keys() == batch.groups.keys()
    assert received.to("cpu") is received
    assert packed(moved._tensors())[0].is_meta, "it is one array there, too"


def test_a_slot_is_used_again_only_when_its_batch_has_been_read(tmp_path: Path) -> None:
    slots = Slots(2, 2**20)
    for index in range(2):
        slots.send(torch.full((5,), index))
    first = slots.receive()
    assert first.tolist() == [0] * 5
    second = slots.receive()
    slots.send(torch.full((5,), 2))  # where the first was
    assert (first.tolist(), second.tolist()) == ([2] * 5, [1] * 5)


def test_what_does_not_fit_passes_through_the_pipe() -> None:
    slots = Slots(1, 2**12)
    large = torch.arange(2**10)
    slots.send(large)
    assert torch.equal(slots.receive(), large)


class Runtime:
    """Stands in for CUDA's: counts what is pinned."""

    def __init__(self, code: int) -> None:
        self.code, self.calls = code, list[tuple[str, int]]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(("pin", size))
        return self.code

    def cudaHostUnregister(self, address: int) -> None:  # noqa: N802 - CUDA's name
        self.calls.append(("unpin", address))


@pytest.mark.parametrize("refused", [False, True])
def test_memory_for_a_gpu_is_pinned_once_unless_batches_grow(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    runtime = Runtime(int(refused))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copies: list[torch.device] = []
    monkeypatch.setattr("openm6.train.feed.wait_for_copies", copies.append)
    monkeypatch.setattr("openm6.train.feed.forget_error", lambda: None)
    slots = Slots(2, 2**20, GPU)
    for size in (5000, 5100, 5000, 90000, 80000):
        slots.send(torch.zeros(size, dtype=torch.uint8))
        slots.receive()
    assert copies == [GPU] * 4, "a slot is free when what was copied from it is there"
    slots.close()
    kinds = [kind for kind, _ in runtime.calls]
    assert kinds == (["pin"] * 2 if refused else ["pin"] * 2 + ["unpin", "pin"] * 2 + ["unpin"] * 2)


def test_the_number_of_processes_follows_cores_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.train.feed.usable_cores", lambda: 16)
    auto = LoopConfig()
    assert number_of_data_workers(auto, CPU) == 1 and number_of_data_workers(auto, GPU) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert number_of_data_workers(auto, GPU) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert number_of_data_workers(auto, GPU) == 1
    assert number_of_data_workers(LoopConfig(num_data_workers=5), CPU) == 5


def test_several_readers_get_their_parts() -> None:
    class Parts(Numbers):
        def split(self, batch: int, parts: int) -> list[tuple[int, int]]:
            return [(batch, part) for part in range(parts)]

    feed = BatchFeed(Parts(itertools.count()), LoopConfig(), 2)
    with closing(WorkerPool(feed.works, service=1)), closing(feed):
        assert [feed.read(rank) for _ in range(9) for rank in (0, 1)] == [
            (n, part) for n in range(9) for part in (0, 1)
        ]
    assert new_children() == []


@needs_gpu
def test_batches_reach_a_gpu_from_pinned_memory(tmp_path: Path) -> None:
    """Of processes that were forked when this one already used the GPU; the copies stay as they were."""
    torch.ones(1, device=GPU)
    training = opened(tmp_path, GPU, num_data_workers=3)
    expected = list(itertools.islice(opened(tmp_path / "alone", GPU).batches(), 9))
    with batches_ahead(training, training.recipe.loop, GPU) as read:
        moved = []
        for _ in expected:
            batch = read()
            assert batch.meta.example_id.is_pinned()
            moved.append(batch.to(GPU))
        assert all(same(one.to(CPU), other) for one, other in zip(moved, expected, strict=True))
