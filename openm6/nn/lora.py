"""Low-rank adapters (LoRA, 2106.09685): W + (alpha / r) · B · A for each projection that is a target."""

# Dimensions: I inputs, O outputs, r rank, E experts, R rows sorted by expert

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm6.nn.config import LoraConfig
from openm6.ops.matmul import grouped_mm, linear


class LowRank(nn.Module):
    """The update of one stored matrix, which holds several projections: a low-rank one for each that is a target.

    `a` is r I and `b` is O r for each of them; of experts E I r and E r O, as grouped products read them.
    """

    def __init__(self, config: LoraConfig, matrix: Tensor, outputs: dict[str, int]) -> None:
        """`matrix` is O I or E I O; `outputs`: the number of outputs of each projection, in their order."""
        super().__init__()
        self.scale, self.outputs, self.axis = config.scale, outputs, 0 if matrix.ndim == 2 else 2
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, size in outputs.items():
            if config.targets == "all-linear" or name in config.targets:
                a, b = matrix.new_empty(config.r, matrix.shape[1]), matrix.new_empty(size, config.r)
                if self.axis:
                    a, b = matrix.new_empty(*matrix.shape[:2], config.r), matrix.new_empty(len(matrix), config.r, size)
                self.a[name], self.b[name] = nn.Parameter(a), nn.Parameter(b)

    def reset_parameters(self) -> None:
        """Uniform values for A, as in a linear layer of torch, and zeros for B: the update is zero."""
        for a, b in zip(self.a.values(), self.b.values(), strict=True):
            bound = a.shape[1] ** -0.5
            nn.init.uniform_(a, -bound, bound)
            nn.init.zeros_(b)

    def forward(self, y: Tensor, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """The product y of the matrix with x, plus the update; counts: rows of each expert.  # ... O, ... I -> ... O"""

        def product(rows: Tensor, weight: Tensor) -> Tensor:
            return linear(rows, weight) if counts is None else grouped_mm(rows, weight, counts)

        parts = list(y.split(list(self.outputs.values()), -1))
        for index, name in enumerate(self.outputs):
            if name in self.a:
                parts[index] = parts[index] + self.scale * product(product(x, self.a[name]), self.b[name])
        return torch.cat(parts, -1)

    @torch.no_grad()
    def merge_into(self, matrix: Tensor) -> None:
        first, second = (self.a, self.b) if self.axis else (self.b, self.a)
        for name, part in zip(self.outputs, matrix.split(list(self.outputs.values()), self.axis), strict=True):
            if name in self.a:
                part += self.scale * (first[name] @ second[name])
