"""Measure codecs on test records: image quality, audio distance, recognition of spoken digits, speed; as JSON.

python tools/score_codecs.py image-64 image-256
python tools/score_codecs.py audio --digits my_digits-train.parquet my_digits-test.parquet
"""

# Shapes: N records, S side in pixels, M mel bands, F frames

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.svm import SVC
from torch import Tensor

from openm6.codecs.audio import AudioCodec
from openm6.codecs.image import ImageCodec
from openm6.codecs.registry import load_codec, shipped_codecs
from openm6.data.parquet import EmbeddedConfig, ParquetConfig
from openm6.data.records import Record
from openm6.data.source import Split
from openm6.data.sources import AnySourceConfig, open_sources
from openm6.ops.audio import log_mel, mel_filters, overlap_add, spectrum, unit_window
from openm6.train.audio_codec import audio_scores, read_clip
from openm6.train.image_codec import image_scores, psnr, read_small, to_pixels

IMAGES = ("emoji", "countries", "digits")
SIDE = 64
BANDS, FRAMES, WINDOW, HOP = 40, 24, 640, 160
QUIET = -6.0  # natural logarithm, 37 dB under the loudness that features are brought to
Scores = dict[str, dict[str, float]]


def records_of(config: AnySourceConfig, split: Split) -> list[Record]:
    """Every record of one split."""
    source = open_sources({"scored": config}, split)["scored"]
    return [source[index] for index in range(len(source))]


def image_report(codec: ImageCodec) -> Scores:
    """Scores of each embedded set of images, with the PSNR of as many pixels as the codec has positions."""
    report = {}
    for name in IMAGES:
        records = records_of(EmbeddedConfig(name=name), "test")
        pixels = to_pixels([read_small(record["image"], SIDE) for record in records], SIDE)
        report[name] = image_scores(codec, pixels) | {"psnr_of_shrinking": shrunk(pixels, codec.config.stride)}
    one = torch.zeros(1, 3, SIDE, SIDE)
    codes = codec.encode(one)
    report["milliseconds"] = {
        "encode": timed(lambda: codec.encode(one)),
        "decode": timed(lambda: codec.decode(codes)),
    }
    return report


def shrunk(pixels: Tensor, stride: int) -> float:
    """PSNR of images shrunk by the stride and enlarged again.  # N 3 S S uint8"""
    images = pixels.float() / 127.5 - 1.0
    small = F.interpolate(images, scale_factor=1 / stride, mode="area")
    return float(psnr(images, F.interpolate(small, pixels.shape[2:], mode="bicubic").clamp(-1, 1)).mean())


def timed(act: Callable[[], object], times: int = 20) -> float:
    """Milliseconds of one call, the median of many."""
    act()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        taken.append(time.perf_counter() - began)
    return 1000 * float(np.median(taken))


def digits(config: AnySourceConfig, split: Split) -> tuple[list[Tensor], list[str]]:
    """Clips of spoken digits and what is said in them, language included."""
    records = records_of(config, split)
    words = [f"{record['label']} {record.get('extra', {}).get('spoken_language', '')}" for record in records]
    return [read_clip(record["audio"]) for record in records], words


def features(clip: Tensor) -> np.ndarray:
    """Log-mels of the part that is not silent, scaled to one loudness and to 24 frames.  # S -> M·F"""
    loud = (clip.abs() > 0.02 * clip.abs().max()).nonzero()[:, 0]
    heard = clip[loud[0] : loud[-1] + 1] if len(loud) else clip
    heard = heard * (0.1 / heard.square().mean().sqrt().clamp(min=1e-5))
    heard = F.pad(heard, (0, -len(heard) % HOP))
    magnitudes = spectrum(heard[None], unit_window(WINDOW), HOP).abs()
    mels = log_mel(magnitudes, mel_filters(BANDS, WINDOW, 16000)).clamp(min=QUIET)  # 1 N M
    even = F.interpolate(mels.mT, FRAMES, mode="linear", align_corners=True)[0]  # M F
    return (even - even.mean(1, keepdim=True)).flatten().numpy()


def vocoded(clip: Tensor, rounds: int = 32) -> Tensor:
    """The clip from its log-mels alone by Griffin-Lim, without a codec: the limit of 80 mels per frame."""
    window, filters = unit_window(WINDOW), mel_filters(80, WINDOW, 16000)
    padded = F.pad(clip, (0, -len(clip) % HOP))[None]
    mels = log_mel(spectrum(padded, window, HOP).abs(), filters).exp()
    magnitudes = mels @ torch.linalg.pinv(filters)
    values = torch.polar(magnitudes.clamp(min=0.0), 6.283 * torch.rand(magnitudes.shape))
    for _ in range(rounds):
        again = spectrum(overlap_add(values, window, HOP), window, HOP)
        values = torch.polar(magnitudes.clamp(min=0.0), again.angle())
    return overlap_add(values, window, HOP)[0, : len(clip)]


def audio_report(codec: AudioCodec, sources: dict[str, AnySourceConfig]) -> Scores:
    """Per source: log-mel L1, and the accuracy of an SVM trained on originals, on originals and reconstructions."""
    report: Scores = {}
    for name, config in sources.items():
        clips, words = digits(config, "train")
        classifier = SVC(C=10).fit(np.stack([features(clip) for clip in clips]), words)
        clips, words = digits(config, "test")
        copies = [codec.decode(codec.encode(clip[None]))[0, : len(clip)] for clip in clips]
        report[name] = audio_scores(codec, clips)
        for what, audio_clips in (
            ("original", clips),
            ("codec", copies),
            ("griffin_lim", map(vocoded, clips)),
        ):
            accuracy = classifier.score(np.stack([features(audio) for audio in audio_clips]), words)
            report[name][f"digits_right_{what}"] = float(accuracy)
    second = torch.zeros(1, 16000)
    codes = codec.encode(second)
    report["milliseconds_a_second"] = {
        "encode": timed(lambda: codec.encode(second)),
        "decode": timed(lambda: codec.decode(codes)),
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "codecs", nargs="*", default=list(shipped_codecs()), help="names or files; default: all shipped"
    )
    parser.add_argument("--digits", nargs=2, metavar=("TRAIN", "TEST"), help="two Parquet files of spoken digits")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sources: dict[str, AnySourceConfig] = {"espeak_digits": EmbeddedConfig(name="espeak_digits")}
    if arguments.digits:
        sources["own"] = ParquetConfig(path=arguments.digits[0], test_path=arguments.digits[1])
    report = {}
    for name in arguments.codecs:
        codec = load_codec(name)
        if isinstance(codec, ImageCodec):
            report[name] = image_report(codec)
        elif isinstance(codec, AudioCodec):
            report[name] = audio_report(codec, sources)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
