"""Values of GGUF tensors in plain NumPy, which share no code with ours or the `gguf` package."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes of 32 values


def dequantized(tensor: Any) -> np.ndarray:
    """The values of a tensor of the `gguf` package in fp32: plain ones, or blocks of a scale, a minimum and codes."""
    shape = tuple(int(size) for size in tensor.shape[::-1])
    kind, raw = tensor.tensor_type.name, np.ascontiguousarray(tensor.data).view(np.uint8)
    if kind in ("F32", "F16"):
        return raw.view({"F32": np.float32, "F16": np.float16}[kind]).astype(np.float32).reshape(shape)
    if kind == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    blocks = raw.reshape(-1, BLOCKS[kind])
    scale, codes = blocks[:, :2].copy().view(np.float16).astype(np.float32), blocks[:, 2:]
    if kind == "Q8_0":
        return (scale * codes.view(np.int8)).reshape(shape)
    minimum = -8 * scale
    if kind == "Q4_1":
        minimum, codes = codes[:, :2].copy().view(np.float16).astype(np.float32), codes[:, 2:]
    return (scale * np.concatenate([codes & 15, codes >> 4], 1) + minimum).reshape(shape)
