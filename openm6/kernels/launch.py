"""Kernels that are launched on the GPU of their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton


def kernel(function: Callable[..., None]) -> Any:
    """As `triton.jit`, of a function whose first argument is a tensor; Triton launches on the thread's current GPU."""
    jitted: Any = triton.jit(function)
    run = jitted.run

    def run_on_its_device(*args: Any, **named: Any) -> Any:
        with torch.cuda.device_of(args[0]):
            return run(*args, **named)

    jitted.run = run_on_its_device
    return jitted
