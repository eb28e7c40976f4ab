"""Small networks that classify avatars and recordings of the corpus, trained on real ones of the training split."""

# Letters: N inputs, C channels, H and W rows and columns, S samples, F frames, M mels

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openm6.core.log import get_log
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.image import read_image, to_square
from openm6.ops.audio import log_mel, mel_filters, spectrum, unit_window

BATCH = 64
LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 0.05, 0.05
NONE = "none"  # the class of an attribute that an avatar lacks
SIDE = 64
MELS, FRAMES, HOP, WINDOW = 64, 96, 200, 600
FLOOR = 8.0  # natural logarithms below the loudest value: what is quieter counts as silence
VOICED = -4.5  # of the loudest value: frames below it, at either end, are cut off
Heads = dict[str, list[str]]
"""Head -> its classes."""


@dataclass(frozen=True)
class Design:
    """The shape of a network, and how it is trained."""

    channels: int
    widths: tuple[int, ...]
    grid: tuple[int, int]  # of means before the last layer
    shifts: tuple[int, int]  # at most, in rows and columns, as augmentation
    noise: float  # standard deviation, of either input's own units
    epochs: int


# Pixels are 0 for white to 255; log-mels 0 for silence to FLOOR.
AVATARS = Design(3, (24, 48, 64), (8, 8), (2, 2), 6.0, 4)
SYLLABLES = Design(1, (24, 48, 64), (8, 12), (2, 6), 0.15, 10)


class ConvNet(nn.Module):
    """Blocks of two convolutions with batch norm, each at half the resolution, then a linear layer for all heads."""

    def __init__(self, design: Design, sizes: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = design.channels
        for width in design.widths:
            for stride in (2, 1):
                convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
                layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        layers += [nn.AdaptiveAvgPool2d(design.grid), nn.Flatten(), nn.Dropout(0.2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels * design.grid[0] * design.grid[1], sum(sizes))
        self.sizes = list(sizes)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the scores of the classes of each head.  # N C H W"""
        return self.head(self.body(inputs.float())).split(self.sizes, 1)


class Classifier:
    """A trained network with the classes of its heads."""

    def __init__(self, network: ConvNet, heads: Heads) -> None:
        self.network, self.heads = network.eval(), heads

    @torch.inference_mode()
    def classes(self, inputs: Tensor) -> list[dict[str, str]]:
        """Return the likeliest class of each head for each input.  # N C H W"""
        found: list[dict[str, str]] = []
        for batch in inputs.split(256):
            best = [scores.argmax(1).tolist() for scores in self.network(batch)]
            for row in zip(*best, strict=True):
                named = zip(self.heads.items(), row, strict=True)
                found.append({head: classes[index] for (head, classes), index in named})
        return found


def fit(design: Design, inputs: Tensor, targets: Mapping[str, Sequence[str]], seed: int = 0) -> Classifier:
    """Train a network with one cycle of the learning rate; `targets` holds a class of each input for each head."""
    heads = {head: sorted(set(classes)) for head, classes in targets.items()}
    index = {head: {name: number for number, name in enumerate(classes)} for head, classes in heads.items()}
    expected = torch.tensor([[index[head][name] for name in classes] for head, classes in targets.items()])
    torch.manual_seed(seed)
    network = ConvNet(design, [len(classes) for classes in heads.values()])
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    per_epoch = max(1, len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=design.epochs * per_epoch)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(design.epochs):
        for rows in torch.randperm(len(inputs), generator=rng).split(BATCH)[:per_epoch]:
            scores = network(_augmented(inputs[rows], design, rng))
            losses = [
                F.cross_entropy(own, true, label_smoothing=LABEL_SMOOTHING)
                for own, true in zip(scores, expected[:, rows], strict=True)
            ]
            torch.stack(losses).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return Classifier(network, heads)


def _augmented(inputs: Tensor, design: Design, rng: torch.Generator) -> Tensor:
    """Inputs moved alike by a few rows and columns, zeros moving in, with noise.  # N C H W"""
    down, across = (int(torch.randint(-most, most + 1, (1,), generator=rng)) for most in design.shifts)
    moved = F.pad(inputs.float(), (across, -across, down, -down))
    return moved + design.noise * torch.randn(moved.shape, generator=rng)


def cached(name: str, corpus: Path, cache: Path, design: Design, make: Callable[[], Classifier]) -> Classifier:
    """Return the classifier of a file of the corpus, from the cache unless the file or the design has changed."""
    digest = hashlib.sha256(corpus.read_bytes() + repr(design).encode()).hexdigest()[:12]
    file = cache / f"{name}-{digest}.safetensors"
    if not file.is_file():
        get_log().info(f"training the small network of {name} once, which takes minutes")
        found = make()
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        save_file(found.network.state_dict(), partial, {"heads": json.dumps(found.heads, ensure_ascii=False)})
        partial.rename(file)
    with safe_open(file, "pt") as tensors:
        heads: Heads = json.loads(tensors.metadata()["heads"])
        network = ConvNet(design, [len(classes) for classes in heads.values()])
        network.load_state_dict({key: tensors.get_tensor(key) for key in tensors.keys()})  # noqa: SIM118
    return Classifier(network, heads)


class AvatarEvaluator:
    """Finds the attributes of avatars: hair, colours, glasses and others, or that they lack them."""

    def __init__(self, classifier: Classifier, attributes: Mapping[str, frozenset[str]]) -> None:
        self.classifier, self.attributes = classifier, attributes

    @classmethod
    def of(cls, train: Source, corpus: Path, cache: Path, design: Design = AVATARS) -> AvatarEvaluator:
        """Return the evaluator that the training records give; corpus: their file."""
        categories = train.values("categories")

        def make() -> Classifier:
            records = [train[index] for index in range(len(train))]
            return fit(design, image_tensor([record["image"] for record in records]), attribute_targets(categories))

        return cls(cached("avatars", corpus, cache, design, make), attributes_by_style(categories))

    def compare(self, images: Sequence[Any], records: Sequence[Record]) -> list[dict[str, bool]]:
        """Return for each image which attributes of its record's style are right."""
        found = self.classifier.classes(image_tensor(images))
        return [
            compare_attributes(own, record["categories"], self.attributes)
            for own, record in zip(found, records, strict=True)
        ]


def attributes_by_style(categories: Sequence[Mapping[str, str]]) -> dict[str, frozenset[str]]:
    """Return for each style the attributes that its avatars may have."""
    found: dict[str, set[str]] = {}
    for own in categories:
        found.setdefault(own["style"], set()).update(set(own) - {"style"})
    return {style: frozenset(names) for style, names in found.items()}


def attribute_targets(categories: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the class of each attribute for each avatar."""
    names = sorted({name for own in categories for name in own} - {"style"})
    return {name: [own.get(name, NONE) for own in categories] for name in names}


def compare_attributes(
    found: Mapping[str, str], true: Mapping[str, str], attributes: Mapping[str, frozenset[str]]
) -> dict[str, bool]:
    """Return which attributes of the true style are right; one that is absent must be absent."""
    return {name: found.get(name, NONE) == true.get(name, NONE) for name in sorted(attributes[true["style"]])}


def image_tensor(images: Sequence[Any]) -> Tensor:
    """Return images on white squares, inverted: white is 0.  # N 3 SIDE SIDE uint8"""
    squares = [255 - np.asarray(to_square(read_image(image), SIDE)) for image in images]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


class SyllableEvaluator:
    """Finds which Mandarin syllable with which tone a recording holds."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier

    @classmethod
    def of(cls, train: Source, corpus: Path, cache: Path, design: Design = SYLLABLES) -> SyllableEvaluator:
        """Return the evaluator that the training records give; corpus: their file."""

        def make() -> Classifier:
            records = [train[index] for index in range(len(train))]
            split = [split_tone(record["label"]) for record in records]
            targets = {"syllable": [one for one, _ in split], "tone": [tone for _, tone in split]}
            return fit(design, mel_tensor([record["audio"] for record in records]), targets)

        return cls(cached("syllables", corpus, cache, design, make))

    def transcribe(self, recordings: Sequence[Any]) -> list[str]:
        """Return the syllable of each recording as pinyin with the number of its tone."""
        found = self.classifier.classes(mel_tensor(recordings))
        return [own["syllable"] + own["tone"] for own in found]


def split_tone(pinyin: str) -> tuple[str, str]:
    """Return a syllable without its tone, and the number of the tone; empty if it has none."""
    return (pinyin[:-1], pinyin[-1]) if pinyin[-1:].isdigit() else (pinyin, "")


def mel_tensor(recordings: Sequence[Any]) -> Tensor:
    """Return log-mels of recordings, without silence at their ends: silence is 0.  # N 1 MELS FRAMES float16"""
    window, filters = unit_window(WINDOW), mel_filters(MELS, WINDOW, RATE)
    found = torch.zeros(len(recordings), 1, MELS, FRAMES, dtype=torch.float16)
    for row, recording in enumerate(recordings):
        samples = read_audio(recording)
        padded = F.pad(torch.from_numpy(samples), (0, -len(samples) % HOP))
        frames = log_mel(spectrum(padded[None], window, HOP).abs(), filters)[0]  # F M
        frames -= frames.max()
        voiced = (frames.amax(1) > VOICED).nonzero()[:, 0]
        heard = frames[int(voiced[0]) : int(voiced[-1]) + 1][:FRAMES]
        found[row, 0, :, : len(heard)] = (heard + FLOOR).clamp(min=0).T.half()
    return found


def attribute_rates(compared: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Return the fraction of right ones for each attribute."""
    right, total = Counter[str](), Counter[str]()
    for own in compared:
        right.update(name for name, is_right in own.items() if is_right)
        total.update([*own])
    return {name: right[name] / count for name, count in sorted(total.items())}
