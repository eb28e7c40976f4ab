"""The uses add up, and shares follow the operations."""

from __future__ import annotations

import pytest

from openm6.energy.tracker import EnergyTracker, EnergyUse, WorkCount


def test_a_step_is_charged_by_operations() -> None:
    tracker = EnergyTracker(by_source={"nvml": 90.0, "estimate": 30.0}, between=15.0, repeated=5.0)
    work = {
        "modality": {"text": WorkCount(30, 3e6), "image": WorkCount(10, 1e6)},
        "task": {"caption": WorkCount(40, 4e6)},
    }
    tracker.add_step("pseudo", 60.0, 40, 2.0, work)
    tracker.add_step("real", 40.0, 40, 2.0, work)
    assert tracker.modalities == {"text": EnergyUse(75.0, 60, 3.0), "image": EnergyUse(25.0, 20, 1.0)}
    assert tracker.tasks == {"caption": EnergyUse(100.0, 80, 4.0)}
    assert tracker.stages == {"pseudo": EnergyUse(60.0, 40, 2.0), "real": EnergyUse(40.0, 40, 2.0)}
    assert (tracker.joules, tracker.in_steps, tracker.tokens) == (120.0, 100.0, 80)
    assert tracker.joules == tracker.in_steps + tracker.between + tracker.repeated
    assert tracker.source == "nvml+estimate"


def test_a_tracker_survives_its_json() -> None:
    tracker = EnergyTracker(by_source={"rapl": 3.0}, between=1.0)
    tracker.add_step("real", 2.0, 8, 0.5, {"modality": {"text": WorkCount(8, 1.0)}})
    assert EnergyTracker.from_json(tracker.to_json()) == tracker
    assert EnergyTracker.from_json({}) == EnergyTracker()


def test_work_without_operations_charges_nobody() -> None:
    tracker = EnergyTracker()
    tracker.add_step("real", 2.0, 8, 0.5, {"modality": {"text": WorkCount(8, 0.0)}})
    assert tracker.modalities["text"].joules == 0.0 and tracker.stages["real"].joules == pytest.approx(2.0)
