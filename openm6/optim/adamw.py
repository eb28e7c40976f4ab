"""AdamW (arXiv 1711.05101), its moments in any dtype, with optional stochastic rounding of bf16 weights."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from openm6 import kernels
from openm6.core.seeds import derive_seed
from openm6.optim.low_precision import random_bits, round_to_bf16
from openm6.optim.sharding import ShardSpecOf, replicated

State = dict[str, Any]  # of a parameter: `step`, `exp_avg` and `exp_avg_sq`


class AdamW(torch.optim.Optimizer):
    """Update every parameter by its two moments: on a GPU by one Triton kernel, elsewhere as torch does, to the bit."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.1, state_dtype: torch.dtype | None = None, stochastic: bool = False,
        spec_of: ShardSpecOf = replicated,
    ) -> None:  # fmt: skip
        """`state_dtype` None: each moment has its parameter's dtype. `stochastic`: bf16 results are rounded by random
        bits, which differ between shards of a parameter. `spec_of` returns how a parameter is sharded.

        Steps are counted on the host; checkpoints have the same names as torch's AdamW.
        """
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_dtype, self.stochastic, self.spec_of = state_dtype, stochastic, spec_of
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        # A number on the device: if it is NaN instead of 0, `step` changes nothing, but `uncount` must be called later.
        self.skip: Tensor | None = None
        self._counted: list[State] = []  # those whose step the last update counted on the host

    @property
    def skips_on_device(self) -> bool:
        """Whether an update can be left out by a number on the device, which the host has not read."""
        plain = not self.stochastic and self.state_dtype is None
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return type(self) is AdamW and all(
            (part.is_contiguous() and kernels.available(part.device)) or (part.is_cpu and plain)
            for part in (self.spec_of(parameter).local(parameter) for parameter in parameters)
        )

    def uncount(self) -> None:
        """Take back the count of the last update, which the device has left out."""
        for state in self._counted:
            state["step"] -= 1

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        in_kernel: list[tuple[Tensor, State]] = []
        for group in self.param_groups:
            plain: list[Tensor] = []
            for parameter in self.trained(group):
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    for key in ("exp_avg", "exp_avg_sq"):
                        state[key] = torch.zeros_like(parameter, dtype=self.state_dtype or parameter.dtype)
                part = self.spec_of(parameter).local(parameter)
                if kernels.available(part.device) and part.is_contiguous():
                    state["step"] += 1
                    in_kernel.append((parameter, group))
                elif self.stochastic or self.state_dtype is not None:
                    state["step"] += 1
                    adamw_reference(*self._local(parameter), group, self.stochastic, self._seed(parameter))
                else:
                    plain.append(parameter)
            if plain:
                gradients = [parameter.grad for parameter in plain if parameter.grad is not None]
                found_inf = None if self.skip is None else self.skip.isnan().float()
                adamw_update(plain, gradients, [self.state[one] for one in plain], group, found_inf)
        self._counted = [self.state[parameter] for parameter, _ in in_kernel]
        if in_kernel:
            self._run_kernels(in_kernel)

    def trained(self, group: dict[str, Any]) -> list[Tensor]:
        return [parameter for parameter in group["params"] if parameter.grad is not None]

    def _local(self, parameter: Tensor) -> tuple[Tensor, Tensor, State]:
        local = self.spec_of(parameter).local
        assert parameter.grad is not None
        state = {key: local(value) for key, value in self.state[parameter].items()}
        return local(parameter), local(parameter.grad), state

    def _seed(self, parameter: Tensor) -> int:
        if not self.stochastic:
            return 0
        step, index = int(self.state[parameter]["step"]), self._index[id(parameter)]
        group = self.spec_of(parameter).group
        shard = () if group is None else (group.rank(),)
        return derive_seed(0, "rounding", step, index, *shard) % 2**31

    def _run_kernels(self, updated: list[tuple[Tensor, dict[str, Any]]]) -> None:
        """One kernel for all tensors of the same dtypes; addresses, coefficients and seeds are sent to the device."""
        # Triton is optional.
        from openm6.kernels import optimizers  # noqa: PLC0415

        launches: dict[tuple[Any, ...], list[tuple[tuple[Tensor, ...], tuple[float, ...], int]]] = {}
        for parameter, group in updated:
            weight, gradient, state = self._local(parameter)
            tensors = weight, gradient.contiguous(), state["exp_avg"], state["exp_avg_sq"]
            like = optimizers.alignment(tensors), weight.device, *(tensor.dtype for tensor in tensors)
            numbers = coefficients(group, float(state["step"]))
            launch = launches.setdefault((group["betas"], group["eps"], *like), [])
            launch.append((tensors, numbers, self._seed(parameter)))
        for (betas, epsilon, aligned, *_), rows in launches.items():
            tensors_of, numbers_of, seeds = zip(*rows, strict=True)
            optimizers.adamw_update(
                tensors_of, numbers_of, seeds, betas, epsilon, self.stochastic, aligned, self.skip
            )  # fmt: skip


def adamw_update(
    weights: list[Tensor], gradients: list[Tensor], states: Sequence[State], group: dict[str, Any],
    found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """Count a step and update weights and moments in place, by torch's fused kernel; not at all if `found_inf` is 1.

    group: `lr`, `betas`, `eps`, `weight_decay`; on a GPU the kernel counts steps that are there.
    """
    first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
    fused = steps[0].device == weights[0].device
    beta1, beta2 = group["betas"]
    adamw(
        weights, gradients, first, second, [], steps,
        fused=fused, foreach=not fused, found_inf=found_inf, amsgrad=False, beta1=beta1, beta2=beta2,
        lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip


def coefficients(group: dict[str, Any], step: float) -> tuple[float, float, float, float]:
    """Return the scalars of step t: lr, lr · weight decay, 1/(1 − β1ᵗ), 1/sqrt(1 − β2ᵗ)."""
    first, second = (1 - beta**step for beta in group["betas"])
    return group["lr"], group["lr"] * group["weight_decay"], 1 / first, 1 / math.sqrt(second)


def adamw_reference(
    parameter: Tensor, gradient: Tensor, state: State, group: dict[str, Any], stochastic: bool, seed: int
) -> None:
    """Update as the kernel does, in plain torch: the same rule in fp32, the same random bits."""
    rate, decay, first_scale, second_scale = coefficients(group, float(state["step"]))
    beta1, beta2 = group["betas"]
    p, g = parameter.float(), gradient.float()
    m, v = state["exp_avg"].float(), state["exp_avg_sq"].float()
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    p = p - decay * p
    p = p - rate * (m * first_scale) / (v.sqrt() * second_scale + group["eps"])
    bits = random_bits(1, p.numel(), seed, device=p.device).view(p.shape)
    for target, value, noise in ((parameter, p, bits), (state["exp_avg_sq"], v, bits >> 16)):
        rounded = stochastic and target.dtype == torch.bfloat16
        target.copy_(round_to_bf16(value, noise) if rounded else value)
    state["exp_avg"].copy_(m)
