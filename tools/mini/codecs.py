"""Measures codecs on test records of the corpus: `python -m tools.mini.codecs [CODEC …] --corpus DIR`.

Prints the PSNR of each part of images, the log-mel distance of each part of audio, and the fraction of isolated English
words that Whisper transcribes correctly, before and after each audio codec.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from openm6.codecs.base import Codec
from openm6.codecs.registry import load_codec
from openm6.data.parquet import EmbeddedConfig, ParquetConfig
from openm6.data.records import Record
from openm6.data.sources import AnySourceConfig, open_sources
from openm6.train.audio_codec import audio_scores, read_clip
from openm6.train.image_codec import image_scores, read_small, to_pixels
from tools.mini.packages import Packages
from tools.mini.pretrained import Whisper

PARTS = {
    "image": ("icons", "emoji", "openmoji", "clipart", "avatars", "outlines"),
    "audio": ("words", "said_words", "syllables", "said_syllables", "instruments", "recordings"),
}
EMBEDDED = {
    "image": {"embedded emoji": "emoji", "embedded flags": "countries", "embedded digits": "digits"},
    "audio": {"embedded spoken digits": "espeak_digits"},
}
SIDES = (64, 32)  # in pixels, of the images
TRAINED = "Noto emoji"  # their style; `image-64` was trained on most of the test images, at another size
WORDS = 200
Rows = Iterator[tuple[str, dict[str, str]]]
"""The name of each row, and its cell of each column, as they are ready."""


def opened(kind: str, corpus: Path) -> dict[str, AnySourceConfig]:
    """Return the sources of a kind of codec: the parts that the corpus holds, and the embedded ones."""
    files = {part: corpus / f"{part}.parquet" for part in PARTS[kind]}
    parts: dict[str, AnySourceConfig] = {
        part: ParquetConfig(path=str(file)) for part, file in files.items() if file.is_file()
    }
    return parts | {title: EmbeddedConfig(name=name) for title, name in EMBEDDED[kind].items()}


def test_records(config: AnySourceConfig, keep: Callable[[Record], bool], limit: int) -> list[Record]:
    """Return test records, evenly spaced among those that are kept."""
    source = open_sources({"part": config}, "test")["part"]
    kept = [record for record in (source[index] for index in range(len(source))) if keep(record)]
    return [kept[at] for at in np.linspace(0, len(kept) - 1, min(limit, len(kept))).round().astype(int)]


def reconstruction(kind: str, codecs: dict[str, Codec], corpus: Path, limit: int) -> Rows:
    """Yield the score of each source by each codec of a kind."""
    for name, config in opened(kind, corpus).items():
        records = test_records(config, lambda record: record.get("extra", {}).get("style_en") != TRAINED, limit)
        count = {"records": str(len(records))}
        if kind == "audio":
            clips = [read_clip(record["audio"]) for record in records]
            scores = {codec: f"{audio_scores(codecs[codec], clips)['log_mel_l1']:.3f}" for codec in codecs}
            yield f"{name}, log-mel L1", count | scores
        for side in SIDES if kind == "image" else ():
            pixels = to_pixels([read_small(record["image"], max(SIDES)) for record in records], side)
            scores = {codec: f"{image_scores(codecs[codec], pixels)['psnr']:.1f}" for codec in codecs}
            yield f"{name}, {side} pixels, PSNR in dB", count | scores


def words(codecs: dict[str, Codec], corpus: Path, transcribe: Callable[[Sequence[np.ndarray]], list[str]]) -> Rows:
    """Yield the fraction of English words that are transcribed correctly, by voices that are only tested, and by that
    of `mini`, of which other recordings are trained.
    """

    def is_english(record: Record) -> bool:
        return bool(record["extra"]["spoken_language"] == "en")

    every: list[Record] = []
    for part in ("words", "said_words"):
        if (file := corpus / f"{part}.parquet").is_file():
            every += test_records(ParquetConfig(path=str(file)), is_english, limit=1_000_000)
    for voice in sorted({record["extra"]["voice"] for record in every}):
        records = [record for record in every if record["extra"]["voice"] == voice][:WORDS]
        clips = [read_clip(record["audio"]) for record in records]
        versions = {"original": clips}
        versions |= {
            name: [codec.decode(codec.encode(clip[None]))[0] for clip in clips] for name, codec in codecs.items()
        }
        row = {"records": str(len(records))}
        for name, version in versions.items():
            found = transcribe([clip.numpy() for clip in version])
            right = [text == record["label"] for text, record in zip(found, records, strict=True)]
            row[name] = f"{np.mean(right):.0%}"
        yield f"words transcribed by Whisper, {voice}", row


def as_markdown(cells: Sequence[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |"


@torch.no_grad()
def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini.codecs", description=__doc__)
    parser.add_argument("codecs", nargs="*", default=["image-64", "audio"], help="names or files of codecs")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the Parquet files")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "openm6-mini", help="folder of packages")
    parser.add_argument("--limit", type=int, default=1000, help="at most this many records of each part")
    arguments = parser.parse_args()
    codecs = {name: load_codec(name) for name in arguments.codecs}
    head = ["part", "records", "original", *codecs]
    print(as_markdown(head), as_markdown(["---"] * len(head)), sep="\n", flush=True)
    for kind in PARTS:
        chosen = {name: codec for name, codec in codecs.items() if codec.kind == kind}
        rows = [reconstruction(kind, chosen, arguments.corpus, arguments.limit)] if chosen else []
        if chosen and kind == "audio":
            Packages(arguments.cache).import_requirements()
            rows.append(words(chosen, arguments.corpus, Whisper(arguments.cache).transcribe))
        for name, cells in chain.from_iterable(rows):
            print(as_markdown([name, *(cells.get(column, "") for column in head[1:])]), flush=True)


if __name__ == "__main__":
    main()
