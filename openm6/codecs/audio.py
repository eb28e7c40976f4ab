"""The audio codec: log-mels to residual FSQ codes, and back through a predicted spectrum (Vocos, 2306.00814)."""

# Shapes: B batch, S samples, T positions, N = stride·T frames, D width, M mels, K frequencies, C latent, G stages

from collections import OrderedDict
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from openm6.codecs.base import Quantized, QuantizerConfig, ResidualQuantizer, TrainableCodec
from openm6.core.errors import DataError
from openm6.ops.audio import log_mel, mel_filters, overlap_add, spectrum, unit_window
from openm6.ops.matmul import matmul

LOUDEST = 3.0  # log of the largest magnitude of a frame: twice that of a full-scale sine in a unit window
QUIET = -4.0  # initial log-magnitude, or an untrained network would start as loud noise


class AudioCodecConfig(QuantizerConfig):
    """Shape of the network; `stride` frames of `hop` samples make one position (25 per second by default)."""

    groups: int = Field(default=4, ge=1)
    rate: Literal[16000] = 16000  # that of all audio that is read
    hop: int = 160
    window: int = 640
    num_mels: int = 80
    stride: int = 4
    width: int = 192
    encoder_blocks: int = 6
    decoder_blocks: int = 8
    expansion: int = 3
    latent: int = 16
    stage_dropout: float = 0.5

    @model_validator(mode="after")
    def _frames_overlap(self) -> Self:
        if self.window % self.hop or self.window < 2 * self.hop:
            raise ValueError("window must be a multiple of hop, at least twice it, so that frames overlap")
        return self

    @property
    def samples_per_position(self) -> int:
        return self.hop * self.stride


class Linear(nn.Linear):
    """A faster product without gradients: audio clips of a run have one length, or few (see `matmul`)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return matmul(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


class ConvNext(nn.Module):
    """A residual block: a wide convolution per channel and a small network per frame (2201.03545)."""

    def __init__(self, width: int, expansion: int, scale: float) -> None:
        super().__init__()
        self.across = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = Linear(width, expansion * width), Linear(expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.across(x.mT).mT)  # B N D -> B N D
        return x + self.scale * self.down(F.gelu(self.up(mixed)))


class LogMels(nn.Module):
    """Log-mels of audio, scaled to about unit variance.  # B S -> B N M"""

    filters: Tensor
    window: Tensor

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config = config
        filters = mel_filters(config.num_mels, config.window, config.rate)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", unit_window(config.window), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        magnitudes = spectrum(samples.float(), self.window, self.config.hop).abs()
        return (log_mel(magnitudes, self.filters) + 4.0) / 3.0


class AudioCodec(TrainableCodec):
    """Mono audio in [-1, 1] at the config's rate, to codes and back."""

    kind: ClassVar[str] = "audio"
    config: AudioCodecConfig

    def __init__(self, config: AudioCodecConfig) -> None:
        super().__init__()
        self.config, self.step = config, config.samples_per_position
        self.mels = LogMels(config)
        width, count = config.width, config.encoder_blocks + config.decoder_blocks
        blocks = [ConvNext(width, config.expansion, 1.0 / count) for _ in range(count)]
        self.first = nn.Conv1d(config.num_mels, width, 7, padding=3)
        self.encoder = nn.Sequential(*blocks[: config.encoder_blocks], nn.LayerNorm(width))
        # `stride` frames into one position by a linear layer, and back.
        group, project = nn.Unflatten(1, (-1, config.stride)), Linear(width * config.stride, config.latent)
        self.fold = nn.Sequential(OrderedDict(group=group, join=nn.Flatten(2), project=project))  # B N D -> B T C
        self.quantizer = ResidualQuantizer(config, config.latent, config.stage_dropout)
        expand, split = nn.Linear(config.latent, width * config.stride), nn.Unflatten(2, (config.stride, -1))
        self.unfold = nn.Sequential(OrderedDict(project=expand, split=split, join=nn.Flatten(1, 2)))  # B T C -> B N D
        self.decoder = nn.Sequential(*blocks[config.encoder_blocks :], nn.LayerNorm(width))
        self.head = nn.Linear(width, 2 * (config.window // 2 + 1))
        nn.init.constant_(self.head.bias[: config.window // 2 + 1], QUIET)

    def quantized(self, raw: Tensor) -> Quantized:
        """The quantized latent of audio; the end is padded with silence to a whole position.  # B S -> B T C"""
        if raw.dim() != 2 or raw.shape[1] == 0:
            raise DataError(
                f"audio of shape {tuple(raw.shape)} does not fit the codec: it reads B samples, mono and not empty"
            )
        samples = F.pad(raw, (0, -raw.shape[1] % self.config.samples_per_position))
        with torch.autocast(samples.device.type, enabled=False):  # spectra and rounding need fp32
            mels = self.mels(samples)
        hidden = self.encoder(self.first(mels.mT).mT)  # B N M -> B N D
        latent = self.fold(hidden)  # B N D -> B T C
        with torch.autocast(samples.device.type, enabled=False):
            return self.quantizer(latent)

    def synthesize(self, latent: Tensor) -> Tensor:
        """Audio of a quantized latent; that of the first stages alone is coarser.  # B T C -> B S"""
        hidden = self.decoder(self.unfold(latent))  # B T C -> B N D
        with torch.autocast(latent.device.type, enabled=False):
            values = F.linear(hidden.float(), self.head.weight, self.head.bias)
            level, phase = values.chunk(2, -1)  # B N 2K -> B N K
            spectra = torch.polar(level.clamp(max=LOUDEST).exp(), phase)
            return overlap_add(spectra, self.mels.window, self.config.hop)
