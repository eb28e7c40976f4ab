"""The accounts add up, and shares follow the operations."""

from __future__ import annotations

import pytest

from openm6.base.energy.ledger import Account, Ledger, Share, sum_work


def test_a_step_is_charged_by_operations() -> None:
    ledger = Ledger(by_source={"nvml": 90.0, "estimate": 30.0}, between=15.0, repeated=5.0)
    work = {
        "modality": {"text": Share(30, 3e6), "image": Share(10, 1e6)},
        "task": {"caption": Share(40, 4e6)},
    }
    ledger.add_step("pseudo", 60.0, 40, 2.0, work)
    ledger.add_step("real", 40.0, 40, 2.0, work)
    assert ledger.modalities == {"text": Account(75.0, 60, 3.0), "image": Account(25.0, 20, 1.0)}
    assert ledger.tasks == {"caption": Account(100.0, 80, 4.0)}
    assert ledger.stages == {"pseudo": Account(60.0, 40, 2.0), "real": Account(40.0, 40, 2.0)}
    assert (ledger.joules, ledger.in_steps, ledger.tokens) == (120.0, 100.0, 80)
    assert ledger.joules == ledger.in_steps + ledger.between + ledger.repeated
    assert ledger.source == "nvml+estimate"


def test_a_ledger_survives_its_json() -> None:
    ledger = Ledger(by_source={"rapl": 3.0}, between=1.0)
    ledger.add_step("real", 2.0, 8, 0.5, {"modality": {"text": Share(8, 1.0)}})
    assert Ledger.from_json(ledger.to_json()) == ledger
    assert Ledger.from_json({}) == Ledger()


def test_work_without_operations_charges_nobody() -> None:
    ledger = Ledger()
    ledger.add_step("real", 2.0, 8, 0.5, {"modality": {"text": Share(8, 0.0)}})
    assert ledger.modalities["text"].joules == 0.0 and ledger.stages["real"].joules == pytest.approx(2.0)


def test_parts_of_a_step_are_summed() -> None:
    left = {"modality": {"text": Share(8, 1.0)}, "task": {"draw": Share(8, 1.0)}}
    right = {"modality": {"text": Share(2, 0.5), "image": Share(4, 4.0)}}
    assert sum_work([left, right]) == {
        "modality": {"text": Share(10, 1.5), "image": Share(4, 4.0)},
        "task": {"draw": Share(8, 1.0)},
    }
