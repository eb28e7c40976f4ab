"""Benchmarks multitask and transfer: what they compare, at a size of seconds, and what a cut leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import multitask
from benchmarks.multitask import (
    EXAMPLES,
    TIME,
    Pairs,
    Score,
    bench_multitask,
    check_files,
    choose,
    loop_of,
    markdown,
    needed_sources,
    seed_interval,
)
from benchmarks.transfer import bench_transfer, read_steps, recipes
from openm6.core.errors import ConfigError

SMALL = [
    "model.overrides={hidden_size: 32, num_layers: 1, num_heads: 2, num_kv_heads: 1, head_dim: 16}",
    "packing.batch_size=1",
    "packing.seq_len=160",
    "modalities.text.vocab_size=400",
    "eval.records=4",
    "eval.answers=3",
    "eval.num_processes=1",
    "loop.num_processes=1",
]
TASKS = "word_translation,tabular_classification/penguins"


def bench(tmp_path: Path, seeds: int = 1) -> dict:
    return bench_multitask(
        "demo", TASKS, seeds, 1.0, 24, tmp_path / "points.png", tmp_path / "table.md", None, tmp_path / "m.json", SMALL
    )


def test_specialists_have_equal_examples_or_their_part_of_the_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    found = bench(tmp_path)
    assert json.loads(capsys.readouterr().out)["runs"] == json.loads((tmp_path / "m.json").read_text())["runs"]
    general, *specialists = found["runs"]
    names = ["word_translation/digits", "tabular_classification/penguins"]
    assert sorted(general["examples"]) == sorted(names) and general["steps"] == 24 and len(specialists) == 4
    by_kind = {kind: [run for run in specialists if run["run"].endswith(kind)] for kind in (EXAMPLES, TIME)}
    assert [run["steps"] for run in by_kind[TIME]] == [12, 12]
    for run in by_kind[EXAMPLES]:
        ((name, examples),) = run["examples"].items()
        assert examples == pytest.approx(general["examples"][name], rel=0.25, abs=12)
    compared = [(row["task"], row["kind"]) for row in found["comparison"]]
    assert sorted(compared) == sorted((name, kind) for name in names for kind in (EXAMPLES, TIME))
    assert all(row["interval"] is None and row["seeds"] == 1 for row in found["comparison"])
    assert (tmp_path / "points.png").stat().st_size > 5000
    assert len((tmp_path / "table.md").read_text().splitlines()) == 6


def test_a_cut_leaves_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(label, values, mixture, length, seed, folder) -> multitask.Trained:
        if seed == 1:
            raise multitask.signal.raise_signal(multitask.signal.SIGINT)
        scores = {multitask.name_of(one): Score("exact_match", "higher", 0.5 + 0.1 * len(mixture)) for one in mixture}
        return multitask.Trained(label, seed, folder, 6, 600, 1.0, dict.fromkeys(scores, 60), scores)

    monkeypatch.setattr(multitask, "train", trained)
    with pytest.raises(SystemExit):
        bench(tmp_path, seeds=3)
    found = json.loads((tmp_path / "m.json").read_text())
    assert found["cut_short"] == "stopped by Ctrl-C" and len(found["runs"]) == 5
    assert [row["advantage"] for row in found["comparison"]] == pytest.approx([0.1] * 4)


def test_advantages_are_signed_by_the_metric_and_have_an_interval_over_seeds() -> None:
    lower, higher = Pairs("a/b", TIME, "bits_per_code", "lower"), Pairs("c/d", TIME, "exact_match", "higher")
    lower.values, higher.values = [(5.0, 4.0), (5.2, 4.4), (4.8, 4.2)], [(0.4, 0.3)]
    rows = [lower.row(), higher.row()]
    assert rows[0]["advantage"] == pytest.approx(0.8) and rows[1]["advantage"] == pytest.approx(-0.1)
    # Student's t with two degrees of freedom: 4.303 standard errors of 0.2 / √3.
    assert rows[0]["interval"] == pytest.approx([0.8 - 4.303 * 0.2 / 3**0.5, 0.8 + 4.303 * 0.2 / 3**0.5], abs=1e-3)
    assert rows[1]["interval"] is None and seed_interval([0.1]) is None
    assert multitask.relative(rows[0])[0] == pytest.approx(0.16)
    assert "| bits per code | 5 | 4.2 | 0.8 (0.303 to 1.3) |" in markdown(rows, "specialist", "generalist")


def test_choice_of_tasks_sources_and_lengths() -> None:
    mixture = [{"task": "a", "source": "pairs"}, {"task": "b", "source": "left"}, {"task": "b", "source": "other"}]
    assert choose(mixture, "b") == mixture[1:] and choose(mixture, "a,b/left") == mixture[:2]
    with pytest.raises(ConfigError, match="no task 'c'"):
        choose(mixture, "c")
    with pytest.raises(ConfigError, match="at least two"):
        choose(mixture, "a")
    sources = {"left": {}, "right": {}, "other": {}, "pairs": {"left": "left", "right": "right"}}
    assert list(needed_sources(sources, mixture[:1])) == ["left", "right", "pairs"]
    loop = {"minutes": 5, "steps": "auto", "schedule": {"warmup_steps": 50}, "save_every": 9}
    assert loop_of(loop, {"steps": 20}, 2) == {"seed": 2, "steps": 20, "schedule": {"warmup_steps": 4}, "save_every": 9}
    assert loop_of(loop, {"minutes": 0.5}, 0)["minutes"] == 0.5
    # A specialist of a minute would else spend it on the warm-up of the recipe, or of a recipe that names none.
    timed = {"seed": 0, "steps": "auto", "minutes": 0.5, "schedule": {"warmup_steps": 8}}
    assert loop_of(loop, {"minutes": 0.5, "steps": 40.4}, 0) == {**timed, "save_every": 9}
    stopping = {"early_stopping_patience": 5}
    assert loop_of(stopping, {"steps": 50}, 0) == {"seed": 0, "steps": 50, "schedule": {"warmup_steps": 10}}


def test_an_image_that_cannot_be_drawn_is_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"end its name in \.png"):
        check_files(tmp_path / "points.txt", None)


def test_transfer_starts_from_a_run_and_from_nothing_with_its_shape(tmp_path: Path) -> None:
    general = bench_multitask("demo", TASKS, 1, 1.0, 2, None, None, tmp_path / "runs", None, SMALL)
    start = str(next((tmp_path / "runs").glob("generalist-0")))
    assert general["runs"][0]["steps"] == 2
    rows = [f"{['red', 'green'][row % 2]},{row % 2 + 0.01 * row:.2f},{row}" for row in range(60)]
    table = tmp_path / "leaves.csv"
    table.write_text("colour,size,number\n" + "\n".join(rows) + "\n", encoding="utf-8")
    small = ["packing.batch_size=1", "packing.seq_len=160", "loop.num_processes=1", "eval.num_processes=1"]
    found = bench_transfer(start, str(table), "colour", "2,3", 1, None, None, None, tmp_path / "t.json", small)
    kinds = [f"{kind}, {count} steps" for count in (2, 3) for kind in ("from nothing", "fine-tuned")]
    assert [run["run"] for run in found["runs"]] == kinds and [run["steps"] for run in found["runs"]] == [2, 2, 3, 3]
    assert {row["kind"] for row in found["comparison"]} == {"2 steps", "3 steps"}
    tuned, scratch = recipes(start, str(table), "colour")
    assert tuned["model"] == {"start": start} and scratch["model"]["overrides"]["hidden_size"] == 32
    assert tuned["mixture"] == scratch["mixture"]
    with pytest.raises(ConfigError, match="50,200"):
        read_steps("50,many")
