"""Every Triton kernel compiles for an H100 also where none is at hand: no spills, shared memory that exists."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_for_hopper.py"
SHARED_OF_A_MULTIPROCESSOR = 227 * 1024  # bytes that one block of an H100 may take

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


def run(tmp_path: Path, *words: str | Path) -> str:
    """What a Python process of its own prints: where kernels are interpreted, none can be compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(SCRIPT.parent), *sys.path])
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    ran = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def test_every_kernel_compiles_for_an_h100(tmp_path):
    found = json.loads(run(tmp_path, SCRIPT))
    assert found["without a case"] == [], "give each a line in KERNELS of compile_for_hopper.py"
    for name, needs in found["kernels"].items():
        assert needs["stack"] == 0, f"{name} spills registers"
        assert needs["shared"] < SHARED_OF_A_MULTIPROCESSOR, f"{name} asks for too much shared memory"
        if name not in ("count", "slot") and not name.endswith("uneven"):
            assert needs["wide"], f"{name} moves less than 16 bytes at a time"


def test_a_kernel_without_a_case_is_found(tmp_path):
    program = """
import compile_for_hopper as script
del script.KERNELS["gather"]
print(script.without_case(script.kernels_of_the_package()))
"""
    assert run(tmp_path, "-c", program).strip() == "['openm6.kernels.moe.gather_kernel']"
