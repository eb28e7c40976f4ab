"""Compiles every kernel for A100, H100 and B200 where none is at hand, and prints what each needs as JSON.

    python tests/compile_for_gpus.py

What the interpreter cannot see shows here: types that do not fit, too much shared memory, registers that spill.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.runtime.jit import KernelInterface

from openm6.kernels import cross_entropy, moe, optimizers
from openm6.optim.low_precision import LEVELS, SPARSE, STEPS

PACKAGE = Path(__file__).parent.parent / "openm6"

CAPABILITIES = (80, 90, 100)
WARP = 32  # threads
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HALF, WIDE, LONG, INT, BYTE, NUMBER = "*bf16", "*fp32", "*i64", "*i32", "*i8", "i32"
UNEVEN = "i32 "  # a number that need not be a multiple of 16: a width of 24 makes the compiler take another way

TILE = [optimizers.ROWS, optimizers.COLUMNS]


def adafactor_cases(number: str) -> dict[str, tuple[Any, list[Any], int]]:
    """The kernels of Adafactor with and without a momentum, for sizes that are multiples of 16 or not."""
    sums = [HALF, INT, WIDE, WIDE, WIDE, number, number, *TILE]
    means = [HALF, INT, *[WIDE] * 4, INT, number, number, number]  # gradient to num_columns
    levels = [8 if number == UNEVEN else 64, LEVELS, SPARSE, STEPS]
    name, warps = "uneven" if number == UNEVEN else "even", optimizers.WARPS
    cases: dict[str, tuple[Any, list[Any], int]] = {
        f"adafactor statistics, {name}": (optimizers.sums_kernel, sums, warps),
        f"adafactor int8, {name}": (optimizers.adafactor_int8_kernel, [BYTE, BYTE, *means, *levels, *TILE], warps),
    }
    for momentum in (False, True):
        values, weights, keys = (HALF, WIDE, INT) if momentum else (None, None, None)
        kind = f"{'momentum' if momentum else 'bf16'}, {name}"
        squares = [HALF, INT, values, weights, *sums[2:]]
        cases[f"adafactor sizes, {kind}"] = optimizers.squares_kernel, squares, warps
        update = [HALF, values, weights, keys, *means, *TILE]
        cases[f"adafactor update, {kind}"] = optimizers.adafactor_bf16_kernel, update, warps
    return cases


def adamw_case(dtype: Any, stochastic: bool) -> tuple[Any, list[Any], int]:
    """AdamW of 82 tensors at aligned addresses, all in one dtype."""
    values = [LONG, WIDE, NUMBER, *["fp32"] * 3, *[dtype] * 4, 128, 16, optimizers.BLOCK_ELEMENTS, stochastic]
    return optimizers.adamw_kernel, values, 8


# Kernel, types of its arguments in order (a number: a constant), warps. Sizes are those of the two H100 configurations.
KERNELS: dict[str, tuple[Any, list[Any], int]] = {
    "gather": (moe.gather_kernel, [HALF, LONG, HALF, NUMBER, 2048], 4),
    "sum of 2": (moe.sum_kernel, [HALF, LONG, HALF, NUMBER, 2, 2048], 4),
    "sum of 8": (moe.sum_kernel, [HALF, LONG, HALF, NUMBER, 8, 2048], 4),
    "swiglu": (moe.swiglu_gate_kernel, [HALF, WIDE, HALF, NUMBER, 1024], 4),
    "swiglu backward": (moe.swiglu_gate_backward_kernel, [HALF, WIDE, HALF, HALF, WIDE, NUMBER, 1024], 4),
    "count": (moe.count_kernel, [LONG, INT, NUMBER, NUMBER, 128, 256], 4),
    "slot": (moe.slot_kernel, [LONG, INT, LONG, LONG, NUMBER, NUMBER, 128], 4),
    "nll": (cross_entropy.nll_kernel, [HALF, LONG, WIDE, WIDE, NUMBER, 4096], 8),
    "adamw": adamw_case(tl.bfloat16, False),
    "adamw, stochastic": adamw_case(tl.bfloat16, True),
    "adamw fp32": adamw_case(tl.float32, False),
    "dequantize": (optimizers.dequantize_kernel, [BYTE, BYTE, HALF, NUMBER, STEPS, 64, 64], 4),
    **adafactor_cases(NUMBER),
    **adafactor_cases(UNEVEN),
}


def kernels_of_the_package() -> dict[str, JITFunction]:
    """Every kernel in `openm6` by its full name; a function that returns a value is a part of kernels, not one."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if "triton.language" not in path.read_text(encoding="utf-8"):  # without it there is no kernel
            continue
        module = importlib.import_module(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for name, value in vars(module).items():
            while isinstance(value, KernelInterface) and not isinstance(value, JITFunction):
                value = value.fn  # of an autotuner or a heuristic
            if isinstance(value, JITFunction) and value.__module__ == module.__name__ and not returns(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def returns(function: JITFunction) -> bool:
    """Whether it returns a value, which a kernel cannot."""
    return any(isinstance(node, ast.Return) and node.value for node in ast.walk(ast.parse(function.src)))


def without_case(kernels: dict[str, JITFunction]) -> list[str]:
    """Names of those that `KERNELS` does not compile."""
    covered = [kernel for kernel, _, _ in KERNELS.values()]
    return sorted(name for name, kernel in kernels.items() if not any(kernel is one for one in covered))


def compile_kernel(capability: int, kernel: Any, types: list[Any], warps: int) -> dict[str, Any]:
    """Threads, shared bytes, registers per thread, spilled bytes, and whether loads are 16 bytes wide."""
    names = kernel.arg_names
    signature = {
        name: kind.strip() if isinstance(kind, str) else "constexpr" for name, kind in zip(names, types, strict=True)
    }
    constants = {(place,): kind for place, kind in enumerate(types) if not isinstance(kind, str)}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(types)
        if isinstance(kind, str) and kind not in ("fp32", UNEVEN)
    }
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, WARP)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    ptx = compiled.asm["ptx"]
    wide = bool(re.search(r"(ld\.global|cp\.async)\S*(\.v4\.b32|\.v2\.b64|\.cg\.shared)|v8\.b32", ptx)) or "0x10" in ptx
    return {
        "threads": WARP * warps,
        "shared": compiled.metadata.shared,
        "wide": wide,
        **registers(compiled.asm["cubin"]),
    }


def registers(binary: bytes) -> dict[str, int]:
    """What `cuobjdump` says of a kernel's registers and of the stack they spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> int:
    compiled = {
        f"sm_{capability} {name}": compile_kernel(capability, *parts)
        for capability in CAPABILITIES
        for name, parts in KERNELS.items()
    }
    found = {"kernels": compiled, "without a case": without_case(kernels_of_the_package())}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
