"""A whole training step as one CUDA graph: the host sends one command where it sent hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from openm6.optim.adamw import AdamW


class CapturedStep:
    """Forward, backward and update of a step whose shapes never change, captured once and replayed.

    What does change from step to step (rate, count, seeds) is sent to the device by `AdamW.advance` before each replay.
    Where capturing fails, `note` says why and the steps run one operation at a time.
    """

    def __init__(self, loss: Callable[[], Tensor], optimizer: AdamW) -> None:
        self.compute, self.optimizer = loss, optimizer
        self.note = "captured"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._graph is None and self.note == "captured":
            self._capture()
        if self._graph is None:
            return self._plain()
        self.optimizer.advance()
        self._graph.replay()
        assert self._loss is not None
        return self._loss

    def forget(self) -> None:
        """Drops the graph: weights have moved to other places."""
        self._graph = self._loss = None

    def _plain(self) -> Tensor:
        loss = self.compute()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _capture(self) -> None:
        # Kernels are compiled and libraries opened on a stream of their own first: neither may happen in a capture.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._plain()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self.compute()
                loss.backward()
                self.optimizer.apply()
        except RuntimeError as error:
            self.note = f"not captured: {error}".splitlines()[0]
            self.optimizer.zero_grad(set_to_none=True)
            return
        # Gradients stay where the graph writes them; they are consumed within each replay.
        self._graph, self._loss = graph, loss.detach()
