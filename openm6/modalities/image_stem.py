"""Convolutions over whole images before they are cut into patches (early convolutions, arXiv 2106.14881)."""

# Letters: N tokens, F numbers in a patch, P side of a patch, I images of one size, C channels, D hidden size

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 128)  # channels at a half, a quarter and an eighth of the sides
RESIDUAL = 0.5  # of the norm of residual kernels at first
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


class StandardizedConv(nn.Conv2d):
    """A convolution whose kernels have a fixed norm, and unless it is the `first` the mean 0 (arXiv 2101.08692).

    Values after a ReLU are positive. With free kernels, their common part grows in training until all colours look
    alike: a layer norm follows the stem, so nothing holds its scale.
    """

    def __init__(self, before: int, after: int, stride: int = 1, gain: float = 1.0, first: bool = False) -> None:
        super().__init__(before, after, 3, stride=stride, padding=1)
        self.gain = nn.Parameter(torch.full((after,), gain * math.sqrt(2)))
        self.first = first
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        kernels = self.weight.flatten(1)
        if not self.first:
            kernels = kernels - kernels.mean(1, keepdim=True)
        kernels = F.normalize(kernels, dim=1) * self.gain[:, None]
        return F.conv2d(input, kernels.view_as(self.weight), self.bias, self.stride, self.padding)


class ConvStem(nn.Module):
    """Halves images by strided convolutions until a patch is one vector; each but the last has a residual one after it.

    Neighbouring patches of an image are read together; images never depend on each other.
    White, the background of most drawings and of all padding, is zero.
    """

    lr_scale = 0.2  # a step of Adam moves a sum of 1,152 positive values far

    def __init__(self, patch: int, hidden_size: int) -> None:
        super().__init__()
        self.patch = patch
        widths = [3, *widths_of(patch), hidden_size]
        pairs = list(pairwise(widths))
        halve = [StandardizedConv(*pair, stride=2, first=pair[0] == 3) for pair in pairs]
        refine = [StandardizedConv(width, width, gain=RESIDUAL) for width in widths[1:-1]]
        self.halve, self.refine = nn.ModuleList(halve), nn.ModuleList(refine)

    def forward(self, patches: Tensor, of_size: list[Tensor]) -> Tensor:
        """Vectors of patches; `of_size` are the tables of `by_size`.  # N F, I H/P W/P each -> N D"""
        vectors = []
        for index in of_size:
            _, down, across = index.shape
            grid = patches[index].view(-1, down, across, self.patch, self.patch, 3)
            images = 1 - grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, down * self.patch, across * self.patch)
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
