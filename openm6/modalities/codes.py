"""Pictures and sounds as wanted output: a grid of codec codes, partly hidden, predicted in parallel.

Training hides a random share of the places (MaskGIT, arXiv 2202.04200, section 3.1); decoding fills them in a few
steps. One place holds G codes (groups or residual levels); they are predicted one after the other by a small head,
p(c_1 … c_G | h) = Π_g p(c_g | h, c_<g), so that a place is drawn from one joint distribution.
"""

# Letters: N tokens, D width, G codes a place, C codebook size, V numbers in one place's vector, B bottleneck

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.modalities.interface import Adapter
from openm6.modalities.places import PlaceEmbedding
from openm6.ops.cross_entropy import grouped_cross_entropy
from openm6.ops.quantize import cell_values, unpack

# Of the training masks: random positions, all, and a rectangle; the rest hides everything but a rectangle. Wholly
# masked targets are half, since only there does the model depend on its inputs.
RANDOM_FRACTION, ALL_FRACTION, INSIDE_FRACTION = 0.35, 0.5, 0.075
SMOOTHING = 0.1  # of the training labels, as MaskGIT does: unseen voices and hands must not surprise too much
WRONG_SHARE = 0.05  # visible codes replaced by random ones, and learned too: teaches repair


def hide(height: int, width: int, rng: np.random.Generator | None) -> np.ndarray:
    """Which places of a grid are hidden for one training example; without a generator, all.  # H*W bool"""
    places = height * width
    if rng is None:
        return np.ones(places, bool)
    draw = rng.random()
    if draw < RANDOM_FRACTION:
        hidden = np.zeros(places, bool)
        count = max(1, round(places * math.cos(math.pi / 2 * rng.random())))
        hidden[rng.permutation(places)[:count]] = True
        return hidden
    if draw < RANDOM_FRACTION + ALL_FRACTION:
        return np.ones(places, bool)
    inside = random_rectangle(height, width, rng)
    hidden = inside if draw < RANDOM_FRACTION + ALL_FRACTION + INSIDE_FRACTION else ~inside
    return hidden if hidden.any() else np.ones(places, bool)  # a rectangle may fill a tiny grid


def random_rectangle(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle of a quarter to three quarters of each side, somewhere in the grid.  # H*W bool"""
    tall = int(rng.integers(math.ceil(height / 4), max(2, math.ceil(height * 3 / 4) + 1)))
    wide = int(rng.integers(math.ceil(width / 4), max(2, math.ceil(width * 3 / 4) + 1)))
    tall, wide = min(tall, height), min(wide, width)
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    inside = np.zeros((height, width), bool)
    inside[top : top + tall, left : left + wide] = True
    return inside.reshape(-1)


def inpainting_masks(
    mask: np.ndarray, hide_context: bool, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Positions whose codes are hidden, and those that carry a loss, when `mask` is to be filled in.  # N -> N, N

    Without a generator the loss covers the mask alone. Training hides the context of half the examples, so that the
    model also fills in from the source image or sound alone, and then learns all codes.
    """
    if rng is not None and rng.random() < 0.5:
        hide_context = True
    hidden = np.ones_like(mask) if hide_context else mask
    return hidden, mask if rng is None else hidden


def masked_arrays(
    codes: np.ndarray,
    hidden: np.ndarray,
    learn: np.ndarray,
    places: np.ndarray,
    codebook_size: int,
    rng: np.random.Generator | None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays of a masked target, and the positions that carry a loss.  # N G, N, N, N 2 -> {…}, N"""
    shown, learn = codes.copy(), learn.copy()
    if rng is not None:
        wrong = ~hidden & (rng.random(len(codes)) < WRONG_SHARE)
        shown[wrong] = rng.integers(0, codebook_size, shown[wrong].shape)
        learn |= wrong
    arrays = {
        "codes": codes.astype(np.int64),
        "shown": shown.astype(np.int64),
        "hidden": hidden,
        "places": places,
    }
    return arrays, learn


class CodesAdapter(Adapter):
    """Embeds shown codes by their FSQ vectors (near codes stay near) and predicts the codes of a place in turn."""

    earlier: Tensor
    levels: Tensor

    def __init__(
        self, place: PlaceEmbedding, width: int, levels: tuple[int, ...], groups: int, bottleneck: int = 64
    ) -> None:
        super().__init__()
        self.groups, self.bottleneck = groups, bottleneck
        self.codebook_size = math.prod(levels)
        dims = len(levels)
        self.shown = nn.Linear(groups * dims, width)
        self.mask = nn.Parameter(torch.empty(width))
        self.place = (
            place  # that of the patches: what is filled in is to be found where it lies in the source
        )
        self.hidden_to_groups = nn.Linear(width, groups * bottleneck)
        self.codes_to_groups = nn.Linear(groups * dims, groups * bottleneck, bias=False)
        self.to_codes = nn.Parameter(torch.empty(groups, bottleneck, self.codebook_size))
        # Row block g (bottleneck rows) may look at column block j (dims columns) only where j < g.
        blocks = torch.ones(groups, groups).tril(-1)
        self.register_buffer("earlier", torch.kron(blocks, torch.ones(bottleneck, dims)), persistent=False)
        # A tensor made in each pass would be copied to the device anew, and the host would wait for it.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.to_codes, std=bottleneck**-0.5)

    def vectors(self, codes: Tensor) -> Tensor:
        """FSQ coordinates in [-1, 1] of the codes of a place.  # N G -> N V"""
        cells = unpack(codes, self.levels)  # N G L
        return cell_values(cells, self.levels).flatten(-2)  # N G L -> N V

    def embed(self, arrays: dict[str, Tensor]) -> Tensor:
        seen = self.shown(self.vectors(arrays["shown"]).to(self.shown.weight.dtype))  # N V -> N D
        shown = torch.where(arrays["hidden"][:, None], self.mask.to(seen.dtype), seen)
        return shown + self.place(arrays["places"])

    def group_states(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """The head's inner state for each group, given the codes of the groups before it.  # N D, N G -> N G B"""
        context = F.linear(self.vectors(codes).to(hidden.dtype), self.codes_to_groups.weight * self.earlier)
        return F.gelu(self.hidden_to_groups(hidden) + context).unflatten(-1, (self.groups, self.bottleneck))

    def group_logits(self, hidden: Tensor, codes: Tensor, group: int) -> Tensor:
        """Scores of one group's code; the codes of later groups do not matter.  # N D, N G -> N C"""
        rows = slice(group * self.bottleneck, (group + 1) * self.bottleneck)
        state = F.linear(hidden, self.hidden_to_groups.weight[rows], self.hidden_to_groups.bias[rows])
        if group:
            earlier = self.vectors(codes[:, :group]).to(hidden.dtype)
            state = state + F.linear(earlier, self.codes_to_groups.weight[rows, : earlier.shape[-1]])
        return F.gelu(state) @ self.to_codes[group]  # N B -> N C

    def group_nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        """Nats of each code of each place.  # N D -> N G"""
        return self._cross_entropy(hidden, arrays, 0.0)

    def _cross_entropy(self, hidden: Tensor, arrays: dict[str, Tensor], smoothing: float) -> Tensor:
        states = self.group_states(hidden, arrays["codes"])  # N G B
        return grouped_cross_entropy(states, self.to_codes, arrays["codes"], smoothing)

    def nll(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        return self.group_nll(hidden, arrays).sum(-1)

    def training_loss(self, hidden: Tensor, arrays: dict[str, Tensor]) -> Tensor:
        # The mean over groups keeps a place as loud as a text token.
        return self._cross_entropy(hidden, arrays, SMOOTHING).mean(-1)
