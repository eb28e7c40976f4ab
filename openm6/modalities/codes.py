"""What images and audio share: patches as input; as output a grid of codec codes, masked and predicted in parallel.

Training masks a random fraction of the positions (MaskGIT, arXiv 2202.04200, section 3.1); decoding predicts them in a
few steps. A position holds G codes (groups or residual stages), which a small head predicts one after the other,
p(c_1 … c_G | h) = Π_g p(c_g | h, c_<g), so that a position is drawn from one joint distribution.
"""

# Dimensions: N tokens, H and W tokens down and across, D hidden size, Q frequencies, F features of a patch, G codes per
# position, C codebook size, V numbers in the vector of one position, B bottleneck

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.codecs.base import Codec
from openm6.core.seeds import content_key
from openm6.modalities.interface import NO_OPTIONS, OWN_ORIGIN, Adapter, Modality, Options, Rng, Segment
from openm6.ops.losses import grouped_cross_entropy
from openm6.ops.quantize import cell_values, unpack

# Waves of 4 sides (or seconds) down to an eighth of one.
OCTAVES = (-2, -1, 0, 1, 2, 3)
# Of the training masks: random positions, all, and a rectangle; the rest masks everything but a rectangle. Half of the
# targets are masked as a whole, since only there does the model depend on its inputs.
RANDOM_FRACTION, ALL_FRACTION, INSIDE_FRACTION = 0.35, 0.5, 0.075
# Of the training labels, as in MaskGIT: generalizes better to unseen voices and handwriting.
SMOOTHING = 0.1
# Of the visible codes is replaced by random ones, and learned, too: the model learns to correct codes.
WRONG_FRACTION = 0.05
# Numbers in the state of one group of the head.
BOTTLENECK = 64
# Of the codes and of the mels of files, so that an image that is used in every epoch goes through the codec once.
CACHE_BYTES = 64 * 2**20


def key_of(raw: Any, *settings: float | None) -> bytes | None:
    """The key of a file and the settings that it is read with; None if it is not a file."""
    return content_key(raw) + repr(settings).encode() if isinstance(raw, bytes) else None


class TokenGrid(NamedTuple):
    """The positions of N tokens of an image or recording; `shape` is how many there are down and across.

    `cells` (N 3) for rotary embeddings, `positions` (N 2) for Fourier features, and the `span` to the next segment.
    """

    cells: np.ndarray
    positions: np.ndarray
    shape: tuple[int, int]

    @property
    def span(self) -> int:
        return max(self.shape)


class FourierPositionEmbedding(nn.Module):
    """Fourier features of a position in its own image or recording: rotary positions only encode distances.

    Waves of several lengths along both axes are mixed into the hidden size.  # N 2 -> N D
    """

    frequencies: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([2.0**octave for octave in OCTAVES]), persistent=False)
        self.mix = nn.Linear(4 * len(OCTAVES), hidden_size)

    def forward(self, positions: Tensor) -> Tensor:
        angles = (2 * math.pi * positions[..., None] * self.frequencies).flatten(1)  # N 2 -> N 2Q
        return self.mix(torch.cat((angles.sin(), angles.cos()), -1).to(self.mix.weight.dtype))


def sample_mask(height: int, width: int, rng: Rng) -> np.ndarray:
    """Return which positions of a grid are masked for one training example; without a generator, all.  # H*W bool"""
    positions = height * width
    draw = RANDOM_FRACTION if rng is None else rng.random()
    if rng is None or RANDOM_FRACTION <= draw < RANDOM_FRACTION + ALL_FRACTION:
        return np.ones(positions, bool)
    if draw < RANDOM_FRACTION:
        count = max(1, round(positions * math.cos(math.pi / 2 * rng.random())))
        return np.isin(np.arange(positions), rng.permutation(positions)[:count])
    inside = random_rectangle(height, width, rng)
    mask = inside if draw < RANDOM_FRACTION + ALL_FRACTION + INSIDE_FRACTION else ~inside
    # A rectangle may fill a tiny grid.
    return mask if mask.any() else np.ones(positions, bool)


def random_rectangle(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a rectangle of a quarter to three quarters of each side, somewhere in the grid.  # H*W bool"""
    tall = int(rng.integers(math.ceil(height / 4), max(2, math.ceil(height * 3 / 4) + 1)))
    wide = int(rng.integers(math.ceil(width / 4), max(2, math.ceil(width * 3 / 4) + 1)))
    tall, wide = min(tall, height), min(wide, width)
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    inside = np.zeros((height, width), bool)
    inside[top : top + tall, left : left + wide] = True
    return inside.reshape(-1)


class CodesModality(Modality):
    """Patches in, masked codes of a codec out: what images and audio share."""

    codec: Codec
    # Numbers in a patch.
    patch_size: int

    def _source(self, patches: np.ndarray, is_masked: np.ndarray, grid: TokenGrid, truncated: bool = False) -> Segment:
        """Patches as input tokens; masked ones are zero.  # N F, N"""
        patches = np.where(is_masked[:, None], 0, patches).astype(np.float32)
        arrays = {"patches": patches, "is_masked": is_masked, "positions": grid.positions}
        learn = np.zeros(len(patches), bool)
        return Segment(f"{self.name}_in", arrays, grid.cells, grid.span, learn, moves=OWN_ORIGIN, truncated=truncated)

    def _target(
        self,
        codes: np.ndarray,
        grid: TokenGrid,
        region: np.ndarray | None = None,
        options: Options = NO_OPTIONS,
        rng: Rng = None,
        truncated: bool = False,
    ) -> Segment:
        """Codes as target tokens, masked by the training pattern, or in `region` alone.  # N G

        `mask_context` masks the codes around the region as well; without a generator only those in it carry a loss.
        Training masks the context of half the examples, so that the model also inpaints from the source image or audio
        alone, and then learns all codes.
        """
        if region is None:
            mask = learn = sample_mask(*grid.shape, rng)
        else:
            mask_context = (rng is not None and rng.random() < 0.5) or options.get("mask_context")
            mask = np.ones_like(region) if mask_context else region
            learn = region if rng is None else mask
        shown = codes.astype(np.int64)
        if rng is not None:
            wrong = ~mask & (rng.random(len(codes)) < WRONG_FRACTION)
            shown[wrong] = rng.integers(0, self.codec.config.codebook_size, shown[wrong].shape)
            learn = learn | wrong
        arrays = {"codes": codes.astype(np.int64), "shown": shown, "is_masked": mask, "positions": grid.positions}
        kind = f"{self.name}_out"
        return Segment(kind, arrays, grid.cells, grid.span, learn, "block", OWN_ORIGIN, truncated)

    def _blank(self, grid: TokenGrid) -> Segment:
        """A target of which every position is masked."""
        return self._target(np.zeros((len(grid.cells), self.codec.config.groups), np.int64), grid)

    def adapters(self, hidden_size: int) -> dict[str, Adapter]:
        position = FourierPositionEmbedding(hidden_size)
        out = CodesAdapter(position, hidden_size, self.codec.config.levels, self.codec.config.groups)
        patches = PatchAdapter(position, self.patch_size, hidden_size)
        return {f"{self.name}_in": patches, f"{self.name}_out": out}


class PatchAdapter(Adapter):
    """Flat patches of raw values to vectors; masked patches become one learned vector."""

    def __init__(self, position: FourierPositionEmbedding, features: int, hidden_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.gone = nn.Parameter(torch.empty(hidden_size))
        self.place = position
        nn.init.normal_(self.gone, std=0.02)

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        hidden = F.gelu(self.inner(arrays["patches"].to(self.gone.dtype)))  # N F -> N D
        vectors = self.norm(self.outer(hidden))
        vectors = torch.where(arrays["is_masked"][:, None], self.gone.to(vectors.dtype), vectors)
        return vectors + self.place(arrays["positions"])


class CodesAdapter(Adapter):
    """Embed visible codes by their FSQ vectors (near codes stay near), and predict the codes of a position in turn."""

    earlier: Tensor
    levels: Tensor

    def __init__(
        self, position: FourierPositionEmbedding, hidden_size: int, levels: tuple[int, ...], groups: int
    ) -> None:
        super().__init__()
        self.groups, dims = groups, len(levels)
        self.shown = nn.Linear(groups * dims, hidden_size)
        self.mask = nn.Parameter(torch.empty(hidden_size))
        # That of the patches, so that the model finds a masked region by its position in the source.
        self.place = position
        self.hidden_to_groups = nn.Linear(hidden_size, groups * BOTTLENECK)
        self.codes_to_groups = nn.Linear(groups * dims, groups * BOTTLENECK, bias=False)
        self.to_codes = nn.Parameter(torch.empty(groups, BOTTLENECK, math.prod(levels)))
        # Row block g (BOTTLENECK rows) may depend on column block j (dims columns) only if j < g.
        blocks = torch.ones(groups, groups).tril(-1)
        self.register_buffer("earlier", torch.kron(blocks, torch.ones(BOTTLENECK, dims)), persistent=False)
        # A tensor made in each pass would be copied to the device again, and the host would wait for it.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.to_codes, std=BOTTLENECK**-0.5)

    def vectors(self, codes: Tensor) -> Tensor:
        """Return FSQ coordinates in [-1, 1] of the codes of a position.  # N G -> N V"""
        return cell_values(unpack(codes, self.levels), self.levels).flatten(-2)  # N G L -> N V

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        vectors = self.shown(self.vectors(arrays["shown"]).to(self.shown.weight.dtype))  # N V -> N D
        vectors = torch.where(arrays["is_masked"][:, None], self.mask.to(vectors.dtype), vectors)
        return vectors + self.place(arrays["positions"])

    def group_states(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return the head's state for each group, given the codes of the groups before it.  # N D, N G -> N G B"""
        context = F.linear(self.vectors(codes).to(hidden.dtype), self.codes_to_groups.weight * self.earlier)
        return F.gelu(self.hidden_to_groups(hidden) + context).unflatten(-1, (self.groups, BOTTLENECK))

    def group_logits(self, hidden: Tensor, codes: Tensor, group: int) -> Tensor:
        """Return logits of one group's code; the codes of later groups do not matter.  # N D, N G -> N C"""
        rows = slice(group * BOTTLENECK, (group + 1) * BOTTLENECK)
        state = F.linear(hidden, self.hidden_to_groups.weight[rows], self.hidden_to_groups.bias[rows])
        if group:
            earlier = self.vectors(codes[:, :group]).to(hidden.dtype)
            state = state + F.linear(earlier, self.codes_to_groups.weight[rows, : earlier.shape[-1]])
        return F.gelu(state) @ self.to_codes[group]  # N B -> N C

    def group_nll(self, hidden: Tensor, arrays: dict[str, Tensor], smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood of each code of each position, in nats.  # N D -> N G"""
        states = self.group_states(hidden, arrays["codes"])  # N G B
        return grouped_cross_entropy(states, self.to_codes, arrays["codes"], smoothing)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self.group_nll(hidden, arrays).sum(-1)

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        # The mean over groups gives a position the weight of a text token.
        return self.group_nll(hidden, arrays, SMOOTHING).mean(-1)
