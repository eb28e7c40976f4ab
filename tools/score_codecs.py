"""Measure codecs on test records: image quality, or audio distance; as JSON.

python tools/score_codecs.py image-64 image-256 audio
"""

from __future__ import annotations

import argparse
import json

from openm6.codecs.audio import AudioCodec
from openm6.codecs.image import ImageCodec
from openm6.codecs.registry import load_codec, shipped_codecs
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Record
from openm6.data.source import Split
from openm6.data.sources import open_sources
from openm6.train.audio_codec import audio_scores, read_clip
from openm6.train.image_codec import image_scores, read_small, to_pixels

IMAGES, CLIPS = ("emoji", "countries", "digits"), ("espeak_digits",)
SIDE = 64  # pixels
Scores = dict[str, dict[str, float]]


def records_of(name: str, split: Split) -> list[Record]:
    """Every record of one split of an embedded set."""
    source = open_sources({name: EmbeddedConfig(name=name)}, split)[name]
    return [source[index] for index in range(len(source))]


def image_report(codec: ImageCodec) -> Scores:
    """Scores of each set of images."""
    images = {name: [read_small(record["image"], SIDE) for record in records_of(name, "test")] for name in IMAGES}
    return {name: image_scores(codec, to_pixels(own, SIDE)) for name, own in images.items()}


def audio_report(codec: AudioCodec) -> Scores:
    """Scores of each set of clips."""
    clips = {name: [read_clip(record["audio"]) for record in records_of(name, "test")] for name in CLIPS}
    return {name: audio_scores(codec, own) for name, own in clips.items()}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(shipped_codecs())
    parser.add_argument("codecs", nargs="*", default=names, help="names or files; default: all shipped")
    report = {}
    for name in parser.parse_args(words).codecs:
        codec = load_codec(name)
        if isinstance(codec, ImageCodec):
            report[name] = image_report(codec)
        elif isinstance(codec, AudioCodec):
            report[name] = audio_report(codec)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
