"""Compiles every kernel for an H100 where none is at hand, and prints what each needs as JSON.

    python tests/compile_for_hopper.py

What the interpreter cannot see shows here: types that do not fit, too much shared memory, registers that spill.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from openm6.ops.kernels import activation, loss, plan, rows
from openm6.optim.kernels import adamw

HOPPER = GPUTarget("cuda", 90, 32)
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALF, WIDE, LONG, INT, NUMBER = "*bf16", "*fp32", "*i64", "*i32", "i32"

# Kernel, types of its arguments in order (a number: a constant), warps. Sizes are those of the two H100 configurations.
KERNELS: dict[str, tuple[Any, list[Any], int]] = {
    "gather": (rows.gather_kernel, [HALF, LONG, HALF, NUMBER, 2048], 4),
    "sum of 2": (rows.sum_kernel, [HALF, LONG, HALF, NUMBER, 2, 2048], 4),
    "sum of 8": (rows.sum_kernel, [HALF, LONG, HALF, NUMBER, 8, 2048], 4),
    "swiglu": (activation.forward_kernel, [HALF, WIDE, HALF, NUMBER, 1024], 4),
    "swiglu backward": (activation.backward_kernel, [HALF, WIDE, HALF, HALF, WIDE, NUMBER, 1024], 4),
    "count": (plan.count_kernel, [LONG, INT, NUMBER, NUMBER, 128, 256], 4),
    "place": (plan.place_kernel, [LONG, INT, LONG, LONG, NUMBER, NUMBER, 128], 4),
    "nats": (loss.nats_kernel, [HALF, LONG, WIDE, WIDE, NUMBER, 4096], 8),
    "adamw": (adamw.adamw_kernel, [HALF] * 4 + [WIDE, WIDE, LONG, NUMBER, *["fp32"] * 3, 2048, 0], 8),
    "adamw by chance": (
        adamw.adamw_kernel,
        [HALF] * 4 + [WIDE, WIDE, LONG, NUMBER, *["fp32"] * 3, 2048, 1],
        8,
    ),
    "adamw fp32": (adamw.adamw_kernel, [WIDE] * 4 + [WIDE, WIDE, LONG, NUMBER, *["fp32"] * 3, 2048, 0], 8),
}


def compile_kernel(kernel: Any, types: list[Any], warps: int) -> dict[str, Any]:
    """Shared bytes, registers a thread, spilled bytes, and whether loads are 16 bytes wide and products on wgmma."""
    names = kernel.arg_names
    signature = {
        name: kind if isinstance(kind, str) else "constexpr" for name, kind in zip(names, types, strict=True)
    }
    constants = {(place,): kind for place, kind in enumerate(types) if not isinstance(kind, str)}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types)
        if isinstance(kind, str) and kind != "fp32"
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    wide = (
        bool(re.search(r"(ld\.global|cp\.async)\S*(\.v4\.b32|\.v2\.b64|\.cg\.shared)|v8\.b32", ptx))
        or "0x10" in ptx
    )
    return {
        "shared": compiled.metadata.shared,
        "wide": wide,
        "wgmma": "wgmma" in ptx,
        **registers(compiled.asm["cubin"]),
    }


def registers(binary: bytes) -> dict[str, int]:
    """What `cuobjdump` says of a kernel's registers and of the stack they spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> int:
    sys.stdout.write(
        json.dumps({name: compile_kernel(*parts) for name, parts in KERNELS.items()}, indent=2) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
