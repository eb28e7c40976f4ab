"""A layer of the decoder step, compiled ahead of time for a CPU and kept in a folder.

Half of the time of a small model's step lies between the products: in Python, in torch's dispatch and in operations on
a few hundred numbers. Compiled, a layer is one call, of five kernels beside the products. Weights, cache and state are
inputs, so one program serves all layers of a kind, and a model of the same sizes loads it in milliseconds.
"""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.files import replace_bytes
from openm6.core.log import get_log
from openm6.kernels.probe import failure_of

Program = Callable[[list[Tensor]], Sequence[Tensor]]
# Its code is part of a program.
PACKAGE = Path(__file__).parents[1]
CODE = ("inference/decode.py", "nn/attention.py", "nn/layers.py", "ops/int8.py", "ops/matmul.py", "ops/pointwise.py")
STATE = 7  # inputs before the weights: tokens, cosines, sines, lengths, mask, keys, values
MAX_ERROR = 0.05  # of a program, relative to the norm: of rounding to bf16 or int8, not of a wrong program
# Of this process, by what they depend on; None if one cannot be used.
_programs: dict[str, Program | None] = {}


def program_of(layer: nn.Module, inputs: list[Tensor], settings: str) -> Program | None:
    """Return a layer compiled for such inputs, loaded or compiled now if need be; None if that fails.

    It is for a single row, or any number from two on, and for any numbers of keys and of positions in a slot.
    """
    # What a program depends on: processor, threads, torch, code, sizes and precisions.
    sizes = [(str(part.dtype), part.shape if index >= STATE else None) for index, part in enumerate(inputs)]
    code = [(PACKAGE / name).read_bytes() for name in CODE]
    processor = platform.machine(), torch.cpu.get_capabilities(), torch.get_num_threads()
    parts = processor, torch.__version__, code, sizes, len(inputs[0]) == 1, settings
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    if digest not in _programs:
        reason = failure_of(partial(_prepare, digest, layer, inputs))
        if reason is not None:
            _programs[digest] = None
            get_log().warning(f"decoding runs uncompiled and slower: {reason}")
    return _programs[digest]


def _prepare(digest: str, layer: nn.Module, inputs: list[Tensor]) -> bool:
    """Load or compile a program; return whether its result is right."""
    # Not in a folder that all users share: programs are executed.
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path.home() / ".cache" / "openm6")
    path = folder / f"decode-{digest}.pt2"
    if not path.exists():
        get_log().info("a layer is compiled for decoding, which takes about half a minute, once")
        _compile(layer, inputs, path)
    # torch's compiler takes seconds to import: only compiled decoding needs it.
    from torch._inductor import aoti_load_package  # noqa: PLC0415

    # The package's own call sorts its inputs first, which takes longer than some layers.
    program = _programs[digest] = aoti_load_package(str(path)).loader.run
    pairs = zip(program(inputs), layer(*inputs), strict=True)
    return all(bool((one - other).norm() < MAX_ERROR * other.norm()) for one, other in pairs)


def _compile(layer: nn.Module, inputs: list[Tensor], path: Path) -> None:
    """Write a program to a file."""
    # As above.
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415

    row: Any = torch.export.Dim("rows", min=2, max=4096) if len(inputs[0]) > 1 else torch.export.Dim.STATIC
    keys, capacity = (torch.export.Dim(name, min=2, max=2**20) for name in ("keys", "capacity"))
    slot = {0: row, 1: capacity}
    state = (*[{0: row}] * 4, {0: row, 1: keys}, slot, slot)
    shapes = {"tensors": (*state, *[None] * (len(inputs) - STATE))}
    # Tensors of inference mode cannot be traced.
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        # A slot that is longer than the keys, lest both be taken for one number.
        examples = tuple(F.pad(part, (0, 0, 0, 0, 0, 1)) if part.dim() == 4 else part.clone() for part in inputs)
        traced = torch.export.export(
            layer, examples, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        found = aoti_compile_and_package(traced, package_path=f"{folder}/layer.pt2")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, Path(found).read_bytes())
