"""Streams of a device and the events by which they wait for one another; a CPU runs everything at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Event = Any  # None on a CPU, torch.cuda.Event on a GPU


class Stream:
    """Work that is done in the order in which it was enqueued; on a CPU at once, so that an event is always reached."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy."""
        target.copy_(source)

    def record_event(self) -> Event:
        """Return the event that is reached when everything enqueued so far is done."""

    def wait_event(self, event: Event) -> None:
        """Make everything enqueued from now on wait for an event of another stream."""

    def record_stream(self, tensor: Tensor) -> None:
        """Keep the tensor's memory from the allocator, once it is freed, until this stream is done with it."""

    def synchronize(self) -> None:
        """Return when everything is done."""


class CudaStream(Stream):
    """A stream of a GPU; None stands for whichever stream is current."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._own = device, stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record_event(self) -> Event:
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait_event(self, event: Event) -> None:
        if event is not None:
            self._stream.wait_event(event)

    def record_stream(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class Streams:
    """The three that offloading needs: for the blocks, and for the copies in each direction."""

    compute: Stream
    to_device: Stream
    to_host: Stream


def open_streams(device: torch.device) -> Streams:
    if device.type != "cuda":
        return Streams(Stream(), Stream(), Stream())
    own = (None, torch.cuda.Stream(device), torch.cuda.Stream(device))
    return Streams(*(CudaStream(device, stream) for stream in own))
