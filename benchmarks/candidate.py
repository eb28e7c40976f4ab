"""A model, its optimizer and a training step that take turns with another on one device, and parts of a step."""

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

    parts: pieces of a step to be timed alone (built when asked for), each with how often a step runs it
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
        """Weights and optimizer state to the device or away from it; gradients are dropped."""
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
    """Fills in each candidate's timing and peak memory: in each turn `steps` timed steps after three untimed ones.

    On a GPU the others are parked, so that each has the memory for itself and its peak is its own.
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
    """Milliseconds a step spends in each part, timed alone; `rest` is what the whole step has beyond their sum."""
    candidate.move(device)
    found: dict[str, float] = {}
    for name, (times, part) in candidate.parts().items():
        timing = alternate({name: part}, 5, 2, deadline, device)[name]
        found[name] = 1000 * times * timing.median
    candidate.optimizer.zero_grad(set_to_none=True)
    # The sparse layer was timed whole, so routing is what it does beside its products.
    found["routing"] = found.pop("sparse_layer") - found["expert_products"]
    found["rest"] = 1000 * candidate.timing.median - sum(found.values())
    if device.type == "cuda":
        candidate.move(torch.device("cpu"))
    return {name: round(value, 3) for name, value in found.items()}


def backward_of(forward: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Part:
    """A call that runs `forward(x)` and its backward pass through x and the parameters."""
    leaf = x.detach().requires_grad_()
    upstream: list[Tensor] = []

    def call() -> None:
        y = forward(leaf)
        if not upstream:
            upstream.append(torch.ones_like(y))  # whole: grouped products cannot read an expanded gradient
        torch.autograd.grad(y, [leaf, *parameters], upstream, allow_unused=True)

    return call


def products_of(up: Tensor, down: Tensor, num_rows: int, multiply: Product = grouped_mm) -> Part:
    """The two grouped products of a sparse layer and their gradients, every expert with as many rows.

    up is E D P and down E F D, in any strides; multiply: what makes a product of rows, weights and counts.
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
    """The same as our sparse layer makes them: on a processor expert after expert, with rows that fill pieces."""
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
    """One update of every parameter, with gradients that stay."""

    def call() -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return call
