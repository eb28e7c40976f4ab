"""`openm6 generate` on a tiny checkpoint: all four kinds of answer, and every bad input as one sentence."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from openm6.api.model import OpenM6
from openm6.cli.main import app
from openm6.inference.load import load
from openm6.kernels.probe import Capabilities
from openm6.train.run import train_recipe
from tests.data.sample_images import bomb, png, silence, wav
from tests.devices import GPU
from tests.train.tiny_recipe import tiny_recipe, write_recipe

FAST = ["--set", "masked.steps=2", "--set", "text.max_tokens=6"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train_recipe(write_recipe(folder, tiny_recipe(2, save_every=2)), out=folder / "run")
    return folder / "run"


LOAD = functools.cache(load)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.api.model.load_checkpoint", LOAD)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with inputs good and bad."""
    (tmp_path / "a.png").write_bytes(png("red", 40))
    (tmp_path / "a.wav").write_bytes(wav(seconds=0.5))
    (tmp_path / "broken.png").write_bytes(png()[:40])
    (tmp_path / "broken.wav").write_bytes(wav()[:20])
    (tmp_path / "text.txt").write_text("I am a text, not an image", encoding="utf-8")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "bomb.png").write_bytes(bomb())
    (tmp_path / "long.wav").write_bytes(silence(seconds=7200))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(run: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["generate", str(run), *FAST, *words])


@pytest.mark.parametrize("bf16", [True, False])
def test_on_a_gpu_weights_are_in_bf16_if_it_has_them(
    bf16: bool, run: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = load(run), []
    monkeypatch.setattr("openm6.api.model.load_checkpoint", lambda *_, precision, compiled: model)
    monkeypatch.setattr(OpenM6, "answer", lambda m6, *_: seen.append(m6.loaded) or ["yes"])
    monkeypatch.setattr(type(model.omni), "device", GPU)
    found = Capabilities(GPU, "a GPU", (9, 0) if bf16 else (7, 5), bf16, None)
    monkeypatch.setattr("openm6.api.model.capabilities", lambda device: found)
    assert ask(run, "--output", "text", "--text", "a").stdout == "yes\n"
    assert seen == [model] and model.omni.text.embedding.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_text(run: Path, files: Path) -> None:
    shown = ask(run, "--image", "a.png", "--output", "text", "--out", "t.txt")
    assert shown.exit_code == 0, shown.output
    assert (files / "t.txt").read_text(encoding="utf-8") == shown.stdout


def test_an_image(run: Path, files: Path) -> None:
    shown = ask(run, "--text", "draw the digit seven", "--output", "image")
    assert shown.exit_code == 0 and "answer.png" in shown.stdout
    assert Image.open(files / "answer.png").size == (64, 64)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_images_of_several_formats(run: Path, files: Path, suffix: str) -> None:
    assert ask(run, "--text", "draw", "--output", "image", "--out", f"x{suffix}").exit_code == 0
    assert Image.open(files / f"x{suffix}").size == (64, 64)


def test_a_hole_keeps_what_is_around_it(run: Path, files: Path) -> None:
    words = ["--image", "a.png", "--mask-box", "0.25,0.25,0.75,0.75", "--output", "image", "--out", "x.png"]
    assert ask(run, *words).exit_code == 0
    filled = np.asarray(Image.open(files / "x.png")).astype(int)
    assert np.abs(filled[:4, :4] - (255, 0, 0)).mean() < 60, "the corner is red as it was"


@pytest.mark.parametrize("words", [["--text", "say zero"], ["--audio", "a.wav", "--mask-span", "0.2,0.4"]])
def test_audio(run: Path, files: Path, words: list[str]) -> None:
    assert ask(run, *words, "--output", "audio", "--out", "x.wav").exit_code == 0
    samples, rate = soundfile.read(files / "x.wav")
    assert rate == 16_000 and len(samples) == 19_200 and np.isfinite(samples).all()


def test_numbers(run: Path, files: Path) -> None:
    shown = ask(run, "--numbers", "bill_length_mm=40,body_mass_g=", "--output", "numbers")
    assert shown.exit_code == 0, shown.output
    (found,) = json.loads(shown.stdout).values()
    assert list(json.loads(shown.stdout)) == ["body_mass_g"]
    assert set(found) == {"mean", "median", "low_80", "high_80"}
    assert found["low_80"] < found["median"] < found["high_80"]


def test_a_forecast(run: Path, files: Path) -> None:
    words = ["--series", "body_mass_g=4000,,4200", "--output", "numbers", "--ahead", "11"]
    shown = ask(run, *words)
    assert shown.exit_code == 0, shown.output
    assert len(json.loads(shown.stdout)["body_mass_g"]["median"]) == 11


def test_the_same_seed_gives_the_same_answer(run: Path, files: Path) -> None:
    found = []
    for seed in ("1", "1", "2"):
        assert ask(run, "--text", "draw", "--output", "image", "--out", "x.png", "--seed", seed).exit_code == 0
        found.append((files / "x.png").read_bytes())
    assert found[0] == found[1] != found[2]


BAD = {
    "no image": ("--image nowhere.png --output text", "no file at nowhere.png: check the path"),
    "no audio clip": ("--audio nowhere.wav --output text", "no file at nowhere.wav: check the path"),
    "broken image": ("--image broken.png --output text", "broken.png: the image is broken"),
    "broken audio": ("--audio broken.wav --output text", "broken.wav: the audio is broken"),
    "text as image": ("--image text.txt --output text", "the image is broken or of an unknown format"),
    "text as audio": ("--audio text.txt --output text", "the audio is broken or of an unknown format"),
    "image as audio": ("--audio a.png --output text", "the audio is broken or of an unknown format"),
    "a folder": ("--image folder.png --output text", "cannot be read"),
    "unknown column": ("--numbers bill_lenght_mm=3 --output text", "did you mean 'bill_length_mm'"),
    "unknown wanted column": ("--text x --output numbers --column mass", "has no column 'mass'"),
    "unknown series": ("--series x=1,2 --output numbers", "has no column 'x'"),
    "no column": ("--text x --output numbers", "the number to predict is not named"),
    "hole without image": ("--text x --mask-box 0,0,1,1 --output image", "it needs an image"),
    "hole of words": ("--image a.png --mask-box big --output image", "must be 4 numbers"),
    "gap without audio": ("--text x --mask-span 0,1 --output audio", "it needs audio"),
    "suffix of an image": ("--text x --output image --out x.bmp", "must end in one of .png"),
    "suffix of an audio clip": ("--text x --output audio --out x.mp3", "must end in one of .wav"),
    "no such folder": ("--text x --output image --out no/x.png", "there is no folder"),
    "out is a folder": ("--text x --output image --out folder.png", "is a folder: name a file in it"),
    "decompression bomb": ("--image bomb.png --output text", "bomb.png: the image is over the bound of"),
    "two hours": (
        "--audio long.wav --output text",
        "long.wav: the audio lasts 7200 s, over the bound of 30 s",
    ),
    "broken in a gap": (
        "--audio broken.wav --mask-span 0,.5 --output audio",
        "broken.wav: the audio is broken",
    ),
    "not a number": ("--numbers body_mass_g=nan --output text", "must look like name=3.5, a finite number"),
    "series of infinity": ("--series body_mass_g=1,inf --output numbers", "must be a finite number"),
    "unknown language": ("--image a.png --output text --language de", "'de' is not one of en, zh"),
    "unknown want": ("--text x --output smell", "is not one of text, image, audio, numbers"),
    "nothing given": ("--output text", "nothing is given"),
    "bad setting": ("--text x --output text --set text.topp=1", "did you mean 'top_p'"),
    "infinite": ("--numbers body_mass_g=inf --output text", "a finite number, or name= if it is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_one_sentence(run: Path, files: Path, case: str) -> None:
    words, sentence = BAD[case]
    shown = ask(run, *words.split())
    assert shown.exit_code == 1, shown.output
    assert sentence in shown.stderr and shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1 and shown.stdout == ""


def test_a_model_that_is_not_there_is_one_sentence(files: Path) -> None:
    shown = ask(files / "nowhere", "--text", "x", "--output", "text")
    assert shown.exit_code == 1 and "there is no run or checkpoint at" in shown.stderr


@pytest.mark.parametrize(("name", "content"), [("model.json", "{"), ("model.json", '{"format": 9}')])
def test_a_damaged_model_is_one_sentence(run: Path, tmp_path: Path, name: str, content: str) -> None:
    copy = tmp_path / "step-2"
    copy.mkdir()
    for file in (run / "checkpoints" / "step-2").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).write_text(content, encoding="utf-8")
    shown = ask(copy, "--text", "x", "--output", "text")
    assert shown.exit_code == 1 and shown.stderr.count("\n") == 1 and name in shown.stderr
