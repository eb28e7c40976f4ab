"""The benchmark of packing: what it compares, at a size of seconds, and that a cut leaves what was timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import packing
from benchmarks.packing import bench_packing, dense_text
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.ops.sequence import PADDING
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe, recipe_path

SMALL = [
    "packing.batch_size=2",
    "packing.seq_len=160",
    "model.overrides.num_layers=1",
    "modalities.text.vocab_size=400",
    "modalities.numbers.predictors=none",
]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packing.BATCHES, "cpu", 2)
    monkeypatch.setitem(packing.SIZES, "cpu", [])


def test_dense_rows_are_full_of_one_causal_text(tmp_path: Path) -> None:
    recipe, _ = read_recipe(recipe_path("demo"), SMALL)
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), torch.device("cpu"))
    first, second = dense_text(training, 2)
    assert list(first.groups) == ["text"] and first.tokens == training.tokens_per_step == 320
    assert (first.meta.example_id == 0).all() and not (first.meta.example_id == PADDING).any()
    assert torch.equal(first.meta.attn_order[0], torch.arange(1, 161, dtype=torch.int32))
    assert (first.groups["text"].weight > 0).all()
    # Texts go on from row to row.
    assert not torch.equal(first.groups["text"].arrays["ids"], second.groups["text"].arrays["ids"])


def test_both_are_told_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = bench_packing(0.5, tmp_path / "packing.json", SMALL)
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "packing.json").read_text()) == found
    packed, dense = found["packed"], found["dense_text"]
    assert dense["padding"] == 0 and dense["examples_per_row"] == 1 and dense["learned"] == 1
    assert 0 < packed["padding"] < 0.5 and packed["examples_per_row"] > 1 and packed["seconds_to_make_a_batch"] > 0
    assert found["ratio"] == pytest.approx(packed["tokens_per_second"] / dense["tokens_per_second"], abs=0.001)
    assert found["recompilations"] == 0


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="rose"):
        bench_packing(1.0, None, ["packing.rose=2"])
