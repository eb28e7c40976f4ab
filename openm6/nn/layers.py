"""Layers without state: initial values, matrices with low-rank updates, RMSNorm and the dense MLP."""

# Dimensions: D width, F hidden, P products of the first matrix: 2F for swiglu (gate and up in one), F for gelu

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.nn.config import Activation, DenseConfig
from openm6.nn.lora import LowRank
from openm6.ops.matmul import linear
from openm6.ops.pointwise import rms_norm, swiglu


def fill_normal(weight: Tensor, deviation: float) -> None:
    """Fill in place with normal values, cut at three standard deviations."""
    nn.init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)


class Adaptable(nn.Module):
    """Base class of modules of two matrices, which may have low-rank updates, by the name of the matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = nn.ModuleDict()

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        """Normal first values, of another deviation in the last matrix, which adds to the residual stream."""
        first, last = self.parameters(recurse=False)
        fill_normal(first, deviation)
        fill_normal(last, output_deviation)

    def updated(self, name: str, y: Tensor, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """The product y of a matrix with x, with its update if it has one."""
        return self.lora[name](y, x, counts) if name in self.lora else y

    def merge_lora(self) -> None:
        for name, update in self.lora.items():
            assert isinstance(update, LowRank)
            update.merge_into(self.get_parameter(name))
        self.lora.clear()


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis and multiply by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # ... D -> ... D


def activate(x: Tensor, activation: Activation) -> Tensor:
    """... P -> ... F."""
    return swiglu(x) if activation == "swiglu" else F.gelu(x)


def first_width(hidden: int, activation: Activation) -> int:
    """P: columns of the first product."""
    return 2 * hidden if activation == "swiglu" else hidden


class MLP(Adaptable):
    """The dense feed-forward network; with swiglu, `up` is gate_proj and up_proj in one matrix."""

    def __init__(self, width: int, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Parameter(torch.empty(first_width(config.intermediate_size, config.hidden_act), width))  # P D
        self.down = nn.Parameter(torch.empty(width, config.intermediate_size))  # D F

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(self.updated("up", linear(x, self.up), x), self.config.hidden_act)  # ... D -> ... F
        return self.updated("down", linear(hidden, self.down), hidden)  # ... F -> ... D
