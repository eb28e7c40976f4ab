"""The demo in small: trained by a program of its own, as by a person; then a report, and an answer of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from openm6.cli.main import app
from tests.data.sample_images import png, wav

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "loop.steps=8",
    "loop.minutes=0.1",  # little time for boosted trees
    "loop.save_every=8",
    "packing.batch_size=2",
    "eval.records=4",
    "eval.answers=2",
    "eval.drawn=2",
    "eval.samples=1",
    "eval.decoding.steps=2",
]
# Fewer records, or the tokenizer takes the time; as many as hold every answer of the closed tasks.
LIMITS = {"avatars": 60, "digits": 60, "spoken": 400, "questions": 60}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo was trained, with an image and a recording at hand."""
    found = tmp_path_factory.mktemp("demo")
    limits = [f"sources.{name}.limit={limit}" for name, limit in LIMITS.items()]
    command = [sys.executable, "-m", "openm6", "train", "demo", *SETTINGS, *limits, "--out", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=found, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "8 steps" in done.stdout
    (found / "a.png").write_bytes(png(side=40))
    (found / "a.wav").write_bytes(wav(seconds=0.4))
    return found


@pytest.fixture
def openm6(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command line, standing in the folder."""
    monkeypatch.chdir(folder)
    return lambda *words: CliRunner().invoke(app, words)


def test_a_report_is_written(folder: Path) -> None:
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    assert report["steps"] == 8 and len(report["tasks"]) >= 16
    pairs = {(task["input_modality"], task["output_modality"]) for task in report["tasks"].values()}
    assert len(pairs) == 16, "all pairs of modalities"
    closed = {name: task for name, task in report["tasks"].items() if task["answer_entropy"] is not None}
    assert {
        "image_classification/digits",
        "speech_recognition/spoken",
        "tabular_classification/penguins",
    } <= set(closed)
    for name, task in closed.items():
        low, _ = task["information_ci"]
        assert low <= task["answer_entropy"], name
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")


def test_an_image_is_drawn(folder: Path, openm6: Callable[..., Result]) -> None:
    done = openm6("generate", "run", "--text", "draw the digit seven", "--output", "image", "--out", "7.png")
    assert done.exit_code == 0, done.output
    image = Image.open(folder / "7.png")
    assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")


def test_speech_is_generated(folder: Path, openm6: Callable[..., Result]) -> None:
    done = openm6("generate", "run", "--image", "a.png", "--output", "audio", "--out", "x.wav")
    assert done.exit_code == 0, done.output
    samples, rate = soundfile.read(folder / "x.wav")
    assert rate == 16_000 and len(samples) > 8000 and np.isfinite(samples).all()


def test_a_text_is_written(openm6: Callable[..., Result]) -> None:
    done = openm6("generate", "run", "--audio", "a.wav", "--output", "text")
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("\n")


def test_numbers_are_predicted(openm6: Callable[..., Result]) -> None:
    words = ["--numbers", "bill_length_mm=40,flipper_length_mm=190,body_mass_g=", "--output", "numbers"]
    done = openm6("generate", "run", *words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["body_mass_g"]
    assert found["low_80"] < found["median"] < found["high_80"]


def test_it_is_evaluated_again(folder: Path, openm6: Callable[..., Result]) -> None:
    done = openm6("evaluate", "run", "--tasks", "image_classification", "--json", "scores.json")
    assert done.exit_code == 0, done.output
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tasks"]
    assert list(scores) == ["image_classification/digits"]
    assert scores["image_classification/digits"]["value"] == report["tasks"]["image_classification/digits"]["value"]
    assert scores["image_classification/digits"]["information_gain"] == pytest.approx(
        report["tasks"]["image_classification/digits"]["information_gain"], rel=1e-4
    )
