"""AdamW (arXiv 1711.05101) whose update is one pass over memory, with moments of any dtype and rounding by chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openm6 import kernels
from openm6.base.seeds import derive_seed
from openm6.optim.pieces import Pieces, whole
from openm6.optim.rounding import random_bits, round_to_bf16


class AdamW(torch.optim.Optimizer):
    """Moves every parameter by its two moments.

    On a GPU with Triton one kernel per tensor reads and writes each number once; what changes from step to step lies
    on the device, so nothing waits. Elsewhere, and without stochastic rounding, it is torch's own fused update, bit
    for bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        state_dtype: torch.dtype | None = None,
        stochastic: bool = False,
        seed: int = 0,
        pieces: Pieces = whole,
    ) -> None:
        """`state_dtype` None: each moment has its parameter's dtype. `stochastic`: bf16 results are rounded by chance,
        the parts of a cut parameter by bits of their own. `pieces` says how a parameter lies here.

        Steps are counted on the host; checkpoints hold the same names as torch's AdamW.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.state_dtype, self.stochastic, self.seed = state_dtype, stochastic, seed
        self.pieces = pieces
        self.scale: Tensor | None = None  # on the device: a factor on all gradients; not a number: no update
        self._places = {
            id(parameter): place
            for place, parameter in enumerate(p for group in self.param_groups for p in group["params"])
        }
        self._sent: tuple[Tensor, Tensor] | None = None  # numbers and seeds of all parameters, on the device

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; `closure` may recompute the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        self._apply()
        return loss

    def _advance(self) -> None:
        """Count the step of each parameter that has a gradient and send its numbers to the device."""
        moved = self._moved()
        for parameter, _ in moved:
            state = self._state(parameter)
            if not self._is_plain(parameter):  # torch's own pass counts by itself
                state["step"] += 1
        on_device = [(parameter, group) for parameter, group in moved if self._in_kernel(parameter)]
        if on_device:
            self._send(on_device)

    def _apply(self) -> None:
        """The update itself, with the numbers of the last `_advance`."""
        plain: dict[int, list[Tensor]] = {}
        for parameter, group in self._moved():
            if self._in_kernel(parameter):
                self._pass(parameter, group)
            elif not self._is_plain(parameter):
                weight, gradient, state = self._local(parameter)
                adamw_reference(weight, gradient, state, group, self.stochastic, self._seed(parameter))
            else:
                plain.setdefault(id(group), []).append(parameter)
        for group in self.param_groups:
            if id(group) in plain:
                self._fused(plain[id(group)], group)

    def _moved(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _in_kernel(self, parameter: Tensor) -> bool:
        part = self.pieces(parameter).local(parameter)
        return kernels.available(part.device) and part.is_contiguous()

    def _local(self, parameter: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Weight, gradient and moments, as far as they lie here."""
        local = self.pieces(parameter).local
        assert parameter.grad is not None
        state = {key: local(value) for key, value in self.state[parameter].items()}
        return local(parameter), local(parameter.grad), state

    def _is_plain(self, parameter: Tensor) -> bool:
        return not (self._in_kernel(parameter) or self.stochastic or self.state_dtype is not None)

    def _state(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            dtype = self.state_dtype or parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _seed(self, parameter: Tensor) -> int:
        if not self.stochastic:
            return 0
        step, place = int(self.state[parameter]["step"]), self._places[id(parameter)]
        group = self.pieces(parameter).group
        part = () if group is None else (group.rank,)
        return derive_seed(self.seed, "rounding", step, place, *part) % 2**31

    def _send(self, moved: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """To the same tensors on the device each time; nothing waits."""
        device, count = moved[0][0].device, len(self._places)
        if self._sent is None or self._sent[0].device != device:
            numbers = torch.zeros(count, 4, device=device)
            self._sent = numbers, torch.zeros(count, dtype=torch.int64, device=device)
        if self.scale is None or self.scale.device != device:
            self.scale = torch.ones((), device=device)
        rows, seeds = [(0.0, 0.0, 0.0, 0.0)] * count, [0] * count
        for parameter, group in moved:
            place = self._places[id(parameter)]
            rows[place] = rule_numbers(group, float(self.state[parameter]["step"]))
            seeds[place] = self._seed(parameter)
        self._sent[0].copy_(torch.tensor(rows), non_blocking=True)
        self._sent[1].copy_(torch.tensor(seeds), non_blocking=True)

    def _pass(self, parameter: Tensor, group: dict[str, Any]) -> None:
        place = self._places[id(parameter)]
        assert self._sent is not None and self.scale is not None
        weight, gradient, state = self._local(parameter)
        numbers, seeds = self._sent
        # Triton is optional.
        from openm6.kernels import optimizers  # noqa: PLC0415

        optimizers.adamw_update(
            weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"],
            numbers[place], self.scale, seeds[place], group["betas"], group["eps"], self.stochastic,
        )  # fmt: skip

    def _fused(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        on_host = (
            parameters[0].device.type == "cpu"
        )  # elsewhere the fused pass wants its counts on the device
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=on_host,
            foreach=not on_host,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def rule_numbers(group: dict[str, Any], step: float) -> tuple[float, float, float, float]:
    """Rate, rate · decay, 1/(1 − β1ᵗ), 1/sqrt(1 − β2ᵗ): what the rule needs beside the tensors in step t."""
    first, second = (1 - beta**step for beta in group["betas"])
    return group["lr"], group["lr"] * group["weight_decay"], 1 / first, 1 / math.sqrt(second)


def adamw_reference(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    stochastic: bool,
    seed: int,
) -> None:
    """The naive twin of the kernel: the same rule in fp32, the same bits for rounding."""
    rate, decay, first_scale, second_scale = rule_numbers(group, float(state["step"]))
    beta1, beta2 = group["betas"]
    p, g = parameter.float(), gradient.float()
    m, v = state["exp_avg"].float(), state["exp_avg_sq"].float()
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    p = p - decay * p
    p = p - rate * (m * first_scale) / (v.sqrt() * second_scale + group["eps"])
    bits = random_bits(1, p.numel(), seed, device=p.device).view(p.shape)
    _put(parameter, p, bits, stochastic)
    _put(state["exp_avg"], m, bits, False)
    _put(state["exp_avg_sq"], v, bits >> 16, stochastic)


def _put(target: Tensor, value: Tensor, bits: Tensor, stochastic: bool) -> None:
    by_chance = stochastic and target.dtype == torch.bfloat16
    target.copy_(round_to_bf16(value, bits) if by_chance else value)
