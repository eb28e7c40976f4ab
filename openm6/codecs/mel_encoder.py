"""Features of log-mels by convolutions that were trained to classify recordings, for models too small to learn them."""

# Shapes: B batch, F frames of 10 ms, M mels, C channels, N = F / 8 tokens, D width, Q queries

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from openm6.codecs.external import Encoder
from openm6.core.config import Config

FRAMES = 8  # of 10 ms in one token
RANGE = 3.0  # of log-mels of `LogMels`, 9 nepers: what is quieter than the loudest value by more counts as silence
CLIP = 128  # frames of a clip in training, silence at its end included
SILENCE = 32  # frames after a longer recording, so that its end is read as those of clips are


class MelEncoderConfig(Config):
    """`channels` at a half, a quarter and an eighth of frames and mels, then `width` features of each token.

    Residual convolutions over five tokens follow, which are `dilations` apart. Each of `queries` sums up the clip.
    """

    num_mels: int = Field(default=80, ge=8)
    channels: tuple[int, int, int] = (24, 48, 64)
    width: int = Field(default=192, ge=1)
    dilations: tuple[int, ...] = (1, 2, 4)
    queries: int = Field(default=4, ge=1)


class Convolution(nn.Sequential):
    """A convolution with batch norm and ReLU."""

    def __init__(self, convolution: nn.Conv1d | nn.Conv2d) -> None:
        norm = nn.BatchNorm1d if isinstance(convolution, nn.Conv1d) else nn.BatchNorm2d
        super().__init__(convolution, norm(convolution.out_channels), nn.ReLU())

    def fuse(self) -> None:
        """Make the batch norm a part of the convolution, as its running means no longer change."""
        convolution, norm = self[0], self[1]
        if isinstance(norm, nn.Identity):
            return
        assert isinstance(convolution, (nn.Conv1d, nn.Conv2d)) and isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        assert norm.running_mean is not None and norm.running_var is not None
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self[1] = nn.Identity()


class MelEncoder(Encoder):
    """Features of patches of log-mels: `width` numbers for each token of 80 ms, which depend on 1.2 s around it.

    Those of the whole recording follow, one token for each query: means of the others, weighted by how well they fit
    the query. `loudness` of the whole recording is relative to its loudest value, so its level does not matter.
    """

    kind: ClassVar[str] = "audio encoder"

    def __init__(self, config: MelEncoderConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        before: Sequence[int] = (1, *config.channels)
        halvings = [
            Convolution(nn.Conv2d(old if stride == 2 else new, new, 3, stride, padding=1, bias=False))
            for old, new in zip(before[:-1], config.channels, strict=True)
            for stride in (2, 1)
        ]
        self.halve = nn.Sequential(*halvings)
        mels = -(-config.num_mels // FRAMES)
        self.join = Convolution(nn.Conv1d(config.channels[-1] * mels, config.width, 1, bias=False))
        self.context = nn.ModuleList(
            Convolution(nn.Conv1d(config.width, config.width, 5, padding=2 * apart, dilation=apart, bias=False))
            for apart in config.dilations
        )
        self.queries = nn.Conv1d(config.width, config.queries, 1)

    def fuse(self) -> None:
        """Make batch norms a part of the convolutions: after the training."""
        for module in list(self.modules()):
            if isinstance(module, Convolution):
                module.fuse()

    def features(self, loudness: Tensor) -> Tensor:
        """Features of clips of equal length.  # B F M -> B D N"""
        maps = self.halve(loudness[:, None].contiguous(memory_format=torch.channels_last))  # B C N M/8
        x = self.join(maps.transpose(2, 3).flatten(1, 2))
        for layer in self.context:
            x = x + layer(x)
        return x

    def summaries(self, features: Tensor) -> Tensor:
        """Means of the features, with weights of each query.  # B D N -> B D Q"""
        weights = self.queries(features).float().softmax(2)  # B Q N
        return torch.einsum("bdn,bqn->bdq", features.float(), weights)

    @torch.inference_mode()
    def forward(self, patches: np.ndarray) -> np.ndarray:
        """Features in half precision of the log-mels of 8 frames each, and their summaries.  # N 8*M -> N+Q D"""
        frames = torch.from_numpy(patches).reshape(-1, self.config.num_mels)
        loud = loudness(frames)
        silence = max(CLIP - len(loud), SILENCE)
        silence += -(len(loud) + silence) % FRAMES
        features = self.features(F.pad(loud, (0, 0, 0, silence))[None])
        found = torch.cat((features[:, :, : len(patches)], self.summaries(features)), 2)
        return found[0].T.half().numpy()


def loudness(frames: Tensor) -> Tensor:
    """Log-mels above the silence of their recording, whose loudest value is RANGE.  # ... F M -> ... F M"""
    return (frames - frames.amax((-2, -1), keepdim=True) + RANGE).clamp(min=0.0)
