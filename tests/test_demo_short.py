"""The demo in small, as a person would run it: train, report, and an answer of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.data.sample_images import png, wav

ROOT = Path(__file__).parents[1]
SETTINGS = [
    "loop.steps=8",
    "loop.save_every=8",
    "packing.batch_size=2",
    "eval.records=4",
    "eval.answers=2",
    "eval.drawn=2",
    "eval.samples=1",
    "eval.decoding.steps=2",
]
# Fewer records, or the tokenizer takes the time; as many as hold every answer of the closed tasks.
LIMITS = {"digits": 60, "spoken": 400, "questions": 60}

pytestmark = pytest.mark.slow


def openm6(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The program in another process, standing in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "openm6", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo was trained, with an image and a recording at hand."""
    found = tmp_path_factory.mktemp("demo")
    limits = [f"sources.{name}.limit={limit}" for name, limit in LIMITS.items()]
    done = openm6(found, "train", "demo", *SETTINGS, *limits, "--out", "run")
    assert done.returncode == 0, done.stderr
    assert "8 steps" in done.stdout
    (found / "a.png").write_bytes(png(side=40))
    (found / "a.wav").write_bytes(wav(seconds=0.4))
    return found


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


def test_an_image_is_drawn(folder: Path) -> None:
    done = openm6(folder, "generate", "run", "--text", "draw the digit seven", "--output", "image", "--out", "7.png")
    assert done.returncode == 0, done.stderr
    image = Image.open(folder / "7.png")
    assert (image.format, image.size, image.mode) == ("PNG", (32, 32), "RGB")


def test_speech_is_generated(folder: Path) -> None:
    done = openm6(folder, "generate", "run", "--image", "a.png", "--output", "audio", "--out", "x.wav")
    assert done.returncode == 0, done.stderr
    samples, rate = soundfile.read(folder / "x.wav")
    assert rate == 16_000 and len(samples) > 8000 and np.isfinite(samples).all()


def test_a_text_is_written(folder: Path) -> None:
    done = openm6(folder, "generate", "run", "--audio", "a.wav", "--output", "text")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")


def test_numbers_are_predicted(folder: Path) -> None:
    words = ["--numbers", "bill_length_mm=40,flipper_length_mm=190,body_mass_g=", "--output", "numbers"]
    done = openm6(folder, "generate", "run", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["body_mass_g"]
    assert found["low_80"] < found["median"] < found["high_80"]


def test_it_is_judged_again(folder: Path) -> None:
    done = openm6(folder, "evaluate", "run", "--tasks", "image_classification", "--json", "scores.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "run" / "report.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["tasks"]
    assert list(scores) == ["image_classification/digits"]
    assert scores["image_classification/digits"]["value"] == report["tasks"]["image_classification/digits"]["value"]
    assert scores["image_classification/digits"]["information_gain"] == pytest.approx(
        report["tasks"]["image_classification/digits"]["information_gain"], rel=1e-4
    )
