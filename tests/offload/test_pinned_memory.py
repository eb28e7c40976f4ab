"""Host memory for offloaded sets: runs side by side, registered in segments that no copy straddles."""

from __future__ import annotations

import itertools
import logging
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.offload import pinned_memory as module
from openm6.offload.pinned_memory import PinnedArena, segments
from openm6.offload.weight_store import PAGE, RecordLayout
from openm6.optim.config import OptimizerConfig
from openm6.optim.rules import update_rule
from tests.devices import CPU, GPU, needs_gpu, on_each_device


def test_buffers_lie_next_to_each_other_and_keep_what_is_written() -> None:
    arena = PinnedArena([PAGE, 3 * PAGE, PAGE], pin=False)
    for number, run in enumerate(arena.buffers):
        run.fill_(number + 1)
    assert [int(run.sum()) for run in arena.buffers] == [PAGE, 6 * PAGE, 3 * PAGE]
    assert arena.buffers[1].data_ptr() - arena.buffers[0].data_ptr() == PAGE and arena.buffers[0].data_ptr() % PAGE == 0
    arena.close()


class Runtime:
    """A GPU's runtime that pins a number of segments and refuses the next."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.pinned = allowed, set[int]()

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if len(self.pinned) == self.allowed:
            return 2
        self.pinned.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.pinned.remove(address)
        return 0


def test_where_little_may_be_pinned_the_rest_works_unpinned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Runtime(allowed=1)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(module, "SEGMENT", 2 * PAGE)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (PAGE, PAGE))
    forgotten: list[bool] = []
    monkeypatch.setattr(module, "forget_error", lambda: forgotten.append(True))
    with caplog.at_level(logging.WARNING, logger="openm6"):
        arena = PinnedArena([PAGE] * 4, pin=True)
    assert "GiB be pinned (error 2, limit 3.81e-06 GiB)" in caplog.text and "ulimit -l" in caplog.text
    assert forgotten and len(runtime.pinned) == 1 and arena.buffers[0].data_ptr() in runtime.pinned
    arena.buffers[3].fill_(7)
    assert int(arena.buffers[3].sum()) == 7 * PAGE
    arena.close()
    assert not runtime.pinned


def flags_of(address: int) -> list[str]:
    """Flags of the mapping at an address, as `man 5 proc` lists them."""
    found: list[str] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(one, 16) for one in first.split("-"))
            inside = start <= address < end
        elif first == "VmFlags:" and inside:
            found = rest
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="flags of Linux")
@pytest.mark.parametrize("pin", [False, True])
def test_memory_may_have_huge_pages_and_no_fork_copies_it(pin: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(allowed=9))
    arena = PinnedArena([PAGE] * 4, pin)
    found = flags_of(arena.buffers[0].data_ptr())
    assert "dc" in found  # not copied on fork
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "hg" in found
    assert "sh" not in found  # shared memory would have small pages
    arena.close()


def test_memory_that_is_let_go_is_not_left_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(allowed=9)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    arena = PinnedArena([PAGE] * 4, pin=True)
    assert runtime.pinned
    del arena
    assert not runtime.pinned


def test_pieces_hold_whole_runs() -> None:
    assert segments([4, 4, 4, 4, 4], 8) == [(0, 8), (8, 8), (16, 4)]
    assert segments([12, 4], 8) == [(0, 12), (12, 4)]  # one run alone may be longer
    assert segments([], 8) == []


def test_a_record_is_dense_aligned_and_begins_with_what_is_read() -> None:
    layout = RecordLayout({"a": (4, 128), "b": (3, 8, 64)}, update_rule(OptimizerConfig(precision="int8-adafactor")))
    ends = sorted((start, start + slot.num_bytes) for _, slot, start in layout.entries)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ends))
    assert all(start % 256 == 0 for start, _ in ends) and layout.num_bytes % PAGE == 0
    read = [start + slot.num_bytes for _, slot, start in layout.entries if slot.name in ("weight", "exponent")]
    assert max(read) <= layout.read_bytes
    record = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(record)
    views["b"]["weight"].fill_(-1)
    assert int((record == 255).sum()) == 3 * 8 * 64 and views["b"]["row_var"].shape == (3, 8)
    assert layout.num_parameters == 4 * 128 + 3 * 8 * 64


@on_each_device
def test_an_arena_of_a_device_is_pinned_until_it_is_closed(device: torch.device) -> None:
    """On a GPU by its runtime, so that a copy on another stream may be asked for and waited for later."""
    arena = PinnedArena([PAGE, 3 * PAGE], pin=device != CPU)
    for number, run in enumerate(arena.buffers):
        assert run.is_pinned() == (device != CPU)
        run.fill_(number + 3)
    stream = torch.cuda.Stream(device) if device != CPU else None
    with torch.cuda.stream(stream):
        copies = [run.to(device, non_blocking=True) for run in arena.buffers]
    if stream is not None:
        stream.synchronize()
    assert [(len(copy), int(copy.min()), int(copy.max())) for copy in copies] == [(PAGE, 3, 3), (3 * PAGE, 4, 4)]
    arena.close()
    assert not any(run.is_pinned() for run in arena.buffers)


class Refusing:
    """The GPU's own runtime, which is asked for an impossible segment after the first."""

    def __init__(self) -> None:
        self.own: Any = torch.cuda.cudart()
        self.asked: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:  # noqa: N802
        self.asked.append(address)
        # No bytes are an invalid value, which the runtime also keeps as its last error.
        return self.own.cudaHostRegister(address, size if len(self.asked) == 1 else 0, flags)

    def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
        return self.own.cudaHostUnregister(address)


@needs_gpu
def test_after_a_refusal_of_the_runtime_kernels_and_copies_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = Refusing()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(module, "SEGMENT", 2 * PAGE)
    with caplog.at_level(logging.WARNING, logger="openm6"):
        arena = PinnedArena([PAGE] * 4, pin=True)
    assert "ulimit -l" in caplog.text and len(runtime.asked) == 2
    assert [run.is_pinned() for run in arena.buffers] == [True, True, False, False]
    arena.buffers[3].fill_(7)
    assert int(arena.buffers[3].to(GPU, non_blocking=True).sum()) == 7 * PAGE
    arena.close()
