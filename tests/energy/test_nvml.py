"""NVML through a stand-in for its library."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from openm6.energy import meter as devices


class Driver:
    """Two boards; the second is too old to have an energy counter."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.millijoules, self.power = 5_000, 70_000

    def calls(self) -> SimpleNamespace:
        def energy(handle: int) -> int:
            if handle == 1:
                raise self.NVMLError("Not Supported")
            return self.millijoules

        def mig(handle: int) -> tuple[int, int]:
            raise self.NVMLError("Not Supported")

        return SimpleNamespace(
            NVMLError=self.NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: 2,
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetName=lambda handle: ["V100", "P100"][handle],
            nvmlDeviceGetUUID=lambda handle: ["GPU-aaaa", "GPU-bbbb"][handle],
            nvmlDeviceGetMigMode=mig,
            nvmlDeviceGetTotalEnergyConsumption=energy,
            nvmlDeviceGetPowerUsage=lambda handle: self.power,
        )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    fake = Driver()
    monkeypatch.setattr(devices, "pynvml", fake.calls())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_a_board_with_a_counter_and_one_without(driver: Driver) -> None:
    counters, notes = devices.open_gpus(None)
    assert [(counter.name, counter.source) for counter in counters] == [
        ("GPU 0 V100", "nvml"),
        ("GPU 1 P100", "estimate"),
    ]
    assert notes == []
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
    assert [counter.name for counter in devices.open_gpus(None)[0]] == names


def test_a_driver_that_is_reloaded_drops_the_interval(driver: Driver) -> None:
    counter = devices.open_gpus((0,))[0][0]
    driver.millijoules = 10
    assert counter.joules() == 0.0
    driver.millijoules = 1_010
    assert counter.joules() == pytest.approx(1.0)


def test_a_number_that_is_not_there_is_told(driver: Driver) -> None:
    counters, notes = devices.open_gpus((7,))
    assert counters == [] and notes == ["GPU 7 is not counted: NVML does not show it"]


def test_no_driver_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Driver()
    calls = fake.calls()

    def refuse() -> None:
        raise fake.NVMLError("Driver Not Loaded")

    calls.nvmlInit = refuse
    monkeypatch.setattr(devices, "pynvml", calls)
    assert devices.open_gpus(None) == ([], ["no GPU is counted: Driver Not Loaded"])
    assert devices.open_gpus(()) == ([], [])
