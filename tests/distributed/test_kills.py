"""A run killed while it trains and again while it saves ends as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm6.checkpoint.folder import list_checkpoints
from openm6.core.run_folder import RunFolder
from openm6.distributed.launch import launch
from tests.checkpoint.test_sharded import recipe_file, unbroken


@pytest.mark.slow
def test_killed_in_training_and_in_saving(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    launch([recipe, str(tmp_path)], 2, max_restarts=2, module="tests.distributed.killed_run")
    records, expected, _ = unbroken()
    losses = {line["step"]: line["loss"] for line in RunFolder(tmp_path).read_metrics() if "loss" in line}
    assert losses == pytest.approx(expected, rel=1e-4)
    assert [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")] == [
        "step-3",
        "step-6",
        "step-9",
    ]
    parts = [json.loads((tmp_path / f"seen-2-{rank}.json").read_text()) for rank in range(2)]
    for step in parts[0]:  # of the last attempt, which went on from step 3
        assert [tuple(r) for part in parts for r in part[step]] == records[int(step)]
    assert set(parts[0]) == {str(step) for step in range(4, 10)}
