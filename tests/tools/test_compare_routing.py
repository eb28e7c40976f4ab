"""The comparison of routings: what differs between its runs, what it finds in a folder, its results, and going on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError
from openm6.data.parquet import embedded_path
from openm6.models.presets import build_backbone
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path
from tools.compare_routing import folder_data, main, read_cells, summarise, with_routing

SMALL = [
    "packing.seq_len=256",
    "packing.batch_size=1",
    "loop.num_processes=1",
    "loop.held_out={every: 1, batches: 1}",
    "modalities.numbers.predictors=none",  # their time would be that of a training of ten minutes
]


def test_cells_differ_in_routing_balance_and_seed_alone() -> None:
    values = read_recipe(recipe_path("routing"), [])[1]
    for cell in read_cells(""):
        recipe = build(MultimodalRecipe, with_routing(values, cell, 7), cell)
        experts = build_backbone(recipe.model).experts
        assert experts is not None and experts.experts_per_token == 2
        assert (experts.top_k is None) == cell.startswith("prototypes")
        assert cell.endswith(f"/{experts.balance}") and recipe.loop.seed == 7
    assert len(read_cells("")) == 6
    with pytest.raises(ConfigError, match="choose from top_k/aux"):
        read_cells("top_k/luck")


def test_a_folder_gives_the_tasks_of_its_texts_and_images(tmp_path: Path) -> None:
    folder = tmp_path / "for-training"
    folder.mkdir()
    for name in ("emoji", "poems_zh", "espeak_digits"):
        for split in ("train", "test"):
            (folder / f"{name}-{split}.parquet").symlink_to(embedded_path(f"{name}-{split}"))
    sources, mixture = folder_data(folder)
    assert sources["emoji"]["test_path"] == str(folder / "emoji-test.parquet")
    assert set(sources) == {"emoji", "poems_zh"}  # audio clips are left out
    assert {part["task"] for part in mixture if part["source"] == "emoji"} == {
        "image_captioning",
        "text_to_image",
    }
    assert {part["task"] for part in mixture if part["source"] == "poems_zh"} == {
        "text_generation",
        "text_denoising",
    }
    assert sum(part["weight"] for part in mixture) == pytest.approx(2)
    with pytest.raises(ConfigError, match="check --data"):
        folder_data(tmp_path / "nothing")


def test_runs_see_the_same_tokens_and_are_taken_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--out", str(tmp_path), "--steps", "2", "--seeds", "1", *SMALL]
    main([*words, "--cells", "top_k/bias"])
    capsys.readouterr()
    before = (tmp_path / "top_k-bias-0" / "metrics.jsonl").stat().st_mtime_ns
    main([*words, "--cells", "top_k/bias,prototypes/none"])
    report = json.loads((tmp_path / "routing.json").read_text())
    assert json.loads(capsys.readouterr().out) == report["summary"]
    assert (tmp_path / "top_k-bias-0" / "metrics.jsonl").stat().st_mtime_ns == before
    first, second = report["runs"]
    assert [first["cell"], second["cell"]] == ["top_k/bias", "prototypes/none"]
    assert first["tokens"] == second["tokens"] > 0
    assert first["held_out"][-1]["loss"] != second["held_out"][-1]["loss"]
    assert len(second["expert_load_cv_at_end"]) == 3
    with pytest.raises(ConfigError, match="another recipe"):
        main(["--out", str(tmp_path), "--steps", "3", "--seeds", "1", *SMALL])


def test_differences_are_taken_within_a_seed() -> None:
    def run(cell: str, seed: int, loss: float) -> dict:
        return {
            "cell": cell,
            "seed": seed,
            "held_out": [{"step": 1, "tokens": 2, "loss": loss}],
            "expert_load_cv_at_end": [0.5],
        }

    runs = [run("top_k/bias", 0, 1.0), run("top_k/bias", 1, 2.0), run("prototypes/aux", 1, 2.5)]
    found = summarise(runs)["prototypes/aux"]
    assert found["minus_top_k/bias"]["loss"] == {"mean": 0.5, "deviation": None, "values": [0.5]}
    assert summarise(runs)["top_k/bias"]["held_out"]["loss"]["mean"] == 1.5
