"""The fused update against its plain twin, through Triton's interpreter; skipped where Triton is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.triton_interpreter import need_interpreter

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from openm6.optim.config import OptimizerConfig
from openm6.optim.rules import FactoredRule, Move, update_rule
from openm6.optim import factored_fused as fused

for tier in (2, 1):
    rule = update_rule(OptimizerConfig(bytes_per_parameter=tier))
    for shape in ((2, 40, 64), (33, 320)):
        values = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        stored = [{s.name: torch.empty(s.shape, dtype=s.dtype) for s in rule.slots(shape)} for _ in range(2)]
        for one in stored:
            rule.fill(one, values, 1)
        for step in range(3):
            gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
            if step == 1 and len(shape) == 3:
                gradient[1] = 0
            move = Move(0.003, 0.1, 77 + step, torch.tensor(step < 2))
            assert fused.available(gradient)
            before = stored[0]["weight"]._version
            rule.update(stored[0], gradient, move)
            assert stored[0]["weight"]._version > before  # so that autograd notices
            plain = type("Plain", (type(rule),), {"update_fused": lambda *rest: False})
            plain().update(stored[1], gradient, move)
        for name in stored[0]:
            a, b = (one[name].float() for one in stored)
            if name == "weight":
                differing = (a != b).float().mean().item()
                assert differing < 0.01, (tier, shape, differing)
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-12)
print("equal")
"""


def test_kernels_equal_their_plain_twin() -> None:
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    need_interpreter()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
