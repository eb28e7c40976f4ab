"""Trains the audio encoder of `mini` to classify recordings: `python -m tools.mini.encoder --corpus DIR --out FILE`.

Words, syllables with their tones, instruments, pitches and named recordings are classes of one network, which the
encoder is the body of. Each clip is read in other ways each time: as by other voices, microphones and rooms.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.codecs.audio import AudioCodecConfig, LogMels
from openm6.codecs.mel_encoder import CLIP, MelEncoder, MelEncoderConfig, loudness
from openm6.codecs.registry import save_codec
from openm6.data.parquet import ParquetConfig
from openm6.data.records import Record
from openm6.data.source import Split
from openm6.data.sources import open_sources
from openm6.energy.meter import open_meter
from openm6.modalities.audio import RATE, read_audio
from tools.mini.networks import split_tone

# Letters: B clips, F frames of 10 ms, M mels, D width, N tokens, Q queries, K classes

WEIGHTS = {  # how often a clip of a part is drawn
    "words": 2.0, "more_words": 2.0, "syllables": 0.8, "more_syllables": 0.8, "instruments": 2.2, "recordings": 2.0,
}  # fmt: skip
SPEECH = ("words", "more_words", "syllables", "more_syllables")
BATCH, LEARNING_RATE, WEIGHT_DECAY, SMOOTHING, DROPOUT = 64, 3e-3, 0.05, 0.05, 0.2
IGNORED = -1  # a class that a clip does not have


def classes_of(part: str, record: Record) -> dict[str, str]:
    """Return the classes of a recording by what they say of it."""
    if part.endswith("words"):
        language = record["extra"]["spoken_language"]
        return {"word": f"{language} {record['label'] if language == 'en' else record['label_zh']}"}
    if part.endswith("syllables"):
        syllable, tone = split_tone(record["label"])
        return {"syllable": syllable, "tone": tone}
    if part == "instruments":
        pitch = (record.get("numbers") or {}).get("pitch")  # drums have none
        return {"instrument": record["label"]} | ({} if pitch is None else {"pitch": f"{pitch:g}"})
    return {"recording": record["label"]}


class Clips:
    """The clips of a split: how loud they are, their parts, and the numbers of their classes by head."""

    def __init__(self, corpus: Path, split: Split, heads: Mapping[str, Sequence[str]] | None = None) -> None:
        mels, width = LogMels(AudioCodecConfig()), CLIP * RATE // 100
        loud: list[Tensor] = []
        self.parts: list[str] = []
        classes: list[dict[str, str]] = []
        for part in WEIGHTS:
            source = open_sources({part: ParquetConfig(path=str(corpus / f"{part}.parquet"))}, split)[part]
            for index in range(len(source)):
                record = source[index]
                samples = read_audio(record["audio"])[:width]
                frames = mels(torch.from_numpy(np.pad(samples, (0, width - len(samples))))[None])[0]
                loud.append(loudness(frames).half())
                self.parts.append(part)
                classes.append(classes_of(part, record))
        self.loudness = torch.stack(loud)  # B F M
        found: dict[str, set[str]] = {}
        for one in classes:
            for head, name in one.items():
                found.setdefault(head, set()).add(name)
        self.heads = heads or {head: sorted(names) for head, names in found.items()}
        numbers = {head: {name: number for number, name in enumerate(names)} for head, names in self.heads.items()}
        self.classes = {
            head: torch.tensor([known.get(one.get(head, ""), IGNORED) for one in classes])
            for head, known in numbers.items()
        }


class Classifier(nn.Module):
    """The encoder, and a linear layer for each head over its summaries of the clip."""

    def __init__(self, config: MelEncoderConfig, heads: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.encoder = MelEncoder(config)
        self.drop = nn.Dropout(DROPOUT)
        self.heads = nn.ModuleDict(
            {head: nn.Linear(config.queries * config.width, len(k)) for head, k in heads.items()}
        )

    def forward(self, loud: Tensor) -> dict[str, Tensor]:
        """Return the scores of the classes of each head.  # B F M -> B K"""
        summaries = self.encoder.summaries(self.encoder.features(loud))  # B D Q
        joined = self.drop(summaries.mT.flatten(1))  # B Q*D
        return {head: layer(joined) for head, layer in self.heads.items()}


def changed(loud: Tensor, is_speech: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clips as others would be, and which of the notes have another pitch than before.  # B F M -> B F M, B"""
    count, frames, mels = loud.shape

    def uniform(low: float, high: float, *sizes: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *sizes, generator=rng)

    def normal(deviation: float, *sizes: int) -> Tensor:
        return deviation * torch.randn(count, *sizes, generator=rng)

    bent = uniform(0, 1) < 0.5
    reach = torch.where(is_speech, uniform(0, 1), bent * uniform(0, 0.35))
    # Another size of the vocal tract and another tempo, after some silence or without the first 20 ms.
    time = (torch.arange(frames) - uniform(-2, 12, 1)) * torch.exp(uniform(-0.28, 0.28) * reach)[:, None]
    mel = torch.arange(mels) * torch.exp(uniform(-0.2, 0.2) * reach)[:, None]
    across = ((2 * mel + 1) / mels - 1)[:, None].expand(-1, frames, -1)
    down = ((2 * time + 1) / frames - 1)[:, :, None].expand(-1, -1, mels)
    found = F.grid_sample(loud[:, None], torch.stack((across, down), 3), align_corners=False)[:, 0]
    # The response of a microphone, level, noise, and a floor of noise in some.
    extent = 0.3 + reach[:, None, None]
    response = F.interpolate(normal(0.22, 1, 6), size=mels, mode="linear", align_corners=True)
    response = response + torch.linspace(-1, 1, mels) * normal(0.35, 1, 1)
    found = (
        found
        + (found > 0) * (extent * response + normal(0.15, 1, 1))
        + normal(0.12, frames, mels) * uniform(0, 1, 1, 1)
    )
    floor = uniform(0, 0.5, 1, 1) * (uniform(0, 1, 1, 1) < 0.3)
    found = torch.maximum(found, floor + normal(0.1, frames, mels)).clamp(min=0)
    # SpecAugment (arXiv 1904.08779).
    for axis, size, span, most in ((2, mels, 1.0, 14), (1, frames, 0.6, 10)):
        start, width = uniform(0, span * size, 1), uniform(0, most, 1) * reach[:, None]
        at = torch.arange(size)
        kept = ~((at >= start) & (at < start + width))
        found = found * (kept[:, None] if axis == 2 else kept[:, :, None])
    return found, bent & ~is_speech


def train(clips: Clips, config: MelEncoderConfig, epochs: float, seed: int = 0) -> Classifier:
    """Train a classifier with one cycle of the learning rate."""
    torch.manual_seed(seed)
    rng, network = torch.Generator().manual_seed(seed), Classifier(config, clips.heads)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = max(2, round(epochs * len(clips.parts) / BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.15)
    weights = torch.tensor([WEIGHTS[part] for part in clips.parts])
    is_speech = torch.tensor([part in SPEECH for part in clips.parts])
    began = time.monotonic()
    for step in range(steps):
        rows = torch.multinomial(weights, BATCH, generator=rng)
        loud, bent = changed(clips.loudness[rows].float(), is_speech[rows], rng)
        with torch.autocast("cpu", torch.bfloat16):
            scores = network(loud)
        expected = {head: numbers[rows] for head, numbers in clips.classes.items()}
        expected["pitch"] = torch.where(bent, IGNORED, expected["pitch"])
        losses = [
            F.cross_entropy(own.float(), expected[head], None, ignore_index=IGNORED, reduction="sum",
                            label_smoothing=SMOOTHING)
            for head, own in scores.items()
        ]  # fmt: skip
        loss = torch.stack(losses).sum() / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:,} of {steps:,}, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return network.eval()


@torch.inference_mode()
def accuracies(network: Classifier, clips: Clips) -> dict[str, float]:
    """Return the fraction of right classes of each head, of the clips that have one which was trained."""
    found: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(clips.parts)).split(256):
        for head, scores in network(clips.loudness[rows].float()).items():
            expected = clips.classes[head][rows]
            found.setdefault(head, []).append((scores.argmax(1) == expected)[expected != IGNORED])
    joined = {head: torch.cat(right).float() for head, right in found.items()}
    return {head: round(right.mean().item(), 4) for head, right in joined.items() if len(right)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.mini.encoder", description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/mini"), help="folder of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="file of the encoder, .safetensors")
    parser.add_argument("--epochs", type=float, default=10.0, help="passes over as many clips as there are")
    args = parser.parse_args(argv)
    clips = Clips(args.corpus, "train")
    with open_meter() as meter, meter.span() as energy:
        began = time.monotonic()
        network = train(clips, MelEncoderConfig(), args.epochs)
        seconds = time.monotonic() - began
    scores = {split: accuracies(network, Clips(args.corpus, split, clips.heads)) for split in ("validation", "test")}
    save_codec(network.encoder, args.out)
    training = {"epochs": args.epochs, "clips": len(clips.parts), "minutes": round(seconds / 60, 1),
                "joules": round(energy.joules), "energy": energy.source}  # fmt: skip
    about = {"training": training, "accuracy": scores}
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
