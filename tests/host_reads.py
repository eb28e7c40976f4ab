"""Finds where a pass waits for its device: values that are read on the host, and copies that the host waits for.

A GPU has `torch.cuda.set_sync_debug_mode("error")`; this counts the same on a CPU, with the code that a GPU would run.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1] / "openm6"
READS = (
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc",
)  # fmt: skip
METHODS = {Tensor.tolist: "tolist", Tensor.numpy: "numpy", Tensor.cpu: "cpu"}
FACTORIES = {torch.tensor: "torch.tensor", torch.as_tensor: "torch.as_tensor"}


class HostReads:
    """While entered, counts waits in `found` by what they are and the line of the package that asks for them."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._modes = (_Calls(self), _Operations(self))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def add(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        if frames:
            where = Path(frames[-1].filename).relative_to(PACKAGE.parent)
            self.found[f"{what} at {where}:{frames[-1].lineno}"] += 1


class _Operations(TorchDispatchMode):
    """Operations whose result is a number on the host, or has a shape that depends on values."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        name = function.overloadpacket.__name__
        indices = values[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        # The places that a mask selects are counted on the host.
        if name in READS or any(isinstance(one, Tensor) and one.dtype == torch.bool for one in indices):
            self.reads.add(name)
        return function(*values, **(named or {}))


class _Calls(TorchFunctionMode):
    """Calls that copy between host and device and wait, which a CPU alone does not show."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function: Any, types: Any, values: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function in METHODS:
            self.reads.add(METHODS[function])
        elif function in FACTORIES and named.get("device") is not None:
            self.reads.add(FACTORIES[function])
        elif function is Tensor.to and not named.get("non_blocking", False) and _to_device(values[1:], named):
            self.reads.add("to(device)")
        return function(*values, **named)


def _to_device(values: tuple[Any, ...], named: dict[str, Any]) -> bool:
    return any(isinstance(one, torch.device | str) for one in (*values, named.get("device")))
