"""Layers without state: initial values, low-rank updates of matrices (LoRA, 2106.09685), RMSNorm and the dense MLP."""

# Dimensions: D width, F hidden, P products of the first matrix: 2F for swiglu (gate and up in one), F for gelu;
# I inputs, O outputs, r rank, E experts, B rows of S tokens

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_unary

from openm6.nn.config import Activation, DenseConfig, LoraConfig
from openm6.ops.matmul import grouped_mm, linear
from openm6.ops.pointwise import rms_norm, swiglu


def fill_normal(weight: Tensor, deviation: float) -> None:
    """Fill in place with normal values, cut at three standard deviations."""
    if has_torch_function_unary(weight):  # a mode, such as `NoInitWeights`
        handle_torch_function(fill_normal, (weight,), weight, deviation)
        return
    nn.init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)


class NoInitWeights(TorchFunctionMode):
    """Random first values are not drawn in this context: for modules whose weights are then all read from a file."""

    drawn = (fill_normal, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        named = dict(kwargs or {})
        # `nn.init` gives its arguments by name.
        return (args or [*named.values()])[0] if func in self.drawn else func(*args, **named)


class LowRank(nn.Module):
    """The update W + (alpha / r) · B · A of a stored matrix, for each of the projections in it that is a target.

    `a` is r I and `b` is O r for each of them; of experts E I r and E r O, as grouped products read them.
    """

    def __init__(self, config: LoraConfig, matrix: Tensor, outputs: dict[str, int]) -> None:
        """`matrix` is O I or E I O; `outputs`: the number of outputs of each projection, in their order."""
        super().__init__()
        self.scale, self.outputs, self.axis = config.scale, outputs, 0 if matrix.ndim == 2 else 2
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, size in outputs.items():
            if config.targets == "all-linear" or name in config.targets:
                a, b = torch.empty(config.r, matrix.shape[1]), torch.empty(size, config.r)
                if self.axis:
                    a, b = torch.empty(*matrix.shape[:2], config.r), torch.empty(len(matrix), config.r, size)
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
                part += (self.scale * (first[name] @ second[name])).to(part.device)


class UpdatesOfSome(NamedTuple):
    """Low-rank updates, by the name of the matrix, for the tokens at some `positions` of the flattened B S alone."""

    updates: nn.ModuleDict
    positions: Tensor

    def updated(self, name: str, y: Tensor, x: Tensor) -> Tensor:
        """The product y of a matrix with x, with the update of these tokens; others stay as they are.  # B S O"""
        if name not in self.updates:
            return y
        flat, index = y.flatten(0, 1), self.positions
        own = self.updates[name](flat[index], x.flatten(0, 1)[index])
        return flat.index_copy(0, index, own.to(y.dtype)).view_as(y)


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


class RMSNorm(nn.RMSNorm):
    """Divide by the root mean square of the last axis and multiply by a learned weight; torch's, by `ops.pointwise`."""

    eps: float

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
