"""The meter: sums by source, reads rarely, drops what is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from openm6.energy import meter as meter_file
from openm6.energy.meter import EnergyReading, Meter, Source, open_meter


class Ticking:
    """A counter that rises by one joule at each read, and dies after `life` reads."""

    errors = (OSError,)

    def __init__(self, source: Source, life: int = 1000) -> None:
        self.name, self.source, self.life = f"ticking {source}", source, life
        self.reads = 0

    def joules(self) -> float:
        if self.reads == self.life:
            raise OSError("unplugged")
        self.reads += 1
        return float(self.reads)


def meter(counters: Sequence[Ticking]) -> Meter:
    return Meter(counters)


def test_sources_are_summed_and_named_from_the_best() -> None:
    counters = [Ticking("estimate"), Ticking("nvml"), Ticking("nvml")]
    with meter(counters) as open_one:
        reading = open_one.joules(fresh=True)
    assert reading == EnergyReading({"nvml": 2.0, "estimate": 1.0})
    assert (reading.joules, reading.source) == (3.0, "nvml+estimate")


def test_a_span_holds_what_was_spent_inside() -> None:
    with meter([Ticking("rapl")]) as open_one:
        open_one.joules(fresh=True)
        with open_one.span() as span:
            pass
    assert (span.joules, span.source, span.by_source) == (1.0, "rapl", {"rapl": 1.0})


def test_a_lost_counter_keeps_its_sum_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with meter([Ticking("nvml", life=2), Ticking("rapl")]) as open_one:
        for _ in range(4):
            reading = open_one.joules(fresh=True)
        assert reading.by_source == {"nvml": 2.0, "rapl": 4.0}
    assert caplog.messages == ["ticking nvml is counted only in part: unplugged"]


def test_a_closed_meter_keeps_its_last_sum() -> None:
    counter = Ticking("nvml")
    open_one = meter([counter])
    open_one.close()
    assert open_one.joules(fresh=True).joules == open_one.joules(fresh=True).joules == counter.reads


def test_asking_often_reads_rarely() -> None:
    class Slow(Ticking):
        def joules(self) -> float:
            for _ in range(20_000):
                pass
            return super().joules()

    counter = Slow("nvml")
    with meter([counter]) as open_one:
        for _ in range(500):
            open_one.joules()
        assert counter.reads < 50


def test_this_machine_has_a_meter_that_never_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with open_meter(gpus=()) as open_one:
        first = open_one.joules(fresh=True)
        second = open_one.joules(fresh=True)
    assert 0 <= first.joules <= second.joules
    assert first.source in ("rapl", "rapl+estimate", "estimate")


def test_only_the_first_process_of_a_machine_counts_its_counters_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    with open_meter(gpus=()) as open_one:
        assert open_one.joules(fresh=True).source in ("", "estimate")
    monkeypatch.setattr(meter_file, "Meter", list)
    assert all(counter.name.startswith("processor") for counter in open_meter(gpus=()))
    monkeypatch.setattr(meter_file, "open_packages", lambda: ([Ticking("rapl")], True))
    assert open_meter(gpus=()) == []
