"""Which precision products run in: autocast's on a GPU, and on a processor bf16 for the large ones alone.

torch's autocast on a processor puts every product and what lies between them into bf16, and most of it becomes slower
there. `products_in_half` keeps all else in fp32: inputs are rounded to bf16, sums run in fp32 within the processor's
own instruction, and the product is rounded once. It holds for `linear`, the experts and the losses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

HALF = torch.bfloat16
_asked: ContextVar[bool] = ContextVar("products_in_half", default=False)


@contextmanager
def products_in_half(asked: bool = True) -> Iterator[None]:
    """Within it, large products of fp32 on a processor run in bf16; backward passes follow their forward pass."""
    before = _asked.set(asked)
    try:
        yield
    finally:
        _asked.reset(before)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that factors of x's products are to be rounded to: bf16 where that was asked for, else x's own."""
    return HALF if _asked.get() and x.is_cpu and x.dtype == torch.float32 else x.dtype


@functools.cache
def half_is_fast() -> bool:
    """Whether this processor multiplies bf16 by instructions of its own (AVX512-BF16 or AMX)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in asked)


def precision_now(kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Gives back, whenever it is called, the precision of this moment on a kind of device: for what runs again."""
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    half = _asked.get()

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            stack.enter_context(products_in_half(half))
            yield

    return again
