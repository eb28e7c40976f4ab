"""What every codec offers, and how a latent becomes codes: finite scalar quantization (FSQ, arXiv 2309.15505), which
rounds channels to one of a few levels each, in groups side by side or stage after stage, or vectors of a codebook."""

# Shapes: B batch, P positions (any number of axes), C numbers of a latent, G groups or stages, D numbers of one code,
# channel d of which has L_d levels; a code packs D cells, the first one varying fastest; K vectors of a codebook

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from openm6.core.config import Config

MAX_CODEBOOK = 1024  # one softmax of the transformer per code
COMMITMENT = 0.25  # weight of the distance to the chosen vectors in the loss (arXiv 1711.00937, equation 3)
KEEP, UNUSED = 0.99, 0.01  # of codebooks' running means; of its even share, below which a vector is replaced
SATURATION = 2.5  # beyond this |z| the slope of y in `quantize` is under 8 % of its peak: the gradient vanishes


def cell_values(cells: Tensor, levels: Tensor) -> Tensor:
    """Return coordinates of cells on an even grid from -1 to 1, for odd and even numbers of them.  # ... D -> ... D"""
    return cells * (2.0 / (levels - 1)) - 1.0


def bounded(z: Tensor) -> Tensor:
    """Numbers within (-1, 1), about uniform for unit Gaussian z (iFSQ, arXiv 2601.17124), in fp32."""
    return 2.0 * torch.sigmoid(1.6 * z.float()) - 1.0


def quantize(z: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized coordinates with a straight-through gradient, and their cells.  # ... D -> ... D, ... D

    `z` is unbounded and should have about unit variance; it is computed in fp32, since rounding in bf16 moves cells.
    """
    y = bounded(z)  # cells divide it evenly
    cells = torch.minimum(torch.floor((y + 1.0) * 0.5 * levels).long().clamp(min=0), levels - 1)
    return y + (cell_values(cells, levels) - y).detach(), cells


def pack(cells: Tensor, levels: Tensor) -> Tensor:
    """One code from D cells: Σ_d cell_d · Π_{e<d} L_e.  # ... D -> ..."""
    return (cells * _strides(levels)).sum(-1)


def unpack(codes: Tensor, levels: Tensor) -> Tensor:
    """The D cells of each code; undoes `pack`.  # ... -> ... D"""
    return codes[..., None] // _strides(levels) % levels


def _strides(levels: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(levels[:1]), levels[:-1].cumprod(0)])


def bits_per_channel(cells: Tensor, levels: Tensor) -> Tensor:
    """Return the entropy in bits of each channel's cells, out of log2(levels).  # N D -> D"""
    frequency = F.one_hot(cells, int(levels.max())).float().mean(0)  # N D -> D L
    return -(frequency * frequency.clamp(min=1e-9).log2()).sum(-1)


class QuantizerConfig(Config):
    """How many codes a position has, and the FSQ levels of one code, whose product is the values it can take."""

    groups: int = Field(ge=1)
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @field_validator("levels")
    @classmethod
    def _small_enough(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or min(levels) < 2 or math.prod(levels) > MAX_CODEBOOK:
            raise ValueError(f"levels must be at least 2 and multiply to at most {MAX_CODEBOOK}, as [8, 5, 5, 5]")
        return levels

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    @property
    def vector_size(self) -> int:
        return self.groups * len(self.levels)


@dataclass(frozen=True)
class QuantizerStats:
    """Saturation, which leaves no gradient, and the entropy of each channel in bits, of `capacity` = log2(levels)."""

    mean_magnitude: Tensor
    saturated: Tensor
    bits: Tensor
    capacity: Tensor


@dataclass(frozen=True)
class Quantized:
    """A quantized latent B P C, codes B P G, the `inputs` of quantizing and the `cells` left, B P G D; levels D.

    `commitment` is the squared distance of a latent to the vectors of a codebook, a part of the loss; 0 for FSQ.
    """

    latent: Tensor
    codes: Tensor
    inputs: Tensor
    cells: Tensor
    levels: Tensor
    commitment: Tensor | float = 0.0

    @property
    @torch.no_grad()
    def health(self) -> QuantizerStats:
        """Computed on access, since it is not needed to encode."""
        size = self.inputs.abs()
        levels = self.levels.repeat(self.cells.shape[-2])
        bits = bits_per_channel(self.cells.flatten(0, -3).flatten(1), levels)
        saturated = (size > SATURATION).float().mean()
        return QuantizerStats(size.mean(), saturated, bits, levels.float().log2())


class LatentNorm(nn.Module):
    """Brings each channel of a latent to zero mean and unit variance; without it the latent explodes and FSQ dies."""

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, momentum: float = 0.02) -> None:
        super().__init__()
        self.momentum = momentum
        self.frozen = False  # set for the last part of training, so that the decoder settles on fixed statistics
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, z: Tensor) -> Tensor:
        """# B P C -> B P C, in fp32"""
        if not self.training or self.frozen:
            return (z - self.mean) * torch.rsqrt(self.variance + 1e-5)
        rows = z.flatten(0, -2)
        variance, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():  # a step that is not finite is undone, and must leave nothing here
            for kept, new in ((self.mean, mean), (self.variance, variance)):
                kept.lerp_(torch.where(new.isfinite(), new, kept), self.momentum)
        return (z - mean) * torch.rsqrt(variance + 1e-5)


def kept_stages(latent: Tensor, stages: int, dropout: float) -> Tensor:
    """How many of its first stages each row keeps: a fraction `dropout` of the rows any number.  # B P C -> B 1 1"""
    shape = (latent.shape[0],) + (1,) * (latent.dim() - 1)
    kept = torch.full(shape, stages, device=latent.device)
    if dropout > 0.0:
        draw = torch.rand(shape, device=latent.device)
        count = torch.randint(1, stages + 1, shape, device=latent.device)
        kept = torch.where(draw < dropout, count, kept)
    return kept


class GroupedQuantizer(nn.Module):
    """Splits a latent into G groups that are quantized side by side and weigh the same."""

    levels: Tensor

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.groups = config.groups
        self.norm = LatentNorm(config.vector_size)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """# B P C -> latent B P C, codes B P G"""
        z = self.norm(latent.float()).unflatten(-1, (self.groups, -1))  # B P C -> B P G D
        values, cells = quantize(z, self.levels)
        return Quantized(values.flatten(-2), pack(cells, self.levels), z, cells, self.levels)

    def latent_of(self, codes: Tensor) -> Tensor:
        """# B P G -> B P C"""
        return cell_values(unpack(codes, self.levels), self.levels).flatten(-2)


class ResidualQuantizer(nn.Module):
    """Quantizes a latent in G stages, each what the stages before left over, through its own small projection.

    Each stage's input is normalized to unit variance, without which later stages fade (arXiv 2508.15860).
    """

    levels: Tensor

    def __init__(self, config: QuantizerConfig, channels: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = dropout
        dims = len(config.levels)
        self.into = nn.ModuleList(nn.Linear(channels, dims) for _ in range(config.groups))
        self.norms = nn.ModuleList(LatentNorm(dims) for _ in range(config.groups))
        self.out = nn.ModuleList(nn.Linear(dims, channels) for _ in range(config.groups))
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """# B P C -> latent B P C, codes B P G; while training, some rows keep only their first stages"""
        rest = latent.float()
        kept = kept_stages(rest, len(self.into), self.dropout if self.training else 0.0)
        total, inputs, cells = torch.zeros_like(rest), [], []
        for stage, (into, norm, out) in enumerate(zip(self.into, self.norms, self.out, strict=True)):
            z = norm(into(rest))  # B P C -> B P D
            values, cell = quantize(z, self.levels)
            step = out(values)  # B P D -> B P C
            rest = rest - step
            total = total + step * (kept > stage)
            inputs.append(z)
            cells.append(cell)
        stacked, chosen = torch.stack(inputs, -2), torch.stack(cells, -2)  # B P G D
        return Quantized(total, pack(chosen, self.levels), stacked, chosen, self.levels)

    def latent_of(self, codes: Tensor) -> Tensor:
        """The latent of the first stages, as many as `codes` has.  # B P G -> B P C"""
        values = cell_values(unpack(codes, self.levels), self.levels)  # B P G -> B P G D
        stages = zip(self.out, values.unbind(-2), strict=False)
        return torch.stack([out(value) for out, value in stages]).sum(0)


class VectorQuantizer(nn.Module):
    """Quantizes a latent in G stages to the nearest of K vectors each, of what the stages before left over.

    Vectors are running means of what they are nearest to (arXiv 1711.00937, appendix A.1), and unused ones, as all are
    at first, are replaced by latents of the batch (arXiv 2107.03312, section III-C). A position of few codes is easier
    to generate than one of many FSQ codes.
    """

    OWN: ClassVar[tuple[str, ...]] = ("codebooks", "used")  # what a codec with FSQ lacks

    codebooks: Tensor
    used: Tensor
    levels: Tensor

    def __init__(self, groups: int, size: int, channels: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.norm, self.dropout = LatentNorm(channels), dropout
        self.register_buffer("codebooks", torch.zeros(groups, size, channels))
        self.register_buffer("used", torch.zeros(groups, size))  # fractions of the positions
        self.register_buffer("levels", torch.tensor([size]), persistent=False)

    def forward(self, latent: Tensor) -> Quantized:
        """# B P C -> B P C, codes B P G; while training, some rows keep only their first stages"""
        z = self.norm(latent.float())
        y = bounded(z)
        rest, total, commitment, chosen = y.detach(), torch.zeros_like(y), y.new_zeros(()), []
        kept = kept_stages(y, len(self.codebooks), self.dropout if self.training else 0.0)
        for stage in range(len(self.codebooks)):
            flat = rest.flatten(0, -2)  # B P C -> N C
            codes = self._nearest(stage, flat)  # N
            if self.training and flat.isfinite().all():
                self._learn(stage, flat, codes)
            step = self.codebooks[stage][codes].view_as(rest)
            rest = rest - step
            total = total + step * (kept > stage)
            commitment = commitment + (y - (y.detach() - rest)).square().mean()
            chosen.append(codes.view(rest.shape[:-1]))
        stacked = torch.stack(chosen, -1)  # B P G
        return Quantized(
            y + (total - y).detach(), stacked, z[..., None, :], stacked[..., None], self.levels, commitment
        )

    def _nearest(self, stage: int, rows: Tensor) -> Tensor:
        """# N C -> N"""
        vectors = self.codebooks[stage]
        return torch.cat([(vectors.square().sum(1) - 2 * part @ vectors.T).argmin(1) for part in rows.split(2**14)])

    @torch.no_grad()
    def _learn(self, stage: int, rows: Tensor, codes: Tensor) -> None:
        """Move vectors towards the mean of the rows that chose them; replace unused ones by rows.  # N C, N"""
        vectors, used = self.codebooks[stage], self.used[stage]
        counts = torch.bincount(codes, minlength=len(vectors)).to(rows.dtype)
        sums = torch.zeros_like(vectors).index_add_(0, codes, rows)
        used.mul_(KEEP).add_(counts, alpha=(1 - KEEP) / len(rows))
        rate = (1 - KEEP) / len(rows) / used.clamp(min=1e-9)
        vectors.add_(rate[:, None] * (sums - counts[:, None] * vectors))
        unused = (used < UNUSED / len(vectors)).nonzero()[:, 0][: len(rows)]
        drawn = torch.randperm(len(rows), device=rows.device)[: len(unused)]
        vectors[unused], used[unused] = rows[drawn], 1 / len(vectors)

    def latent_of(self, codes: Tensor) -> Tensor:
        """The latent of the first stages, as many as `codes` has.  # B P G -> B P C"""
        return torch.stack([book[own] for book, own in zip(self.codebooks, codes.unbind(-1), strict=False)]).sum(0)


class CodesShape(NamedTuple):
    """What a position of a codec without FSQ holds: `groups` codes of `codebook_size` values each."""

    groups: int
    codebook_size: int


class Codec(nn.Module, ABC):
    """Turns raw images or audio into a grid of discrete codes and back."""

    kind: ClassVar[str]
    config: QuantizerConfig | CodesShape
    step: int  # pixels along each side, or samples at 16 kHz, of one position

    @abstractmethod
    def vectors(self) -> Tensor:
        """The vector that stands for each code of each group; those of near codes are near.  # G N D"""

    @abstractmethod
    def encode(self, raw: Tensor) -> Tensor:
        """Codes of raw input; no gradient; DataError if it cannot read its shape.  # B raw -> B positions G, int64"""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Raw output of codes, within [-1, 1]; no gradient.  # B positions G -> B raw"""


class TrainableCodec(Codec):
    """A codec that is trained here."""

    config: QuantizerConfig
    quantizer: GroupedQuantizer | ResidualQuantizer | VectorQuantizer

    @abstractmethod
    def quantized(self, raw: Tensor) -> Quantized:
        """The quantized latent of raw input; DataError if the codec cannot read its shape.  # B raw -> B positions C"""

    @abstractmethod
    def synthesize(self, latent: Tensor) -> Tensor:
        """Raw output of a quantized latent.  # B positions C -> B raw"""

    def reconstruct(self, raw: Tensor) -> tuple[Tensor, Quantized]:
        """`raw` through the codes and back, with a gradient, and what the quantizer did."""
        quantized = self.quantized(raw)
        return self.synthesize(quantized.latent), quantized

    def vectors(self) -> Tensor:
        """Those of the codebooks, or FSQ coordinates in [-1, 1], of all groups alike."""
        if isinstance(self.quantizer, VectorQuantizer):
            return self.quantizer.codebooks
        levels = torch.tensor(self.config.levels)
        cells = unpack(torch.arange(self.config.codebook_size), levels)
        return cell_values(cells, levels).expand(self.config.groups, -1, -1)

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        return self.quantized(raw).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return self.synthesize(self.quantizer.latent_of(codes)).clamp(-1.0, 1.0)

    def latent_norms(self) -> list[LatentNorm]:
        return [module for module in self.modules() if isinstance(module, LatentNorm)]


def bits_per_code(codes: Tensor, codec: Codec) -> float:
    """Bits that one position's codes carry, code by code, or channel by channel of FSQ.  # N G -> float"""
    total = 0.0
    if isinstance(codec, TrainableCodec):
        codes = unpack(codes, codec.quantizer.levels.to(codes.device)).flatten(-2)  # N G -> N C
    for channel in codes.unbind(-1):
        fractions = channel.unique(return_counts=True)[1].double() / len(channel)
        total -= float((fractions * fractions.log2()).sum())
    return total
