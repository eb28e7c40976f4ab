"""Every Triton kernel compiles for A100, H100 and B200 where none is at hand: no spills, memory that exists."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SHARED_OF_A_MULTIPROCESSOR = 163 * 1024  # bytes that one program may take on an A100; later ones have 227 KiB
REGISTERS_OF_A_MULTIPROCESSOR = 65_536

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


# Compiles all, and then finds a kernel whose case is taken away.
PROGRAM = """
import compile_for_gpus as script
script.main()
del script.KERNELS["gather"]
print(script.without_case(script.kernels_of_the_package()))
"""


def printed(tmp_path: Path) -> str:
    """By a Python process of its own: where kernels are interpreted, none can be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(FOLDER), *sys.path])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.rstrip()


def test_every_kernel_compiles_for_each_gpu(tmp_path):
    compiled, _, without_case = printed(tmp_path).rpartition("\n")
    assert without_case == "['openm6.kernels.moe.gather_kernel']", "a kernel without a case is found"
    found = json.loads(compiled)
    assert found["without a case"] == [], "give each a line in KERNELS of compile_for_gpus.py"
    for name, needs in found["kernels"].items():
        assert needs["stack"] == 0, f"{name} spills registers"
        assert needs["shared"] < SHARED_OF_A_MULTIPROCESSOR, f"{name} asks for too much shared memory"
        if name.endswith("uneven"):  # widths that are no multiple of 16 work, but slowly
            continue
        # While one program waits for its loads, another computes.
        registers = needs["registers"] * needs["threads"]
        assert 2 * registers <= REGISTERS_OF_A_MULTIPROCESSOR, f"only one program of {name} fits a multiprocessor"
        if not name.endswith((" count", " slot")):
            assert needs["wide"], f"{name} moves less than 16 bytes at a time"
