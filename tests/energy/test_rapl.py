"""RAPL as Linux shows it, on a copy of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from openm6.energy import processor as rapl
from openm6.energy.counter import CounterLostError


def zone(root: Path, folder: str, name: str, microjoules: int) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("65712999613\n")
    return path


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 900_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 500_000)
    zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def test_packages_and_memory_are_summed_once(powercap: Path) -> None:
    counters, has_memory, notes = rapl.open_packages(powercap)
    assert [counter.name for counter in counters] == ["intel-rapl:0 package-0", "intel-rapl:0:1 dram"]
    assert has_memory and notes == []


def test_microjoules_become_joules_and_wrap(powercap: Path) -> None:
    counter = rapl.open_packages(powercap)[0][0]
    assert counter.joules() == 0.0
    (powercap / "intel-rapl:0" / "energy_uj").write_text("3500000")
    assert counter.joules() == pytest.approx(2.5)


def test_a_zone_that_goes_away_is_lost(powercap: Path) -> None:
    counter = rapl.open_packages(powercap)[0][0]
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    with pytest.raises(CounterLostError):
        counter.joules()


def test_no_rapl_is_no_counter(tmp_path: Path) -> None:
    assert rapl.open_packages(tmp_path / "nothing") == ([], False, [])


def test_a_counter_only_root_may_read_is_named(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(zone: Path, name: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rapl, "RaplCounter", refuse)  # root, who may run the tests, reads everything
    counters, has_memory, notes = rapl.open_packages(powercap)
    assert counters == [] and not has_memory and "may not be read" in notes[0]
