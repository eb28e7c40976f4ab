"""Whether kernels can run in Triton's interpreter here."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

Version = tuple[int, int]


def reads_numpy(triton: Version, numpy: Version) -> bool:
    """Whether the interpreter of one version works with the arrays of another: loops of 3.6 fail from 2.4 on."""
    return triton >= (3, 7) or numpy < (2, 4)


def need_interpreter() -> None:
    """Skip a test that runs kernels on the CPU if they cannot be interpreted here: with a GPU they are compiled."""
    need_triton()
    if torch.cuda.is_available():
        pytest.skip("with a GPU, kernels are compiled")


def need_triton() -> None:
    """Skip a test that runs kernels on the GPU, or without one on the CPU, if they cannot run."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available() and not reads_numpy(_version("triton"), _version("numpy")):
        pytest.skip("the interpreter of triton 3.6 does not read numpy 2.4: take triton>=3.7 or numpy<2.4")


def _version(package: str) -> Version:
    major, minor = importlib.metadata.version(package).split(".")[:2]
    return int(major), int(minor)
