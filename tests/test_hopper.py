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


def test_every_kernel_compiles_for_an_h100(tmp_path):
    # In a process of its own: where kernels are interpreted, none can be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert len(found) >= 11
    for name, needs in found.items():
        assert needs["stack"] == 0, f"{name} spills registers"
        assert needs["shared"] < SHARED_OF_A_MULTIPROCESSOR, f"{name} asks for too much shared memory"
        if name not in ("count", "place"):
            assert needs["wide"], f"{name} moves less than 16 bytes at a time"
