"""Features of log-mels by convolutions that were trained to classify recordings, for models too small to learn them."""

# Shapes: B batch, F frames of 10 ms, M mels, C channels, N = F / 8 tokens, D width, Q queries

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from openm6.codecs.conv_encoder import ConvEncoder, Convolution, halvings
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


class MelEncoder(ConvEncoder):
    """Features of patches of log-mels: `width` numbers for each token of 80 ms, which depend on 1.2 s around it.

    Those of the whole recording follow, one token for each query: means of the others, weighted by how well they fit
    the query. `loudness` of the whole recording is relative to its loudest value, so its level does not matter.
    """

    kind: ClassVar[str] = "audio encoder"
    config: MelEncoderConfig

    def __init__(self, config: MelEncoderConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.halve = halvings((1, *config.channels))
        mels = -(-config.num_mels // FRAMES)
        self.join = Convolution(nn.Conv1d(config.channels[-1] * mels, config.width, 1, bias=False))
        self.context = nn.ModuleList(
            Convolution(nn.Conv1d(config.width, config.width, 5, padding=2 * apart, dilation=apart, bias=False))
            for apart in config.dilations
        )
        self.queries = nn.Conv1d(config.width, config.queries, 1)

    def features(self, inputs: Tensor) -> Tensor:
        """Features of how loud clips of equal length are.  # B F M -> B D N"""
        maps = self.halve(inputs[:, None].contiguous(memory_format=torch.channels_last))  # B C N M/8
        x = self.join(maps.transpose(2, 3).flatten(1, 2))
        for layer in self.context:
            x = x + layer(x)
        return x

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
