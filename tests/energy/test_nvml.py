"""NVML through a stand-in for its library."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from openm6.energy import meter as devices

UUIDS = ["GPU-aaaa", "GPU-bbbb"]


class Driver:
    """Two boards; the second is too old to have an energy counter."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules, self.power, self.mig = 5_000, 70_000, 0

    def calls(self) -> SimpleNamespace:
        def energy(handle: int) -> int:
            if handle == 1:
                raise self.NVMLError("Not Supported")
            return self.millijoules

        def mig(handle: int) -> tuple[int, int]:
            if handle == 1:
                raise self.NVMLError("Not Supported")
            return self.mig, self.mig

        def by_uuid(uuid: str) -> int:
            if uuid not in UUIDS:
                raise self.NVMLError("Not Found")
            return UUIDS.index(uuid)

        return SimpleNamespace(
            NVMLError=self.NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetHandleByUUID=by_uuid,
            nvmlDeviceGetName=lambda handle: ["V100", "P100"][handle],
            nvmlDeviceGetUUID=lambda handle: UUIDS[handle],
            nvmlDeviceGetMigMode=mig,
            nvmlDeviceGetTotalEnergyConsumption=energy,
            nvmlDeviceGetPowerUsage=lambda handle: self.power,
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(devices, "pynvml", fake.calls())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return fake


def test_a_board_with_a_counter_and_one_without(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    counters = devices.open_gpus(None)
    assert [(counter.name, counter.source) for counter in counters] == [
        ("GPU 0 V100", "nvml"),
        ("GPU 1 P100", "estimate"),
    ]
    assert caplog.messages == []
    driver.millijoules = 8_500
    assert counters[0].joules() == pytest.approx(3.5)
    assert counters[1].joules() >= 0


@pytest.mark.parametrize(
    ("visible", "names"), [("1", ["GPU 0 P100"]), ("GPU-b,0", ["GPU 0 P100", "GPU 1 V100"]), ("", [])]
)
def test_cuda_numbers_are_followed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, visible: str, names: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [counter.name for counter in devices.open_gpus(None)] == names


@pytest.mark.parametrize(
    ("uuids", "names"),
    [("bbbb aaaa", ["GPU 0 P100", "GPU 1 V100"]), ("a-slice of-mig", ["GPU 0 V100", "GPU 1 P100"])],
)
def test_the_fastest_is_the_first_of_cuda_and_not_of_nvml(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, uuids: str, names: list[str]
) -> None:
    found = [SimpleNamespace(uuid=word) for word in uuids.split()]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    assert [counter.name for counter in devices.open_gpus((0, 1))] == names


def test_a_driver_that_is_reloaded_drops_the_interval(driver: Driver) -> None:
    counter = devices.open_gpus((0,))[0]
    driver.millijoules = 10
    assert counter.joules() == 0.0
    driver.millijoules = 1_010
    assert counter.joules() == pytest.approx(1.0)


def test_a_number_that_is_not_there_is_told(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    assert devices.open_gpus((7,)) == []
    assert caplog.messages == ["GPU 7 is not counted: NVML does not show it"]


def test_a_slice_of_a_board_is_told_that_all_of_it_is_counted(driver: Driver, caplog: pytest.LogCaptureFixture) -> None:
    driver.mig = 1
    assert len(devices.open_gpus(None)) == 2
    assert caplog.messages == ["GPU 0 V100: MIG is on: the whole card is counted, not its slice"]


def test_no_driver_no_counter(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake = Driver()
    calls = fake.calls()

    def refuse() -> None:
        raise fake.NVMLError("Driver Not Loaded")

    calls.nvmlInit = refuse
    monkeypatch.setattr(devices, "pynvml", calls)
    assert devices.open_gpus(None) == devices.open_gpus(()) == []
    assert caplog.messages == []  # a machine may have no GPU
    assert devices.open_gpus((0,)) == []
    assert caplog.messages == ["GPUs are not counted in full: Driver Not Loaded"]
