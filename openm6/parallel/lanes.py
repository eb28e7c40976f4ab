"""Queues of work on a device, and the marks by which one waits for another; on a processor both are nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Mark = Any  # a moment in a lane; only lanes of its kind know what is in it


class Lane(Protocol):
    """Work that is done in the order in which it was given."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copies bytes, in turn."""

    def record(self) -> Mark:
        """The moment when all that was given so far will be done."""

    def wait(self, mark: Mark) -> None:
        """What is given from now on waits for that moment of another lane."""

    def hold(self, tensor: Tensor) -> None:
        """Keeps the tensor's memory from others, once it is let go, until this lane is done with it."""

    def finish(self) -> None:
        """Returns when all is done."""


class InlineLane:
    """Does everything at once, as a processor does; a mark is always past."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass

    def hold(self, tensor: Tensor) -> None:
        pass

    def finish(self) -> None:
        pass


class CudaLane:
    """A stream of a GPU; None stands for whichever stream is current."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._own = device, stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self) -> Mark:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            self._stream.wait_event(mark)

    def hold(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def finish(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class Lanes:
    """The three that streaming needs: where blocks run, where sets arrive, where they leave."""

    compute: Lane
    inward: Lane
    outward: Lane


def open_lanes(device: torch.device) -> Lanes:
    """Lanes for a device."""
    if device.type != "cuda":
        return Lanes(InlineLane(), InlineLane(), InlineLane())
    return Lanes(
        CudaLane(device, None),
        CudaLane(device, torch.cuda.Stream(device)),
        CudaLane(device, torch.cuda.Stream(device)),
    )
