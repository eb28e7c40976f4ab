"""The model that comes with the package: small, ready in one minute, with a card that says what it reaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml
from typer.testing import CliRunner

import openm6
from openm6.cli.main import app
from openm6.codecs.external import weights_sha256
from openm6.codecs.registry import load_codec
from openm6.hub.find import SHIPPED, find_model
from openm6.inference.encoder import TrainedEncoder
from openm6.modalities.audio import read_audio
from openm6.models.description import MODEL_FILE, read_description
from openm6.serve.scenarios.run import examples_of
from openm6.serve.scenarios.scenario import LANGUAGES, library_of, read_scores, readiness
from tools.mini.evaluate import ROWS
from tools.mini.pack import CARD_FILE, MAX_ADDITION, MAX_BYTES, bytes_in_wheel

MINI = SHIPPED / "mini"
PAGE = (Path(__file__).parent.parent / "docs" / "mini.md").read_text(encoding="utf-8")
FACE = "draw a happy face with tan skin, long red hair, a blue shirt and glasses, pixel art"


@pytest.fixture(scope="module")
def mini() -> openm6.OpenM6:
    return openm6.load("mini")


def test_it_is_found_by_its_name_and_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("mini") == MINI
    assert (MINI / "model.safetensors").stat().st_size <= MAX_BYTES and bytes_in_wheel(MINI) <= MAX_BYTES


def test_it_is_sparse_and_of_the_size_that_the_pages_state(mini: openm6.OpenM6) -> None:
    parameters = sum(one.numel() for one in mini.loaded.omni.parameters())
    assert 10e6 <= parameters <= 30e6
    experts = mini.loaded.description.backbone.experts
    assert experts is not None and experts.num_experts > experts.top_k


def test_facts_and_faces(mini: openm6.OpenM6, tmp_path: Path) -> None:
    assert mini.generate("What is the capital of France?", output="text") == "Paris"
    assert mini.generate("法国的首都是哪里？", output="text") == "巴黎"
    image = mini.generate(FACE, output="image")
    assert isinstance(image, PIL.Image.Image) and image.size == (64, 64)
    image.save(tmp_path / "face.png")
    described = mini.generate("Describe the picture.", image=str(tmp_path / "face.png"), output="text")
    assert isinstance(described, str) and "pixel art" in described
    reds = np.asarray(image.convert("RGB"), dtype=float)
    assert reds.std() > 20, "the image is no single colour"


def test_it_understands_words_with_silence_around_them_and_what_it_says(mini: openm6.OpenM6) -> None:
    robot = read_audio((MINI / "words-word-espeak-f4-en-robot.flac").read_bytes())
    silence = np.zeros(8_000, np.float32)
    recording = openm6.Audio(np.concatenate([silence, robot, silence]))
    assert mini.generate("What is said?", audio=recording, output="text") == "robot"
    # Ten of the words that it understands, a third of all. With silence around them, or positions that were never
    # trained, it understands one of a hundred.
    names = ["kangaroo", "giraffe", "rhinoceros", "peacock", "hamburger", "pancakes", "lollipop", "church", "factory",
             "bicycle"]  # fmt: skip
    spoken = [mini.generate(f"say {name}", output="audio") for name in names]
    heard = [mini.generate("What is said?", audio=clip, output="text") for clip in spoken]
    assert sum(own == name for own, name in zip(heard, names, strict=True)) >= 6, heard


def test_the_command_needs_no_name() -> None:
    shown = CliRunner().invoke(app, ["generate", "--text", "What is the capital of France?", "--output", "text"])
    assert shown.exit_code == 0, shown.output
    assert "Paris" in shown.output


def test_examples_are_of_scenarios_that_are_ready(mini: openm6.OpenM6) -> None:
    description = mini.loaded.description
    scores, library = read_scores(MINI), library_of(description, MINI)
    own = {one.name for one in library.domains["own"].scenarios}
    ready = {one.name for one in library.scenarios.values() if readiness(one, description, scores).ready}
    assert f"{len(ready - own)} of 59 scenarios" in PAGE
    assert len(ready & own) == 4
    assert "four tasks that only `mini` has" in PAGE
    shown = list(examples_of(library, description, scores))
    pairs = {(one.scenario.input_modality, one.scenario.output) for one in shown}
    assert f"{len(pairs)} of the sixteen pairs" in PAGE
    assert {one.language for one in shown} == set(LANGUAGES)


@pytest.mark.parametrize("name", ["mini", "smol"])
def test_codecs_are_those_of_the_training(name: str) -> None:
    description = read_description((SHIPPED / name / MODEL_FILE).read_text(encoding="utf-8"), name)
    for modality in ("image", "audio"):
        codec = load_codec(getattr(description.modalities, modality).codec)
        assert description.external[f"{modality}.codec"] == weights_sha256(codec)


def test_smol_reads_by_this_mini() -> None:
    text = (SHIPPED / "smol" / MODEL_FILE).read_text(encoding="utf-8")
    external = read_description(text, "smol").external
    for kind in ("image", "audio"):
        assert external[f"{kind}.encoder"] == weights_sha256(TrainedEncoder("mini", kind)), kind
    assert sum(file.stat().st_size for file in (SHIPPED / "smol").iterdir()) <= MAX_ADDITION


def test_the_card_has_front_matter_and_every_row() -> None:
    text = (MINI / CARD_FILE).read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "any-to-any")
    assert front["co2_eq_emissions"]["emissions"] > 0
    for name in ROWS:
        assert f"| {name} |" in text, name
