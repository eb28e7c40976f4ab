"""Convolutions over spectra of whole recordings, beside a linear layer of each patch."""

# Letters: N tokens, F numbers in a patch, P frames in a patch, M mels, I recordings of one length, C channels,
# T patches of a recording, D hidden size

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.modalities.image_stem import RESIDUAL, StandardizedConv

WIDTHS = (24, 48, 64)  # channels at a half, a quarter and an eighth of frames and mels
SILENCE = -2.0  # log-mels of about unit variance; what is quieter counts as silence, and so does all padding


class Convolutions(nn.Module):
    """Halves frames and mels by strided convolutions until a patch is one frame, each with a residual one after it."""

    lr_scale = 0.2  # as of the stem of images

    def __init__(self) -> None:
        super().__init__()
        pairs = list(pairwise((1, *WIDTHS)))
        self.halve = nn.ModuleList(StandardizedConv(*pair, stride=2, first=pair[0] == 1) for pair in pairs)
        self.refine = nn.ModuleList(StandardizedConv(width, width, gain=RESIDUAL) for width in WIDTHS)

    def forward(self, spectra: Tensor) -> Tensor:
        """# I 1 T*P M -> I C T M/P"""
        x = F.relu(spectra - SILENCE).contiguous(memory_format=torch.channels_last)
        for halve, refine in zip(self.halve, self.refine, strict=True):
            x = F.relu(halve(x))
            x = x + F.relu(refine(x))
        return x


class SpectrumStem(nn.Linear):
    """A linear layer of each patch, and convolutions over its recording, whose results are added: zero at first.

    Convolutions find the same shape in any patch and at another pitch, so few voices suffice to read others.
    """

    def __init__(self, frames: int, mels: int, hidden_size: int) -> None:
        super().__init__(frames * mels, hidden_size)
        self.mels = mels
        self.convolutions = Convolutions()
        self.join = nn.Linear(WIDTHS[-1] * -(-mels // 2 ** len(WIDTHS)), hidden_size, bias=False)
        nn.init.zeros_(self.join.weight)

    def forward(self, input: Tensor, of_length: list[Tensor]) -> Tensor:
        """Vectors of patches; `of_length` are the tables of `by_size`, of one row each.  # N F, I 1 T each -> N D"""
        added = []
        for index in of_length:
            found = self.convolutions(input[index].view(len(index), 1, -1, self.mels))
            added.append(self.join(found.permute(0, 2, 1, 3).flatten(2)).flatten(0, 1))  # I C T M/P -> I*T D
        order = torch.cat([index.flatten() for index in of_length])
        linear = super().forward(input)
        return linear.index_add(0, order, torch.cat(added).to(linear.dtype))
