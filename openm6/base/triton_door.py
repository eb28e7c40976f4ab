"""The one door to the Triton kernels: whether they can run here, and their modules, imported when first needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

TRITON = importlib.util.find_spec("triton") is not None  # looks for the package, imports nothing


def runs_kernels(x: Any) -> bool:
    """Whether Triton can work on this tensor; where it cannot, the twin in plain torch does."""
    return TRITON and bool(x.is_cuda)


def kernels(name: str) -> Any:
    """The module of a kernel by its room and name, as "ops.rows" for `openm6.ops.kernels.rows`."""
    room, _, file = name.partition(".")
    return importlib.import_module(f"openm6.{room}.kernels.{file}")
