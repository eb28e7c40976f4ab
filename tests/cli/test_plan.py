"""`openm6 plan` on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from openm6.cli.main import app
from openm6.cli.plan_page import in_time
from openm6.core.config import read_yaml
from openm6.core.run_folder import RunFolder
from openm6.energy.meter import EnergyConfig
from openm6.plan.measured import extrapolate
from openm6.plan.request import SHIPPED
from tests.plan.test_measured import MEASURED, TRIAL

runner = CliRunner(env={"COLUMNS": "200"})


def test_the_claim_on_the_command_line(tmp_path: Path) -> None:
    words = [
        "plan",
        "m6-10t",
        "--gpus",
        "512",
        "--gpu",
        "v100-32gb",
        "--days",
        "10",
        "--price",
        "1",
        "--json",
    ]
    done = runner.invoke(app, [*words, str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    page = (
        "10.05T",
        "GPUs at their rating: 40.6 MWh",
        "bottleneck: network",
        "122,880 US dollars",
        "Assumed:",
    )
    assert all(words in done.stdout for words in page)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["fits"] and content["energy"]["mwh_rated"] == pytest.approx(40.55, abs=0.01)
    assert content["cost_usd"] == 512 * 240


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("base", "base is a preset: name a recipe to measure it here, or a GPU with --gpu"),
        *(
            (f"demo {option}", "without --gpu the recipe is measured on this machine")
            for option in (
                "--sweep gpus", "--plot x.svg", "--price 2", "--activation-checkpointing-every 2", "--per-node 4",
                "--gpu-table mine.csv", "--batch 64", "--bytes 2", "--gpus 2", "--pseudo-fraction 0.5",
            )
        ),
        ("demo model.presett=nano", "presett"),
        ("", "name a preset or a recipe to plan"),
        ("base --gpu h100", "no GPU 'h100' in the table"),
        ("base --gpu t4 --country Atlantis", "no grid of country 'Atlantis'"),
        ("base --gpu t4 --tokens -1", "tokens=-1 must be a finite number above 0"),
        ("base --gpu t4 --plot x.svg", "--plot x.svg needs --sweep"),
        ("base --gpu t4 --sweep gpus --plot x.txt", "a file that ends in .svg, .png, .pdf"),
        ("base --gpu t4 --sweep gpus --plot none/x.svg", "--plot none/x.svg: there is no folder"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence(words: str, sentence: str) -> None:
    done = runner.invoke(app, ["plan", *words.split()])
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and sentence in done.stderr


@pytest.mark.parametrize("gpu", [["--gpu", "t4"], []])
def test_the_folder_of_a_run_is_planned_as_it_was_trained(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def measured(command: Sequence[str], *_: object) -> dict[str, Any]:
        commands.append([*command])
        extrapolated = extrapolate(TRIAL, MEASURED, None, None, EnergyConfig())
        return {**extrapolated, "model": "config"}

    monkeypatch.setattr("openm6.cli.plan_page.plan_measured", measured)
    run = RunFolder.open(tmp_path / "mine")
    run.write_config({**read_yaml(SHIPPED / "demo.yaml"), "packing": {"batch_size": 2, "seq_len": 64}})
    done = runner.invoke(app, ["plan", str(run.path), "loop.seed=3", *gpu, "--json", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    assert "mine on " in done.stdout and json.loads((tmp_path / "plan.json").read_text())["model"] == "mine"
    if gpu:
        assert "128 tokens" in done.stdout and not commands
    else:
        assert commands[0][-2:] == [str(run.config), "loop.seed=3"]


def test_times_have_a_unit_that_suits_them() -> None:
    times = {
        0.0123: "12.3 ms",
        0.9996: "1 s",
        99.96: "100 s",
        7080: "118 minutes",
        7.5e4: "20.8 hours",
        1e6: "11.6 days",
    }
    assert {seconds: in_time(seconds) for seconds in times} == times


def test_a_sweep(tmp_path: Path) -> None:
    words = ["plan", "base", "--gpu", "h100-80gb", "--gpus", "8", "--sweep", "bytes", "--json"]
    done = runner.invoke(app, [*words, str(tmp_path / "s.json")])
    assert done.exit_code == 0, done.output
    assert [row["value"] for row in json.loads((tmp_path / "s.json").read_text())] == [16, 12, 8, 4, 2, 1]
    assert "bottleneck" in done.stdout and "compute" in done.stdout
