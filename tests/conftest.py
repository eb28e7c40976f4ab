"""Fleets of two and of four processes for the tests of several packages, and where Triton kernels are tested."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by whomever

from openm6.core.device import resolve_device
from tests.distributed.fleet import Fleet
from tests.triton_interpreter import need_triton


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count the tests of kernels among those of the GPU where they run on one."""
    for item in items if torch.cuda.is_available() else ():
        if isinstance(item, pytest.Function) and "device" in item.fixturenames and _own_device(item):
            item.add_marker(pytest.mark.gpu)


def _own_device(item: pytest.Function) -> bool:
    """Whether its device is the fixture's, not one of its parameters."""
    return "device" not in getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one; else kernels run in Triton's interpreter, on the CPU."""
    need_triton()
    return resolve_device()


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two ranks."""
    fleet = Fleet(2, tmp_path_factory.mktemp("two") / "meeting")
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Four ranks."""
    fleet = Fleet(4, tmp_path_factory.mktemp("four") / "meeting")
    yield fleet
    fleet.close()
