"""The sparse part against a loop over tokens and choices, for every way of routing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from openm6 import kernels
from openm6.nn import moe as module
from openm6.nn.config import ExpertsConfig
from openm6.nn.moe import Experts, LocalChunk, LocalDispatcher, Router, Routing
from tests.triton_interpreter import need_interpreter

WIDTH = 16

VARIANTS = {
    "top-2": {"top_k": 2},
    "top-2 as they are": {"top_k": 2, "norm_topk_prob": False},
    "top-1 gelu": {"top_k": 1, "hidden_act": "gelu", "norm_topk_prob": False},
    "prototypes": {"num_prototypes": 3},
    "shared": {"top_k": 2, "num_shared": 2},
    "capacity": {"top_k": 2, "capacity_factor": 0.6},
    "prototypes with capacity": {"num_prototypes": 2, "capacity_factor": 0.7, "hidden_act": "gelu"},
}


def make(config: ExpertsConfig, seed: int = 0) -> tuple[Experts, Router]:
    torch.manual_seed(seed)
    experts, router = Experts(WIDTH, config), Router(WIDTH, config)
    experts.reset_parameters(0.3, 0.3)
    router.reset_parameters(0.5)
    return experts, router


def network(x: Tensor, up: Tensor, down: Tensor, ffn: str) -> Tensor:
    hidden = x @ up
    if ffn == "gelu":
        return F.gelu(hidden) @ down
    gate, value = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down


def naive(experts: Experts, routing: Routing, x: Tensor, valid: Tensor, capacity: int | None) -> Tensor:
    """Each token through each of its experts, one at a time, in the order of the batch."""
    config, taken = experts.config, [0] * experts.config.num_experts
    answers = []
    for n, token in enumerate(x):
        total = torch.zeros(WIDTH)
        for gate, expert in zip(routing.gate[n], routing.chosen[n].tolist(), strict=True):
            fits = capacity is None or (bool(valid[n]) and taken[expert] < capacity)
            taken[expert] += fits
            if fits:
                total = total + gate * network(
                    token, experts.up[expert], experts.down[expert], config.hidden_act
                )
        if experts.shared is not None:
            total = total + network(token, experts.shared.up.t(), experts.shared.down.t(), config.hidden_act)
        answers.append(total)
    return torch.stack(answers)


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_the_loop(name):
    config = ExpertsConfig(intermediate_size=24, num_experts=6, **VARIANTS[name])
    experts, router = make(config)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    y, load = experts(x, router, valid, LocalDispatcher(), 5)
    capacity = None
    if config.capacity_factor is not None:
        capacity = -int(-config.experts_per_token * 18 * config.capacity_factor // 6)
        assert load.dropped > 0
    routing = router(x.flatten(0, 1), valid.flatten())
    twin = naive(experts, routing, x.flatten(0, 1), valid.flatten(), capacity).view_as(x)
    torch.testing.assert_close(y, twin)
    leaves = [x, *experts.parameters(), router.weight]
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, upstream, materialize_grads=True)
    theirs = torch.autograd.grad(twin, leaves, upstream, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


WITHOUT_DROPS = ["top-2", "top-2 as they are", "prototypes", "shared"]


def run_two_backends(
    name: str, other: str, monkeypatch, device: torch.device, dtype: torch.dtype
) -> list[list[Tensor]]:
    """Output and gradients of a layer by the general backend, then by another one."""
    experts, router = (
        part.to(device, dtype)
        for part in make(ExpertsConfig(intermediate_size=24, num_experts=6, **VARIANTS[name]))
    )
    x = torch.randn(2, 9, WIDTH, device=device, dtype=dtype, requires_grad=True)
    valid, upstream = torch.ones(2, 9, dtype=torch.bool, device=device), torch.randn_like(x)
    leaves, results = [x, *experts.parameters(), router.weight], []
    for backend in ("permute", other):
        monkeypatch.setattr(module, "choose_backend", lambda *_, choice=backend: choice)
        y, _ = experts(x, router, valid, LocalDispatcher(), 0)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    return results


@pytest.mark.parametrize("in_triton", [False, True], ids=["in plain torch", "in Triton's interpreter"])
@pytest.mark.parametrize("name", WITHOUT_DROPS)
def test_the_fused_backend_equals_the_general_one(name, in_triton, monkeypatch):
    if in_triton:
        need_interpreter()
        monkeypatch.setattr(kernels, "available", lambda device: True)
    pairs = run_two_backends(name, "fused", monkeypatch, torch.device("cpu"), torch.float32)
    for general, fused in zip(*pairs, strict=True):
        torch.testing.assert_close(fused, general, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", WITHOUT_DROPS)
def test_on_a_gpu_the_fused_backend_equals_the_general_one(name, monkeypatch):
    pairs = run_two_backends(name, "fused", monkeypatch, torch.device("cuda"), torch.bfloat16)
    for general, fused in zip(*pairs, strict=True):
        assert (fused - general).float().norm() <= 0.02 * general.float().norm()


@pytest.mark.parametrize("name", WITHOUT_DROPS)
def test_one_expert_after_the_other_equals_the_general_backend(name, monkeypatch):
    pairs = run_two_backends(name, "per_expert", monkeypatch, torch.device("cpu"), torch.float32)
    for general, per_expert in zip(*pairs, strict=True):
        torch.testing.assert_close(per_expert, general, rtol=1e-4, atol=1e-5)


def test_report_counts_valid_tokens_and_drops():
    config = ExpertsConfig(intermediate_size=8, num_experts=4, top_k=2, capacity_factor=0.5)
    experts, router = make(config)
    valid = torch.zeros(2, 10, dtype=torch.bool)
    valid[0] = True
    _, load = experts(torch.randn(2, 10, WIDTH), router, valid, LocalDispatcher(), 3)
    assert load.layer == 3
    assert load.load.sum() == 20
    kept = load.load.clamp(max=5).sum()  # capacity: 0.5 · 2 · 20 / 4
    torch.testing.assert_close(load.dropped, 1 - kept / 20)


def test_side_loss_holds_both_losses_and_reaches_the_router():
    config = ExpertsConfig(
        intermediate_size=8,
        num_experts=4,
        top_k=2,
        balance="aux",
        router_aux_loss_coef=0.3,
        router_z_loss_coef=0.2,
    )
    experts, router = make(config)
    _, load = experts(
        torch.randn(1, 10, WIDTH), router, torch.ones(1, 10, dtype=torch.bool), LocalDispatcher(), 0
    )
    torch.testing.assert_close(load.side_loss, 0.3 * load.aux_loss + 0.2 * load.z_loss)
    load.side_loss.backward()
    assert router.weight.grad is not None
    assert router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("choice", [{"top_k": 2}, {"num_prototypes": 2}])
def test_bias_brings_a_crooked_router_into_balance(choice):
    config = ExpertsConfig(intermediate_size=8, num_experts=8, balance="bias", balance_rate=0.02, **choice)
    _, router = make(config, seed=4)
    x = torch.randn(512, WIDTH) + 0.5 * torch.randn(WIDTH)
    valid = torch.ones(512, dtype=torch.bool)

    def expert_load_cv() -> float:
        load = router(x, valid).load
        return float(load.std(correction=0) / load.mean())

    before = expert_load_cv()
    for _ in range(200):
        router.update_balance(router(x, valid).load)
    assert before > 0.4
    assert expert_load_cv() < 0.1


def test_without_bias_balancing_there_is_no_bias():
    config = ExpertsConfig(intermediate_size=8, num_experts=4, top_k=1, balance="none")
    _, router = make(config)
    assert dict(router.named_buffers()) == {}
    router.update_balance(torch.tensor([9.0, 0.0, 0.0, 0.0]))


def test_exchange_sees_sorted_rows_and_gates_stay_home():
    """A stand-in for other devices: it doubles the answers, and so must the layer's output."""

    class Doubling(LocalDispatcher):
        def dispatch(self, rows: Tensor, counts: Tensor, capacity: int | None) -> list[LocalChunk]:
            assert len(rows) == counts.sum() == 2 * 10 and capacity is None
            return super().dispatch(rows, counts, capacity)

        def collect(self, parcels: list[LocalChunk]) -> Tensor:
            return 2 * super().collect(parcels)

    config = ExpertsConfig(intermediate_size=8, num_experts=4, top_k=2)
    experts, router = make(config)
    x, valid = torch.randn(1, 10, WIDTH), torch.ones(1, 10, dtype=torch.bool)
    plain, _ = experts(x, router, valid, LocalDispatcher(), 0)
    doubled, _ = experts(x, router, valid, Doubling(), 0)
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.parametrize(
    ("wrong", "mend"),
    [
        ({}, "either top_k or num_prototypes"),
        ({"top_k": 1, "num_prototypes": 2}, "either top_k or num_prototypes"),
        ({"top_k": 9}, "lower top_k or raise num_experts"),
        ({"num_prototypes": 3}, "multiple of num_prototypes"),
        ({"top_k": 1, "intermediate_size": 12}, "multiple of 8"),
    ],
)
def test_config_names_the_mend(wrong, mend):
    with pytest.raises(ValidationError, match=mend):
        ExpertsConfig(**{"intermediate_size": 8, "num_experts": 8, **wrong})
