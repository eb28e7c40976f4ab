"""The measuring of codecs on the corpus: parts that are there, images that no codec was trained on, words by voice."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openm6.codecs.registry import load_codec
from openm6.train.run import read_recipe
from tools.mini import codecs
from tools.mini.corpus import write_part
from tools.mini.raster import png
from tools.mini.speech import flac

FOLDER = Path(codecs.__file__).parent


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    image, beep = png(Image.new("RGB", (64, 64), "red")), np.sin(np.arange(8000))
    styles = ("Noto emoji", "Twemoji", "Twemoji", "Twemoji")
    emoji = [{"id": f"{number}", "split": "test", "image": image, "extra": {"style_en": style}}
             for number, style in enumerate(styles)]  # fmt: skip
    write_part(emoji, tmp_path / "emoji.parquet")
    spoken = [("a", "en", "one"), ("a", "en", "two"), ("b", "en", "one"), ("b", "zh", "two")]
    words = [{"id": f"{number}", "split": "test", "label": label, "audio": flac(beep, 16_000),
              "extra": {"voice": voice, "spoken_language": language}}
             for number, (voice, language, label) in enumerate(spoken)]  # fmt: skip
    write_part(words, tmp_path / "words.parquet")
    return tmp_path


def test_parts_are_scored_without_images_that_were_trained(corpus: Path) -> None:
    table = dict(codecs.reconstruction("image", {"image-64": load_codec("image-64")}, corpus, limit=2))
    names = [f"{name}, {side} pixels, PSNR in dB" for name in ("emoji", *codecs.EMBEDDED["image"]) for side in (64, 32)]
    assert list(table) == names
    assert table[names[0]]["records"] == "2" and float(table[names[0]]["image-64"]) > 20
    kept = codecs.test_records(
        codecs.opened("image", corpus)["emoji"], lambda record: record["extra"]["style_en"] != codecs.TRAINED, 9
    )
    assert [record["id"] for record in kept] == ["1", "2", "3"]


def test_words_are_compared_by_voice_before_and_after_the_codec(corpus: Path) -> None:
    def transcribe(clips: list[np.ndarray]) -> list[str]:
        return ["one"] * len(clips)

    table = dict(codecs.words({"audio": load_codec("audio")}, corpus, transcribe))
    assert [row["original"] for row in table.values()] == [row["audio"] for row in table.values()] == ["50%", "100%"]


def test_rows_are_printed_as_they_are_ready(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codecs, "EMBEDDED", {"image": {}, "audio": {}})
    monkeypatch.setattr(codecs, "SIDES", (32,))
    monkeypatch.setattr(sys, "argv", ["codecs", "image-64", "--corpus", str(corpus)])
    codecs.main()
    head, line, row = capsys.readouterr().out.splitlines()
    assert head == "| part | records | original | image-64 |" and line == "| --- | --- | --- | --- |"
    assert row.startswith("| emoji, 32 pixels, PSNR in dB | 3 |  | ")


@pytest.mark.parametrize(("recipe", "start"), [("codec-image", "image-64"), ("codec-audio", "audio")])
def test_a_recipe_starts_from_a_codec_of_its_shape(recipe: str, start: str) -> None:
    assert read_recipe(FOLDER / f"{recipe}.yaml", [])[0].codec == load_codec(start).config
