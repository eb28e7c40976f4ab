"""The order of the tests, fleets of two and of four processes for several packages, and where kernels are tested."""

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

# Of several processes of tests, the first begins with these, and the others take over from the end of its list: those
# that share fleets come first, so that few processes start any, and all that take long come before what is short.
FIRST = (
    "distributed/test_kills", "distributed/test_stops", "distributed/test_launch", "distributed/",
    "checkpoint/test_sharded", "train/test_pseudo_to_real_ranks", "train/test_offloaded_ranks", "train/test_finish",
    "test_torch_internals", "train/test_workers", "train/test_loop", "train/test_multimodal.py", "test_examples",
    "api/", "test_demo_short", "hub/", "test_gpu_targets", "test_site", "evaluate/", "benchmarks/", "inference/",
)  # fmt: skip

OF_PREDICTORS = tuple(f"tests/train/test_{name}.py" for name in ("simple_predictors", "calibration", "multimodal_data"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put long tests first, and count those of kernels among those of the GPU where they run on one."""
    items.sort(key=_place)
    for item in items if torch.cuda.is_available() else ():
        if isinstance(item, pytest.Function) and "device" in item.fixturenames and _own_device(item):
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End fleets after the last test of a file.

    torch keeps meshes in caches, so the threads of their groups would wake a hundred times a second to the end of all
    tests: 35,000 changes of the running thread each second, a third of two cores.
    """
    for fleet in [*Fleet.running] if nextitem is None or nextitem.path != item.path else ():
        fleet.close()


def _place(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next((place for place, start in enumerate(FIRST) if path.startswith(start)), len(FIRST))


def _own_device(item: pytest.Function) -> bool:
    """Whether its device is the fixture's, not one of its parameters."""
    return "device" not in getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture(autouse=True)
def fast_predictors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give simple predictors a tenth of their steps: they would take most of a short training, and have own tests."""
    if not request.node.nodeid.startswith(OF_PREDICTORS):
        for name in ("STEPS", "MIN_STEPS"):
            monkeypatch.setattr(f"openm6.train.simple_predictors.{name}", 8)
        monkeypatch.setattr("openm6.train.multimodal_data.MAX_NETWORK_MINUTES", 0.1)


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
