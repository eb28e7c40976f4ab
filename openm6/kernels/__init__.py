"""All Triton kernels, by subject, and the rule that decides where they run.

The modules import Triton, which is optional: import them inside a function that has called `available`.
"""

from __future__ import annotations

import importlib.util

import torch

INSTALLED = importlib.util.find_spec("triton") is not None  # searches for the package without importing it


def available(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device; if not, plain torch is used.

    Tests replace this function to run kernels on the CPU in Triton's interpreter.
    """
    return INSTALLED and device.type == "cuda"
