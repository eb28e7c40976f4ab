"""Muon: momentum whose matrices are made orthogonal before they are applied; AdamW for all that is not a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openm6.optim.pieces import Piece, Pieces, whole
from openm6.optim.whole_matrices import on_whole_matrices

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero (Jordan 2024)


def orthogonalise(matrices: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """The nearest matrix with (nearly) equal singular values, by Newton–Schulz: X ← aX + (bA + cA²)X, A = XXᵀ.

    Args:
        matrices: `R C`, or `E R C` for a stack of expert matrices, each taken for itself.
        dtype: in which to iterate; bfloat16 is exact enough, but a processor without units for it is slower in it.
        steps: iterations; five bring all but the tiniest singular values into about 0.7 to 1.2.

    Returns:
        The same shape in `dtype`.
    """
    a, b, c = NEWTON_SCHULZ
    stack = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])  # E R C
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack  # the product A is smaller on the short side
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


def rate_ratio(rows: int, columns: int) -> float:
    """Factor on the rate that gives an orthogonal update the size of a typical AdamW update.

    0.2·sqrt(max(R, C)) (Liu et al. 2025, arXiv 2502.16982, section 2.2): one learning rate then serves all groups.
    """
    return 0.2 * math.sqrt(max(rows, columns))


class Muon(torch.optim.Optimizer):
    """Moves matrices by orthogonalised Nesterov momentum, and groups with `muon: False` by AdamW.

    For 2-D parameters the rule is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`; a 3-D parameter
    is a stack of matrices. A matrix whose rows lie on several ranks visits one of them, which makes it orthogonal.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
        pieces: Pieces = whole,
    ) -> None:
        """`dtype` is that of the orthogonalisation (None: bfloat16 on a GPU, float32 elsewhere); `pieces` says how a
        parameter lies here."""
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "muon": False, "fused": True})
        self.dtype, self.pieces = dtype, pieces
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["muon"] and parameter.ndim not in (2, 3):
                    raise ValueError(
                        f"Muon takes matrices or stacks of them, not shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; `closure` may recompute the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["muon"]:
                self._move_matrices(trained, group)
            elif trained:
                self._move_rest(trained, group)
        return loss

    def _move_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Whole matrices one tensor at a time; those in parts after they have visited, those of one group together."""
        travelling: dict[int, list[tuple[Tensor, Piece]]] = {}
        for parameter in parameters:
            piece = self.pieces(parameter)
            if piece.cuts_rows(parameter.ndim):
                travelling.setdefault(id(piece.group), []).append((parameter, piece))
                continue
            self._apply(
                parameter,
                piece,
                orthogonalise(self._ahead(parameter, piece, group), self._dtype(parameter)),
                group,
            )
        for pairs in travelling.values():
            ahead = [
                self._ahead(parameter, piece, group).to(self._dtype(parameter)) for parameter, piece in pairs
            ]
            pieces = [piece for _, piece in pairs]
            updates = on_whole_matrices(ahead, pieces, lambda stack: orthogonalise(stack, stack.dtype))
            for (parameter, piece), update in zip(pairs, updates, strict=True):
                self._apply(parameter, piece, update, group)

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if parameter.is_cuda else torch.float32)

    def _ahead(self, parameter: Tensor, piece: Piece, group: dict[str, Any]) -> Tensor:
        """Takes the gradient into the momentum, and gives Nesterov's look ahead, as far as they lie here."""
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = piece.local(parameter.grad)
        if not state:
            state["momentum"] = piece.slot("momentum", torch.zeros_like(gradient))
        momentum = piece.local(state["momentum"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"])

    def _apply(self, parameter: Tensor, piece: Piece, update: Tensor, group: dict[str, Any]) -> None:
        weight = piece.local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * rate_ratio(*parameter.shape[-2:])
        weight.add_(update.to(weight.dtype), alpha=-rate)

    def _move_rest(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
