"""Tests that run on the CPU everywhere, and again on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The logic of a test is shown on the CPU; what the GPU adds is its own kernels, streams and memory.
on_each_device = pytest.mark.parametrize(
    "device", [pytest.param(CPU, id="cpu"), pytest.param(GPU, id="cuda", marks=NEEDS_GPU)]
)


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that has no counterpart on a CPU."""
    for mark in NEEDS_GPU:
        test = mark(test)
    return test
