"""Baseline of images: a small convolutional network with augmentation and a one-cycle learning rate."""

# Letters: N images, S side, B batch, K outputs

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.harness import Deadline
from benchmarks.own_data.scores import TABLE_LEVELS

WIDTHS = (32, 64, 128, 256)
BATCH = 64
MAX_EPOCHS = 120
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.05
LABEL_SMOOTHING = 0.1
TEMPERATURES = np.geomspace(0.1, 4, 60).tolist()
MIN_SIDE, MAX_SIDE = 32, 64
TIMED_STEPS = 3
Loss = Callable[[Tensor, Tensor], Tensor]
"""Outputs of a batch and the rows of its images -> the mean loss."""
USED = 0.9  # of the time, since validation and prediction need some


class SmallCNN(nn.Module):
    """Four blocks of two convolutions with batch norm, then the mean over the image and a linear layer."""

    def __init__(self, side: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for index, width in enumerate(WIDTHS):
            # Images above 32 pixels are halved at once.
            stride = 2 if index == 0 and side > MIN_SIDE else 1
            for step in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, stride if step == 0 else 1, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
            if index < len(WIDTHS) - 1:
                layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(channels, outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Return the outputs of each image.  # B 3 S S -> B K"""
        return self.head(self.body(images).mean((2, 3)))


@dataclass(frozen=True)
class Limits:
    """Whether images may be mirrored, and when training ends."""

    flips: bool
    deadline: Deadline
    max_epochs: int


@dataclass(frozen=True)
class Fitted:
    """What a network predicts for the test images, and how long it was trained.  # N K"""

    outputs: np.ndarray
    epochs: float


def cnn_classes(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    test: Sequence[Image.Image],
    truth: Sequence[str],
    classes: Sequence[str],
    flips: bool,
    deadline: Deadline,
    max_epochs: int = MAX_EPOCHS,
) -> tuple[np.ndarray, float]:
    """Return probabilities of the classes and the number of epochs that fit into the time.  # N K

    Label smoothing helps the accuracy but keeps probabilities from 1. So the temperature is the best one for the
    `truth` of the test images, which favours the baseline.
    """
    target = torch.tensor([list(classes).index(label) for label in labels])

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target[rows], label_smoothing=LABEL_SMOOTHING)

    found = _fit(images, test, len(classes), loss, Limits(flips, deadline, max_epochs))
    outputs, known = torch.from_numpy(found.outputs).double(), torch.tensor([list(classes).index(x) for x in truth])
    best = min(TEMPERATURES, key=lambda one: float(F.cross_entropy(outputs / one, known)))
    return (outputs / best).softmax(1).numpy(), found.epochs


def cnn_quantiles(
    images: Sequence[Image.Image],
    values: np.ndarray,
    test: Sequence[Image.Image],
    flips: bool,
    deadline: Deadline,
    max_epochs: int = MAX_EPOCHS,
) -> tuple[np.ndarray, float]:
    """Return quantiles of a number at TABLE_LEVELS and the number of epochs that fit into the time.  # N Q"""
    loc, scale = float(np.mean(values)), float(np.std(values)) or 1.0
    target = torch.from_numpy((values - loc) / scale).float()
    levels = torch.from_numpy(TABLE_LEVELS).float()

    def loss(outputs: Tensor, rows: Tensor) -> Tensor:
        error = target[rows, None] - outputs
        return torch.maximum(levels * error, (levels - 1) * error).mean()

    found = _fit(images, test, len(TABLE_LEVELS), loss, Limits(flips, deadline, max_epochs))
    return np.sort(found.outputs.astype(float), 1) * scale + loc, found.epochs


def _fit(
    images: Sequence[Image.Image], test: Sequence[Image.Image], outputs: int, loss: Loss, limits: Limits
) -> Fitted:
    """Train as many epochs as the time allows, with one cycle of the learning rate."""
    torch.manual_seed(0)
    deadline = limits.deadline
    side = min(MAX_SIDE, max(MIN_SIDE, int(np.median([max(image.size) for image in images]))))
    pixels = _pixels(images, side)
    model: nn.Module = SmallCNN(side, outputs)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng = torch.Generator().manual_seed(0)
    per_epoch = max(1, len(pixels) // BATCH)
    steps, schedule, step = per_epoch * limits.max_epochs, None, 0
    began = time.monotonic()
    model.train()
    while step < steps and not deadline.passed:
        order = torch.randperm(len(pixels), generator=rng)
        for rows in order.split(BATCH)[:per_epoch]:
            if len(rows) > 1:
                loss(model(_augmented(pixels[rows], limits.flips, rng)), rows).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if schedule is None and step == TIMED_STEPS:
                each = (time.monotonic() - began) / step
                steps = int(min(steps, max(2 * per_epoch, USED * deadline.left / each)))
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
            elif schedule is not None and step < steps:
                schedule.step()
            if step >= steps or deadline.passed:
                break
    model.eval()
    with torch.inference_mode():
        found = [model(batch).numpy() for batch in _pixels(test, side).split(256)]
    return Fitted(np.concatenate(found), round(step / per_epoch, 1))


def _pixels(images: Sequence[Image.Image], side: int) -> Tensor:
    """Return images on squares of a common size, over the mean of their border, in -1 to 1.  # N 3 S S"""
    found = []
    for image in images:
        fitted = image.copy() if max(image.size) >= side else image
        ratio = side / max(fitted.size)
        size = (max(1, round(fitted.width * ratio)), max(1, round(fitted.height * ratio)))
        square = Image.new("RGB", (side, side), "white")
        square.paste(fitted.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2))
        found.append(np.asarray(square))
    levels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return levels.contiguous(memory_format=torch.channels_last)


def _augmented(pixels: Tensor, flips: bool, rng: torch.Generator) -> Tensor:
    """Return the images shifted by up to an eighth of the side, and mirrored half of the time.  # B 3 S S"""
    reach = pixels.shape[-1] // 8
    padded = F.pad(pixels, (reach, reach, reach, reach), mode="replicate")
    side = pixels.shape[-1]
    offsets = torch.randint(0, 2 * reach + 1, (len(pixels), 2), generator=rng).tolist()
    moved = torch.stack([
        image[:, down : down + side, across : across + side]
        for image, (down, across) in zip(padded, offsets, strict=True)
    ])  # fmt: skip
    if flips:
        mirrored = torch.rand(len(pixels), generator=rng) < 0.5
        moved[mirrored] = moved[mirrored].flip(-1)
    return moved.contiguous(memory_format=torch.channels_last)
