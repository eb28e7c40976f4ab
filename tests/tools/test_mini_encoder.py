"""The training of encoders of mini: classes of records, what is left out, and what augmentation keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openm6.codecs.registry import load_encoder
from tools.mini import encoder, encoder_audio, encoder_images
from tools.mini.corpus import write_part
from tools.mini.labelled import IGNORED, numbered
from tools.mini.raster import png

COLOURS = ("red", "green", "blue", "yellow")


def icon(colour: str, style: str, split: str) -> dict[str, Any]:
    image = png(Image.new("RGB", (64, 64), colour))
    return {"id": f"{style}/{colour}", "split": split, "image": image, "label": colour, "extra": {"style_en": style}}


def face(colour: str, split: str) -> dict[str, Any]:
    categories = {"style": "sketch", "shirt": colour} | ({"hat": "a hat"} if colour == "red" else {})
    image = png(Image.new("RGB", (64, 64), colour))
    return {"id": f"{split}/{colour}", "split": split, "image": image, "categories": categories}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    things = [icon(colour, "flat", "test" if colour == "red" else "train") for colour in COLOURS]
    icons = [icon(colour, "flat", "train") for colour in COLOURS]
    emoji = [icon(colour, "glossy", "train") for colour in COLOURS]
    faces = [face(colour, split) for split in ("train", "validation", "test") for colour in COLOURS]
    for name, rows in {"things": things, "icons": icons, "emoji": emoji, "avatars": faces}.items():
        write_part(rows, tmp_path / f"{name}.parquet")
    return tmp_path


def test_classes_have_numbers_and_others_are_ignored() -> None:
    heads, classes = numbered([{"mood": "sad", "hat": "none"}, {"mood": "happy"}], None)
    assert heads == {"mood": ["happy", "sad"], "hat": ["none"]}
    assert classes["mood"].tolist() == [1, 0] and classes["hat"].tolist() == [0, IGNORED]
    assert numbered([{"mood": "calm"}], heads)[1]["mood"].tolist() == [IGNORED]


def test_tested_pairs_of_name_and_style_are_left_out_of_all_parts(corpus: Path) -> None:
    found = encoder_images.LabelledImages(corpus, "train")
    assert [found.parts.count(part) for part in ("things", "icons", "emoji", "avatars")] == [3, 3, 4, 4]
    assert found.heads["name"] == sorted(COLOURS) and found.heads["hat"] == ["a hat", "none"]
    is_digit = torch.tensor([part == "digits" for part in found.parts])
    assert (found.classes["digit"][~is_digit] == IGNORED).all() and (found.classes["digit"][is_digit] >= 0).all()
    held_out = encoder_images.LabelledImages(corpus, "test", found.heads)
    assert held_out.parts.count("things") == 1


def test_faces_keep_their_colours_and_grey_things_lose_their_style() -> None:
    images = torch.full((64, 3, 64, 64), -1.0)
    images[:, 0] = 0.5
    is_face = torch.arange(64) < 32
    found, is_grey = encoder_images.changed(images, is_face, torch.Generator().manual_seed(0))
    assert not is_grey[:32].any() and 0 < int(is_grey.sum()) < 16
    reds, others = found[:, 0].mean((1, 2)), found[:, 1:].mean((1, 2, 3))
    assert (reds[:32] > 0.4).all() and (others[:32] < -0.8).all(), "brightness alone changes"
    assert torch.allclose(reds[is_grey], found[is_grey, 1].mean((1, 2)), atol=0.4)


def test_notes_that_are_bent_lose_their_pitch_alone() -> None:
    is_speech = torch.arange(64) < 32
    loud = torch.rand(64, 128, 80, generator=torch.Generator().manual_seed(0))
    found, bent = encoder_audio.changed(loud, is_speech, torch.Generator().manual_seed(0))
    assert found.shape == loud.shape and (found >= 0).all()
    assert not bent[:32].any() and 4 < int(bent.sum()) < 28


def test_a_room_adds_a_tail_that_falls_evenly() -> None:
    loud = torch.zeros(1, 20, 2)
    loud[0, 5, 0] = 3.0
    found = encoder_audio.reverberated(loud, torch.tensor(0.1), torch.tensor(0.5))[0]
    assert torch.equal(found[:5], loud[0, :5]) and torch.equal(found[:, 1], loud[0, :, 1])
    expected = torch.tensor([3.0, *(2.5 - 0.1 * frame for frame in range(1, 15))])
    assert torch.allclose(found[5:, 0], expected, atol=1e-5)


def test_loudness_is_also_that_after_the_codec_if_asked_for() -> None:
    clips = np.random.default_rng(0).normal(0, 0.1, (3, 20480)).astype(np.float16)
    plain, after = encoder_audio.loudness_of(clips, coded=True)
    assert after is not None and plain.shape == after.shape == (3, 128, 80)
    assert not torch.equal(plain, after) and float((plain - after).abs().mean()) < 1.0
    assert encoder_audio.loudness_of(clips, coded=False)[1] is None


def test_an_encoder_is_trained_and_written_with_its_scores(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = corpus / "own.safetensors"
    encoder.main(["image", "--corpus", str(corpus), "--out", str(out), "--epochs", "0.1"])
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["accuracy"]["test"]["shirt"] >= 0 and about["training"]["joules"] > 0
    assert load_encoder(str(out), "image").width == 192
    assert "step 0 of 3" in capsys.readouterr().out
