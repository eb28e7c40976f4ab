"""Convolutions over whole images before they are cut into patches (early convolutions, arXiv 2106.14881)."""

# Letters: N tokens, F numbers in a patch, P side of a patch, I images of one size, C channels, D hidden size

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128)  # channels at a half, a quarter and an eighth of the sides
RESIDUAL = 0.5  # factor on the first weights of residual convolutions
IMAGES = 4  # images computed at once are a multiple of this: a library compiles kernels for each number of them
OF_SIZE = "images of size "  # and a number: a table of `by_size` among the arrays of tokens
SIDES = 2**20  # above any number of patches along a side


def widths_of(patch: int) -> tuple[int, ...]:
    """Channels at a half, a quarter, … of the sides, before a patch of `patch` pixels along a side is one vector."""
    return WIDTHS[: patch.bit_length() - 2]


def kept_elements(patch: int) -> int:
    """Elements that the stem keeps of a patch for its backward pass (a test checks it): pixels, and each map thrice."""
    return 3 * patch**2 + sum(3 * width * (patch >> level) ** 2 for level, width in enumerate(widths_of(patch), 1))


def by_size(shapes: np.ndarray) -> dict[str, np.ndarray]:
    """For each size of images, their patches; the shapes of these tables are the sizes.  # N 2 -> I H/P W/P each"""
    down, across = shapes.T
    tables = {}
    for number, size in enumerate(np.unique(down * SIDES + across).tolist()):
        own = np.flatnonzero(down * SIDES + across == size)
        tables[f"{OF_SIZE}{number}"] = own.reshape(-1, *divmod(size, SIDES))
    return tables


class ConvStem(nn.Module):
    """Halves images by strided convolutions until a patch is one vector; each but the last has a residual one after it.

    Neighbouring patches of an image are read together; images never depend on each other.
    """

    def __init__(self, patch: int, hidden_size: int) -> None:
        super().__init__()
        self.patch = patch
        widths = [3, *widths_of(patch), hidden_size]
        pairs = list(pairwise(widths))
        halve = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairs]
        refine = [nn.Conv2d(width, width, 3, padding=1) for width in widths[1:-1]]
        # No norm: colours and contrasts matter. These weights keep the scale of values nevertheless.
        for layer in (*halve, *refine):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        for layer in refine:
            layer.weight.data *= RESIDUAL
        self.halve, self.refine = nn.ModuleList(halve), nn.ModuleList(refine)

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
