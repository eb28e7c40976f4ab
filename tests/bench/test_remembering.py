"""What the records of a small recipe leave in the memories of codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openm6.base.config import build
from openm6.base.run_folder import RunFolder
from openm6.bench import remembering
from openm6.bench.remembering import Watch
from openm6.train.multimodal import MultimodalJob
from openm6.train.recipe import MultimodalRecipe
from tests.train.tiny_recipe import tiny_recipe


def test_files_are_counted_once_and_pairs_know_whose_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembering, "EPOCHS", 5)
    recipe = tiny_recipe()
    recipe["sources"]["both"] = {"kind": "pairs", "left": "digits", "right": "spoken"}
    recipe["mixture"] = [
        {"source": "spoken", "task": "transcribe"},
        {"source": "spoken", "task": "speak"},
        {"source": "both", "task": "draw_sound"},
        {"source": "penguins", "task": "predict_number"},
    ]
    checked = build(MultimodalRecipe, recipe, "tiny")
    watch = Watch(MultimodalJob(checked, RunFolder.open(tmp_path), torch.device("cpu")))
    small = "sound.durations"  # a number for each recording
    assert set(watch.limits) == {"image.recall", "sound.recall", "sound.heard", small}
    assert {limit for name, limit in watch.limits.items() if name != small} == {64.0 * 2**20}
    heard = watch.count(0)
    assert set(heard) - {small} == {"sound.heard"} and heard["sound.heard"].variants == 1.0
    assert (heard["sound.heard"].origin, heard["sound.heard"].files) == ("spoken", 20)
    spoken = watch.count(1)
    assert set(spoken) - {small} == {"sound.recall"} and 1.0 < spoken["sound.recall"].variants <= 5.0
    assert spoken["sound.recall"].bytes == 30 * 4 * 2  # places of 40 ms in 1.2 s, codes a place, bytes of one
    drawn = watch.count(2)
    assert set(drawn) - {small} == {"image.recall", "sound.heard"}
    assert (drawn["sound.heard"].origin, drawn["image.recall"].origin) == ("spoken", "both")
    assert watch.count(3) == {}
