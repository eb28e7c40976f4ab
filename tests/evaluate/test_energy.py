"""The account of a run: by hand, as JSON, in the report, on the card and on the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from openm6.cli.use import print_energy
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import grid
from openm6.energy.tracker import EnergyTracker, WorkCount
from openm6.evaluate.report import card, report_html
from openm6.evaluate.results import EnergyAccount, read_account
from tests.evaluate.example_report import eval_report, facts, run_folder


def tracker() -> EnergyTracker:
    """1,000 J over 5,000 tokens: 900 in steps of two stages, 80 between, 20 repeated."""
    found = EnergyTracker(by_source={"nvml": 700.0, "estimate": 300.0}, between=80.0, repeated=20.0)
    work = {
        "modality": {"text": WorkCount(4, 3.0), "image_out": WorkCount(1, 1.0)},
        "task": {"text_to_image": WorkCount(5, 4.0)},
    }
    found.add_step("pseudo", 400.0, 3000, 2.0, work)
    found.add_step("real", 500.0, 2000, 2.0, work)
    return found


def account(pue: float = 1.0) -> EnergyAccount:
    return EnergyAccount(tracker(), grid("WLD"), pue, {"pseudo": (5.0, 3.0), "real": (3.0, 3.5)}, evaluation=10.0)


def run_of(path: Path) -> RunFolder:
    """A run with one checkpoint that holds the tracker, and a few lines."""
    run = RunFolder.open(path)
    run.write_config({"loop": {"energy": {"country": "FRA", "pue": 1.2}}})
    folder = run.checkpoints / "step-5"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"files": {}, "callbacks": {"meter": tracker().to_json()}}))
    lines = [
        {"step": 1, "loss": 5.0, "joules": 200.0, "stage": "pseudo"},
        {"step": 2, "loss": 3.0, "joules": 400.0, "stage": "pseudo"},
        {"step": 3, "loss": 3.0, "joules": 600.0, "stage": "real"},
        {"step": 5, "loss": 3.5, "joules": 1000.0, "stage": "real"},
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_figures_by_hand() -> None:
    one = account(pue=1.5)
    assert one.joules_per_token == 0.2
    assert one.of_gpt3 == pytest.approx(0.2 * 1.5 / 15.444)
    assert one.grams(3.6e6) == pytest.approx(481 * 1.5)
    assert one.joules_per_point("pseudo") == 200.0 and one.joules_per_point("real") is None
    content = one.to_json()
    assert content["stages"]["real"]["joules_per_1000_tokens"] == 250.0
    assert content["modalities"]["text"]["joules"] == pytest.approx(675.0)
    assert content["source"] == "nvml+estimate" and content["repeated_joules"] == 20.0


def test_a_run_is_read_with_its_own_grid_or_another(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    own = read_account(run)
    assert (own.grid.code, own.pue, own.losses["pseudo"]) == ("FRA", 1.2, (5.0, 3.0))
    other = read_account(run, "China", 1.0)
    assert other.grid.code == "CHN" and other.grams(1000.0) > own.grams(1000.0)
    with pytest.raises(ConfigError, match="no grid of country 'Atlantis'"):
        read_account(run, "Atlantis")


def test_a_run_that_was_not_metered_is_told(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (run.checkpoints / "step-5" / "state.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match="was not metered"):
        read_account(run)
    with pytest.raises(CheckpointError, match="there is no run at"):
        print_energy(tmp_path / "nothing", None, None, None)


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_energy(run_of(tmp_path / "run").path, None, None, tmp_path / "energy.json")
    page = " ".join(capsys.readouterr().out.split())
    for words in (
        "1 kJ for 5,000 tokens: 0.2 J per token",
        "France",
        "image_out",
        "loss over energy",
        "15.4 J per token",
    ):
        assert words in page
    assert json.loads((tmp_path / "energy.json").read_text())["country"] == "FRA"


def test_the_report_and_the_card_contain_it(tmp_path: Path) -> None:
    run, metered = run_folder(tmp_path), dataclasses.replace(facts(), energy=account())
    page = report_html(run, eval_report(), metered)
    section = page.split('id="energy"')[1].split("</section>")[0]
    assert "1 kJ for 5,000 tokens" in section and "By modality" in section
    assert section.index("<dt>text</dt>") < section.index("<dt>image out</dt>"), "the largest first"
    assert 'id="energy"' not in report_html(run, eval_report(), facts())
    text = card(eval_report(), metered)
    assert "1 kJ (0.2 J per token; read by nvml+estimate)" in text and "| task | metric |" in text
    assert "is not known" in card(eval_report(), facts())
