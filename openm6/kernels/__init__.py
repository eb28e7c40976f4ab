"""All Triton kernels, by subject, and the one rule that says where they run.

The modules import Triton, which is optional: import them inside a function that has asked `available`.
"""

from __future__ import annotations

import importlib.util

import torch

INSTALLED = importlib.util.find_spec("triton") is not None  # searches for the package without importing it


def available(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device; if not, the reference in plain torch does the work.

    Tests replace this function to run kernels on the CPU in Triton's interpreter.
    """
    return INSTALLED and device.type == "cuda"
