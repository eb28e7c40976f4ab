"""Convolutions over whole images or spectra before they are cut into patches (early convolutions, arXiv 2106.14881)."""

# Letters: N tokens, F numbers in a patch, P side of a patch, I images of one size, C channels, D hidden size,
# M patches of clips and gaps, B bands

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.modalities.interface import Arrays

Stem = Literal["linear", "conv"]  # how patches are embedded: each by a linear layer, or by convolutions over all
WIDTHS = (32, 64, 128)  # channels at a half, a quarter and an eighth of the sides
SPECTRUM_WIDTHS = (16, 32, 64)  # likewise, of spectra
RESIDUAL = 0.5  # factor on the first weights of residual convolutions
IMAGES = 4  # images computed at once are a multiple of this: a library compiles kernels for each number of them
LAYOUT = "layout "  # and a number: a table of `layouts` among the arrays of tokens
ROUND = 32  # M is a multiple of it, for the same reason
SIDES = 2**20  # above any number of patches along a side


def widths_of(patch: int) -> tuple[int, ...]:
    """Channels at a half, a quarter, … of the sides, before a patch of `patch` pixels along a side is one vector."""
    return WIDTHS[: patch.bit_length() - 2]


def kept_elements(patch: int) -> int:
    """Elements that the stem keeps of a patch for its backward pass (a test checks it): pixels, and each map thrice."""
    return 3 * patch**2 + sum(3 * width * (patch >> level) ** 2 for level, width in enumerate(widths_of(patch), 1))


def kept_of_spectrum(frames: int, bands: int) -> int:
    """The same of a patch of a spectrum."""
    sizes = enumerate(SPECTRUM_WIDTHS, 1)
    return frames * bands + sum(3 * width * -(-frames >> level) * -(-bands >> level) for level, width in sizes)


def layouts(arrays: Arrays) -> Arrays:
    """Tables of the patches of images by their `shapes`, or of spectra by the `number` of each patch in its clip."""
    tables = []
    if "shapes" in arrays:
        tables = by_size(arrays["shapes"])
    elif "number" in arrays:
        tables = [with_gaps(arrays["number"])]
    return {f"{LAYOUT}{number}": table for number, table in enumerate(tables)}


def by_size(shapes: np.ndarray) -> list[np.ndarray]:
    """For each size of images, their patches; the shapes of these tables are the sizes.  # N 2 -> I H/P W/P each"""
    down, across = shapes.T
    tables = []
    for size in np.unique(down * SIDES + across).tolist():
        own = np.flatnonzero(down * SIDES + across == size)
        tables.append(own.reshape(-1, *divmod(size, SIDES)))
    return tables


def with_gaps(number: np.ndarray) -> np.ndarray:
    """All patches of clips in a row, and -1 before each clip and after the last.  # N -> M"""
    place = np.arange(len(number)) + np.cumsum(number == 0)
    table = np.full(-(-(len(number) + (number == 0).sum() + 1) // ROUND) * ROUND, -1)
    table[place] = np.arange(len(number))
    return table


class ConvStem(nn.Module):
    """Halves images by strided convolutions until a patch is one vector; each but the last has a residual one after it.

    Neighbouring patches of an image are read together; images never depend on each other.
    """

    def __init__(self, patch: int, hidden_size: int) -> None:
        super().__init__()
        self.patch = patch
        self.halve, self.refine = _convolutions([3, *widths_of(patch), hidden_size], len(widths_of(patch)))

    def forward(self, patches: Tensor, of_size: list[Tensor]) -> Tensor:
        """Vectors of patches; `of_size` are the tables of `by_size`.  # N F, I H/P W/P each -> N D"""
        vectors = []
        for index in of_size:
            _, down, across = index.shape
            grid = patches[index].view(-1, down, across, self.patch, self.patch, 3)
            images = grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, down * self.patch, across * self.patch)
            vectors.append(self._convolve(images).permute(0, 2, 3, 1).flatten(0, 2))
        found = torch.cat(vectors)
        return torch.empty_like(found).index_copy(0, torch.cat([index.flatten() for index in of_size]), found)

    def _convolve(self, images: Tensor) -> Tensor:
        """# I 3 H W -> I D H/P W/P"""
        count = len(images)
        x = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -count % IMAGES)).contiguous(memory_format=torch.channels_last)
        for halve, refine in zip(self.halve, self.refine, strict=False):
            x = F.relu(halve(x))
            x = x + F.relu(refine(x))
        return self.halve[-1](x)[:count]


class SpectrumStem(nn.Module):
    """The same for patches of a few frames of all bands, halved both ways until one frame is left, whose bands join.

    A sound looks much the same a little earlier, or higher. Clips lie in a row, with gaps that stay zero, as if padded.
    """

    def __init__(self, frames: int, bands: int, hidden_size: int) -> None:
        super().__init__()
        self.frames, self.bands = frames, bands
        self.halve, self.refine = _convolutions([1, *SPECTRUM_WIDTHS], len(SPECTRUM_WIDTHS))
        left = -(-bands // 2 ** len(SPECTRUM_WIDTHS))
        self.join = nn.Linear(SPECTRUM_WIDTHS[-1] * left, hidden_size)

    def forward(self, patches: Tensor, in_a_row: list[Tensor]) -> Tensor:
        """Vectors of patches; `in_a_row` is the table of `with_gaps`.  # N F, M -> N D"""
        (index,) = in_a_row
        is_clip = index >= 0
        x = (patches[index.clamp(min=0)] * is_clip[:, None]).view(1, 1, -1, self.bands)  # N F -> 1 1 M·P B
        x = x.contiguous(memory_format=torch.channels_last)
        for halve, refine in zip(self.halve, self.refine, strict=True):
            x = halve(x)
            inside = is_clip.repeat_interleave(x.shape[2] // len(index))[:, None]
            x = F.relu(x * inside)
            x = x + F.relu(refine(x) * inside)
        found = self.join(x[0].permute(1, 2, 0).flatten(1))  # 1 C M B -> M D
        end = torch.where(is_clip, index, len(patches))
        return found.new_empty(len(patches) + 1, found.shape[1]).index_copy(0, end, found)[:-1]


def _convolutions(widths: list[int], refined: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Strided convolutions of so many channels, and residual ones after the first of them."""
    pairs = list(pairwise(widths))
    halve = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairs]
    refine = [nn.Conv2d(width, width, 3, padding=1) for _, width in pairs[:refined]]
    # No norm: colours and contrasts matter. These weights keep the scale of values nevertheless.
    for layer in (*halve, *refine):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    for layer in refine:
        layer.weight.data *= RESIDUAL
    return nn.ModuleList(halve), nn.ModuleList(refine)
