"""Candidates of the training benchmarks: model, optimizer and step, timed in turn on one device, and their parts."""

# Shapes: E experts, D width, F hidden, P first product

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.harness import Deadline, Timing, alternate
from openm6.ops.matmul import grouped_mm, matmul, pad_rows

Part = Callable[[], object]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Candidate:
    """A model, its optimizer, and one whole training step.

    parts: parts of a step to be timed alone (built on demand), each with its number of runs per step
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[], Tensor]
    parts: Callable[[], Mapping[str, tuple[int, Part]]]
    compilations: Callable[[], int] = lambda: 0
    recompiled: int = 0  # graphs compiled after the warm-up; must stay 0
    timing: Timing = field(default_factory=Timing)
    peak_bytes: int = 0

    def move(self, device: torch.device) -> None:
        """Move weights and optimizer state to a device; gradients are dropped."""
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(device)
        for state in self.optimizer.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    state[name] = value.to(device)


def take_turns(
    candidates: Mapping[str, Candidate], device: torch.device, turns: int, steps: int, deadline: Deadline
) -> None:
    """Measure time and peak memory of each candidate: per turn, three untimed steps and `steps` timed ones.

    On a GPU the others are in host memory, so that peaks of memory are separate.
    """
    for turn in range(turns):
        if turn and deadline.passed:
            return
        for candidate in candidates.values():
            candidate.move(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(3):
                candidate.step()
            known = candidate.compilations()
            found = alternate({"step": candidate.step}, steps, 0, deadline, device)["step"]
            candidate.recompiled += candidate.compilations() - known
            candidate.timing.seconds += found.seconds
            if device.type == "cuda":
                candidate.peak_bytes = max(candidate.peak_bytes, torch.cuda.max_memory_allocated(device))
                candidate.move(torch.device("cpu"))


def time_parts(candidate: Candidate, device: torch.device, deadline: Deadline) -> dict[str, float]:
    """Return milliseconds per step of each part, timed alone; `rest` is the whole step minus their sum."""
    candidate.move(device)
    found: dict[str, float] = {}
    for name, (times, part) in candidate.parts().items():
        timing = alternate({name: part}, 5, 2, deadline, device)[name]
        found[name] = 1000 * times * timing.median
    candidate.optimizer.zero_grad(set_to_none=True)
    # The sparse layer was timed whole, so routing is its time minus that of its products.
    found["routing"] = found.pop("sparse_layer") - found["expert_products"]
    found["rest"] = 1000 * candidate.timing.median - sum(found.values())
    if device.type == "cuda":
        candidate.move(torch.device("cpu"))
    return {name: round(value, 3) for name, value in found.items()}


def backward_of(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Part:
    """Return a call that runs `forward(x)` and its backward pass through x and the parameters."""
    leaf = x.detach().requires_grad_()
    upstream: list[Tensor] = []

    def call() -> None:
        y = forward(leaf)
        if not upstream:
            upstream.append(torch.ones_like(y))  # whole: grouped products cannot read an expanded gradient
        torch.autograd.grad(y, [leaf, *parameters], upstream, allow_unused=True)

    return call


def products_of(up: Tensor, down: Tensor, num_rows: int, multiply: Product = grouped_mm) -> Part:
    """Return a call of the two grouped products of a sparse layer and their gradients, with equal loads.

    up is E D P and down E F D, in any strides; multiply: the product of rows, weights and counts.
    """
    counts = torch.full((len(up),), num_rows // len(up), device=up.device)
    counts[-1] += num_rows - int(counts.sum())
    tensors = []
    for weight in (up, down):
        rows = torch.randn(num_rows, weight.shape[1], device=up.device, dtype=up.dtype, requires_grad=True)
        upstream = torch.randn(num_rows, weight.shape[2], device=up.device, dtype=up.dtype)
        tensors.append((rows, weight, upstream))

    def call() -> None:
        for rows, weight, upstream in tensors:
            torch.autograd.grad(multiply(rows, weight, counts), [rows, weight], upstream)

    return call


def own_products_of(up: Tensor, down: Tensor, num_rows: int) -> Part:
    """Return the same products as the sparse layer of OpenM6 computes them: on a CPU one expert after the other."""
    if not up.is_cpu:
        return products_of(up, down, num_rows)
    rows = pad_rows(-(-num_rows // len(up)), torch.float32)
    x, d_answer = torch.randn(rows, up.shape[1]), torch.randn(rows, down.shape[2])
    hidden, d_both = torch.randn(rows, down.shape[1]), torch.randn(rows, up.shape[2])

    @torch.no_grad()
    def call() -> None:
        for first, second in zip(up, down, strict=True):
            matmul(x, first.t())
            matmul(hidden, second.t())
            matmul(d_answer, second)
            matmul(hidden.t(), d_answer.t())
            matmul(d_both, first)
            matmul(x.t(), d_both.t())

    return call


def update_of(optimizer: torch.optim.Optimizer) -> Part:
    """Return a call that updates every parameter with constant gradients."""

    def call() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return call
