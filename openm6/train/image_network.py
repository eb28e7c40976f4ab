"""Training the convolutional network that predicts a label from images, see modalities/simple_predictors.py."""

# Letters: R rows, S side of an image

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from openm6.core.log import get_log
from openm6.modalities.image import ImageConfig, augmented, read_image
from openm6.modalities.interface import Arrays
from openm6.modalities.simple_predictors import convolve, image_pixels

CHANNELS = (32, 64, 128, 256)
PIXEL_SECONDS = 2.2e-7  # of a step, for each pixel of each image: two cores of an AMD EPYC with AVX-512
MAX_SIDE, MEASURED = 64, 64  # pixels of a side, and images by which it is chosen
BATCH, MIN_STEPS, MAX_EPOCHS = 64, 40, 100
MOVES = 1 / 8  # of the side, of training images: these pass many times
PEAK_RATE, RISING, DECAY, SMOOTHING = 3e-3, 0.3, 0.05, 0.1  # RISING: of the steps, until the learning rate falls
# A slower machine takes fewer steps, and up to so many times the seconds, and some more.
SLOWEST, TOLERANCE = 1.5, 10.0
REPORTS = 5


class NetworkPlan(NamedTuple):
    """Seconds for the networks of a source, and how their images are augmented."""

    seconds: float
    config: ImageConfig


NO_NETWORKS = NetworkPlan(0.0, ImageConfig())


def fitting_side(images: Sequence[Any]) -> int:
    """The side of the squares that a network reads: large enough for most of the images, of which some are looked at.

    The first convolution halves them, so small ones are enlarged.
    """
    longest = np.median([max(read_image(raw).size) for raw in images[:: math.ceil(len(images) / MEASURED)]])
    return MAX_SIDE if longest <= MAX_SIDE // 2 else int(min(longest, MAX_SIDE))


def fit_network(raw: Sequence[Any], truth: np.ndarray, plan: NetworkPlan) -> Arrays:
    """Train a network with images and the numbers of their classes; nothing if the time is too short.  # R, R"""
    side = fitting_side(raw)
    # By an estimate of the time of a step that does not depend on the machine.
    steps = int(min(MAX_EPOCHS * len(raw), plan.seconds / (PIXEL_SECONDS * side**2)) / BATCH)
    if steps < MIN_STEPS:
        return {}
    images = np.stack([image_pixels(one, side) for one in raw])
    return {**_train(images, truth, steps, plan.config), "side": np.asarray([side])}


def _train(images: np.ndarray, truth: np.ndarray, steps: int, config: ImageConfig) -> Arrays:
    """Train convolutions with batch norm, which then is part of their weights, see `Network`.  # R S S 3, R"""
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):  # what follows has the random numbers that it had without a network
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(before, after, 3, 2 - (before > 3), padding=1, bias=False)
                        for before, after in pairwise((3, *CHANNELS))]  # fmt: skip
        norms, head = [nn.BatchNorm2d(count) for count in CHANNELS], nn.Linear(CHANNELS[-1], int(truth.max()) + 1)
    layers = [nn.Sequential(*pair) for pair in zip(convolutions, norms, strict=True)]
    model = nn.ModuleList([*layers, head]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=DECAY)
    order = np.concatenate([rng.permutation(len(images)) for _ in range(steps * BATCH // len(images) + 1)])
    expected = steps * BATCH * images[0, :, :, 0].size * PIXEL_SECONDS
    get_log().info(f"network of images: {steps} steps of {BATCH} images of {len(images):,}, about {expected:.0f} s")
    began, limit = time.monotonic(), SLOWEST * expected + TOLERANCE
    for step, batch in enumerate(order[: steps * BATCH].reshape(steps, BATCH)):
        done = max((step + 1) / (steps + 1), (time.monotonic() - began) / limit)
        if done >= 1:
            break
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(done / RISING, (1 - done) / (1 - RISING))
        shown = np.stack([augmented(images[row], config, rng, MOVES) for row in batch])
        outputs = head(convolve(shown, layers))
        loss = F.cross_entropy(outputs, torch.from_numpy(truth[batch]), label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % math.ceil(steps / REPORTS) == 0:
            get_log().info(f"network of images: step {step + 1} of {steps}, loss {loss.item():.3f}")
    model.eval()
    fused = map(nn.utils.fuse_conv_bn_eval, convolutions, norms)
    states = [one.state_dict() for one in (*fused, head)]
    matrices = [torch.cat([one["weight"].flatten(1), one["bias"][:, None]], 1) for one in states]
    return {str(number): one.numpy().astype(np.float16) for number, one in enumerate(matrices)}
