"""The golden record holds: `pytest -m golden`, some minutes; not part of the usual suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.record import RUNS, STORE, differences, record

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_answers_are_those_of_the_record(name: str, tmp_path: Path) -> None:
    assert differences(record([name], tmp_path), json.loads(STORE.read_text(encoding="utf-8"))) == []
