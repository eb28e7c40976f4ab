"""The one door to the Triton kernels: whether they can run here, and their modules, imported when first needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None  # looks for the package, imports nothing


def runs_kernels(x: Tensor) -> bool:
    """Whether Triton can work on this tensor; where it cannot, the twin in plain torch does."""
    return TRITON and x.is_cuda


def kernels(name: str) -> Any:
    """The module of `openm6.ops.kernels` of that name."""
    return importlib.import_module(f"openm6.ops.kernels.{name}")
