"""All Triton kernels, by subject, and the rule that decides where they run.

The modules import Triton, which is optional: import them inside a function that has called `available`. Triton
launches on the thread's current GPU, so each launch is made under a guard of its tensors' device.
"""

from __future__ import annotations

import torch

from openm6.kernels.probe import capabilities


def available(device: torch.device) -> bool:
    """Whether kernels run on tensors of this device, else plain torch; tests replace it, for the interpreter."""
    return device.type == "cuda" and capabilities(device).no_kernels is None
