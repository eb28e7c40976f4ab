"""`openm6 plan` as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def openm6(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "OPENM6_CACHE": str(cache), "COLUMNS": "200"}
    command = [sys.executable, "-m", "openm6", *words]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)


def test_the_claim_on_the_command_line(tmp_path: Path) -> None:
    words = ("m6-10t", "--gpus", "512", "--gpu", "v100-32gb", "--days", "10", "--price", "1")
    done = openm6("plan", *words, "--json", str(tmp_path / "plan.json"), cache=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in (
        "10.05T",
        "GPUs at their rating: 40.6 MWh",
        "bottleneck: network",
        "122,880 US dollars",
        "Assumed:",
    ):
        assert said in done.stdout
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["fits"] and content["energy"]["mwh_rated"] == pytest.approx(40.55, abs=0.01)
    assert content["cost_usd"] == 512 * 240


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("base",), "base is a preset: name a recipe to measure it here, or a GPU with --gpu"),
        *(
            (("demo", *option), "without --gpu the recipe is measured on this machine")
            for option in (
                ("--sweep", "gpus"),
                ("--plot", "x.svg"),
                ("--price", "2"),
                ("--activation-checkpointing-every", "2"),
                ("--per-node", "4"),
                ("--gpu-table", "mine.csv"),
                ("--batch", "64"),
                ("--bytes", "2"),
            )
        ),
        (("demo", "model.presett=nano"), "presett"),
        ((), "name a preset or a recipe to plan"),
        (("base", "--gpu", "h100"), "no GPU 'h100' in the table"),
        (("base", "--gpu", "t4", "--country", "Atlantis"), "no grid of country 'Atlantis'"),
        (("base", "--gpu", "t4", "--tokens", "-1"), "tokens=-1 must be above 0"),
    ],
)
def test_one_sentence_for_what_cannot_be(tmp_path: Path, words: tuple[str, ...], sentence: str) -> None:
    done = openm6("plan", *words, cache=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_a_sweep(tmp_path: Path) -> None:
    words = (
        "base",
        "--gpu",
        "h100-80gb",
        "--gpus",
        "8",
        "--sweep",
        "bytes",
        "--json",
        str(tmp_path / "s.json"),
    )
    done = openm6("plan", *words, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row["value"] for row in json.loads((tmp_path / "s.json").read_text())] == [16, 12, 8, 4, 2, 1]
