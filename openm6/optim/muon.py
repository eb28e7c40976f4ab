"""Muon: momentum whose matrices are orthogonalized before they are applied; AdamW for all other parameters."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from openm6.optim.adamw import AdamW
from openm6.optim.sharding import ShardSpec, ShardSpecOf, on_whole_matrices, replicated

STEPS = 5  # bring all but the tiniest singular values into about 0.7 to 1.2
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic with the steepest slope at zero (Jordan 2024)


def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalize matrices R C, or E R C, in `dtype`, by Newton–Schulz: X ← aX + (bA + cA²)X, A = XXᵀ."""
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    stack = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])  # E R C
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack  # the product A is smaller on the short side
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)


class Muon(AdamW):
    """Update matrices by orthogonalized Nesterov momentum, and groups with `muon: False` by AdamW.

    For 2-D parameters the rule is that of `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`; a 3-D parameter
    is a stack of matrices. A matrix whose rows are on several ranks is sent to one of them to be orthogonalized.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.1, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, dtype: torch.dtype | None = None,
        spec_of: ShardSpecOf = replicated,
    ) -> None:  # fmt: skip
        """`dtype`: of the orthogonalization (None: bfloat16 on a GPU, else float32); `spec_of`: how it is sharded."""
        groups = [{"muon": False, "momentum": momentum, **group} for group in params]
        for parameter in (parameter for group in groups if group["muon"] for parameter in group["params"]):
            if parameter.ndim not in (2, 3):
                raise ValueError(f"Muon takes matrices or stacks of them, not shape {tuple(parameter.shape)}")
        super().__init__(groups, lr, betas, eps, weight_decay, spec_of=spec_of)
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        super().step()
        for group in self.param_groups:
            if group["muon"]:
                self._update_matrices(group)

    def trained(self, group: dict[str, Any]) -> list[Tensor]:
        return [] if group["muon"] else super().trained(group)

    def _update_matrices(self, group: dict[str, Any]) -> None:
        """Whole matrices one tensor at a time; sharded ones after an exchange, those of one process group together."""
        sharded: dict[Any, list[tuple[Tensor, ShardSpec]]] = {}  # by process group
        for parameter in super().trained(group):
            spec = self.spec_of(parameter)
            if spec.shards_rows(parameter.ndim):
                sharded.setdefault(spec.group, []).append((parameter, spec))
                continue
            update = newton_schulz(self._lookahead(parameter, spec, group), self._dtype(parameter))
            self._apply(parameter, spec, update, group)
        for pairs in sharded.values():
            ahead = [self._lookahead(*pair, group).to(self._dtype(pair[0])) for pair in pairs]
            specs = [spec for _, spec in pairs]
            updates = on_whole_matrices(ahead, specs, lambda stack: newton_schulz(stack, stack.dtype))
            for (parameter, spec), update in zip(pairs, updates, strict=True):
                self._apply(parameter, spec, update, group)

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if parameter.is_cuda else torch.float32)

    def _lookahead(self, parameter: Tensor, spec: ShardSpec, group: dict[str, Any]) -> Tensor:
        """Update the momentum, and return Nesterov's look-ahead, of this rank's shard."""
        state = self.state[parameter]
        assert parameter.grad is not None
        gradient = spec.local(parameter.grad)
        if not state:
            state["momentum"] = spec.slot("momentum", torch.zeros_like(gradient))
        momentum = spec.local(state["momentum"])
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"])

    def _apply(self, parameter: Tensor, spec: ShardSpec, update: Tensor, group: dict[str, Any]) -> None:
        """Step by 0.2·sqrt(max(R, C)) (arXiv 2502.16982, section 2.2), as AdamW would: one rate serves all."""
        weight = spec.local(parameter)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * (0.2 * math.sqrt(max(parameter.shape[-2:])))
        weight.add_(update.to(weight.dtype), alpha=-rate)
