"""The sparse part against a loop over tokens and choices, for every way of routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from openm6 import kernels
from openm6.nn.block import build_block
from openm6.nn.config import AttentionConfig, ExpertsConfig, LoraConfig, ModalityExpertsConfig
from openm6.nn.layers import MLP, UpdatesOfSome
from openm6.nn.moe import Experts, MoE, Router, RouterStats, Routing, TokenDispatcher
from openm6.ops import moe as module
from openm6.ops.moe import balance_loss, choose_backend, z_loss
from tests.devices import CPU, on_each_device
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


def make(config: ExpertsConfig, seed: int = 0) -> MoE:
    torch.manual_seed(seed)
    shared = None if config.shared is None else MLP(WIDTH, config.shared)
    moe = MoE(Router(WIDTH, config), Experts(WIDTH, config), shared)
    moe.experts.reset_parameters(0.3, 0.3)
    if shared is not None:
        shared.reset_parameters(0.3, 0.3)
    moe.router.reset_parameters(0.5)
    return moe


def network(x: Tensor, up: Tensor, down: Tensor, ffn: str) -> Tensor:
    hidden = x @ up
    if ffn == "gelu":
        return F.gelu(hidden) @ down
    gate, value = hidden.chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down


def naive(moe: MoE, routing: Routing, x: Tensor, valid: Tensor, capacity: int | None) -> Tensor:
    """Each token through each of its experts, one at a time, in the order of the batch."""
    experts, shared, config = moe.experts, moe.shared_experts, moe.experts.config
    taken = [0] * config.num_experts
    answers = []
    for n, token in enumerate(x):
        total = torch.zeros(WIDTH)
        for gate, expert in zip(routing.gate[n], routing.chosen[n].tolist(), strict=True):
            fits = capacity is None or (bool(valid[n]) and taken[expert] < capacity)
            taken[expert] += fits
            if fits:
                total = total + gate * network(token, experts.up[expert], experts.down[expert], config.hidden_act)
        if shared is not None:
            total = total + network(token, shared.up.t(), shared.down.t(), config.hidden_act)
        answers.append(total)
    return torch.stack(answers)


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_the_loop(name):
    config = ExpertsConfig(intermediate_size=24, num_experts=6, **VARIANTS[name])
    moe = make(config)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, 6:] = False
    y, load = moe(x, valid, TokenDispatcher(), 5)
    capacity = None
    if config.capacity_factor is not None:
        capacity = -int(-config.experts_per_token * 18 * config.capacity_factor // 6)
        assert load.dropped > 0
    routing = moe.router(x.flatten(0, 1), valid.flatten())
    reference = naive(moe, routing, x.flatten(0, 1), valid.flatten(), capacity).view_as(x)
    torch.testing.assert_close(y, reference)
    leaves = [x, *moe.parameters()]
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, upstream, materialize_grads=True)
    theirs = torch.autograd.grad(reference, leaves, upstream, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


WITHOUT_DROPS = ["top-2", "top-2 as they are", "prototypes", "shared"]


def run_two_backends(
    name: str, other: str, monkeypatch, device: torch.device, dtype: torch.dtype
) -> list[list[Tensor]]:
    """Output and gradients of a layer by the general backend, then by another one."""
    moe = make(ExpertsConfig(intermediate_size=24, num_experts=6, **VARIANTS[name])).to(device, dtype)
    x = torch.randn(2, 9, WIDTH, device=device, dtype=dtype, requires_grad=True)
    valid, upstream = torch.ones(2, 9, dtype=torch.bool, device=device), torch.randn_like(x)
    leaves, results = [x, *moe.parameters()], []
    for backend in ("permute", other):
        monkeypatch.setattr(module, "choose_backend", lambda *_, choice=backend: choice)
        y, _ = moe(x, valid, TokenDispatcher(), 0)
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


def layer_results(moe: MoE, x: Tensor, upstream: Tensor, autocast: bool = False) -> list[Tensor]:
    """Output and gradients of a layer with all tokens valid, in fp32 on the CPU."""
    x = x.clone().requires_grad_()
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast):
        y, _ = moe(x, valid, TokenDispatcher(), 0)
    found = torch.autograd.grad(y, [x, *moe.parameters()], upstream.to(y.dtype))
    return [tensor.detach().float().cpu() for tensor in (y, *found)]


@on_each_device
@pytest.mark.parametrize("way", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("name", WITHOUT_DROPS)
def test_the_backend_of_a_device_gives_what_one_expert_after_the_other_gives(name, way, device, monkeypatch):
    """Of all that a device chooses by itself; bf16 on a GPU is the fused backend, with or without autocast."""
    moe = make(ExpertsConfig(intermediate_size=24, num_experts=6, **VARIANTS[name]))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(parameter.bfloat16())  # the same router in both precisions, and so the same choices
    x, upstream = torch.randn(2, 64, WIDTH).bfloat16().float(), torch.randn(2, 64, WIDTH)
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose_backend", lambda *_: "per_expert")
        expected = layer_results(moe, x, upstream)
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    chosen = []
    monkeypatch.setattr(module, "choose_backend", lambda *words: chosen.append(choose_backend(*words)) or chosen[-1])
    found = layer_results(moe.to(device, dtype), x.to(device, dtype), upstream.to(device), way == "autocast")
    choices = {"permute", "per_expert"} if device == CPU else {"permute" if way == "fp32" else "fused"}
    assert len(chosen) == 1 and set(chosen) <= choices
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= (1e-4 if way == "fp32" else 0.03) * theirs.norm()


def test_report_counts_valid_tokens_and_drops():
    config = ExpertsConfig(intermediate_size=8, num_experts=4, top_k=2, capacity_factor=0.5)
    moe = make(config)
    valid = torch.zeros(2, 10, dtype=torch.bool)
    valid[0] = True
    _, load = moe(torch.randn(2, 10, WIDTH), valid, TokenDispatcher(), 3)
    assert load.layer == 3
    assert load.load.sum() == 20
    kept = load.load.clamp(max=5).sum()  # capacity: 0.5 · 2 · 20 / 4
    torch.testing.assert_close(load.dropped, 1 - kept / 20)


def test_a_trained_model_drops_no_token():
    limited, free = (make(ExpertsConfig(intermediate_size=8, num_experts=4, top_k=2, capacity_factor=one)).eval()
                     for one in (0.5, None))  # fmt: skip
    free.load_state_dict(limited.state_dict())
    x, valid = torch.randn(2, 10, WIDTH), torch.ones(2, 10, dtype=torch.bool)
    (y, stats), (expected, _) = (moe(x, valid, TokenDispatcher(), 0) for moe in (limited, free))
    torch.testing.assert_close(y, expected)
    assert stats.dropped == 0


@pytest.mark.parametrize(("load", "cv"), [([7.0, 7.0, 7.0], 0.0), ([0.0, 0.0, 0.0, 4.0], 3.0**0.5)])
def test_load_cv(load, cv):
    zero = torch.zeros(())
    assert float(RouterStats(0, torch.tensor(load), zero, zero).load_cv) == pytest.approx(cv)


def test_capacity_is_at_least_one_row():
    moe = make(ExpertsConfig(intermediate_size=8, num_experts=100, top_k=1, capacity_factor=1.0))
    _, stats = moe(torch.randn(1, 1, WIDTH), torch.ones(1, 1, dtype=torch.bool), TokenDispatcher(), 0)
    assert stats.dropped == 0


def test_bias_rises_for_the_starved_and_falls_for_the_crowded():
    router = make(ExpertsConfig(intermediate_size=8, num_experts=3, top_k=1, balance_rate=0.5)).router
    router.update_balance(torch.tensor([2.0, 4.0, 6.0]))
    assert router.bias.tolist() == [0.5, 0.0, -0.5]


def test_side_loss_holds_both_losses_and_reaches_the_router():
    config = ExpertsConfig(
        intermediate_size=8,
        num_experts=4,
        top_k=2,
        balance="aux",
        router_aux_loss_coef=0.3,
        router_z_loss_coef=0.2,
    )
    moe, x, valid = make(config), torch.randn(1, 10, WIDTH), torch.ones(1, 10, dtype=torch.bool)
    _, load = moe(x, valid, TokenDispatcher(), 0)
    logits = x[0] @ moe.router.weight.t()
    balance = balance_loss(logits.softmax(-1), load.load, valid[0])
    torch.testing.assert_close(load.side_loss, 0.3 * balance + 0.2 * z_loss(logits, valid[0]))
    load.side_loss.backward()
    assert moe.router.weight.grad is not None
    assert moe.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("choice", [{"top_k": 2}, {"num_prototypes": 2}])
def test_bias_brings_a_crooked_router_into_balance(choice):
    config = ExpertsConfig(intermediate_size=8, num_experts=8, balance="bias", balance_rate=0.02, **choice)
    router = make(config, seed=4).router
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
    router = make(config).router
    assert dict(router.named_buffers()) == {}
    router.update_balance(torch.tensor([9.0, 0.0, 0.0, 0.0]))


def test_a_dispatcher_gets_sorted_rows_without_gates():
    """A stand-in for other devices: it doubles the answers, and so must the layer's output."""

    class Doubling(TokenDispatcher):
        def exchange(self, rows: Tensor, counts: Tensor, capacity: int | None, *computed: Any) -> Any:
            assert len(rows) == counts.sum() == 2 * 10 and capacity is None
            outputs, result = super().exchange(rows, counts, capacity, *computed)
            return 2 * outputs, result

    config = ExpertsConfig(intermediate_size=8, num_experts=4, top_k=2)
    moe = make(config)
    x, valid = torch.randn(1, 10, WIDTH), torch.ones(1, 10, dtype=torch.bool)
    plain, _ = moe(x, valid, TokenDispatcher(), 0)
    doubled, _ = moe(x, valid, Doubling(), 0)
    torch.testing.assert_close(doubled, 2 * plain)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({}, "either top_k or num_prototypes"),
        ({"top_k": 1, "num_prototypes": 2}, "either top_k or num_prototypes"),
        ({"top_k": 9}, "lower top_k or raise num_experts"),
        ({"num_prototypes": 3}, "multiple of num_prototypes"),
        ({"top_k": 1, "intermediate_size": 12}, "multiple of 8"),
    ],
)
def test_config_names_the_fix(wrong, fix):
    with pytest.raises(ValidationError, match=fix):
        ExpertsConfig(**{"intermediate_size": 8, "num_experts": 8, **wrong})


def test_the_gate_of_one_expert_depends_on_the_router_unless_it_is_set():
    one = {"intermediate_size": 8, "num_experts": 4, "top_k": 1}
    assert not ExpertsConfig(**one).norm_topk_prob and ExpertsConfig(**one, norm_topk_prob=True).norm_topk_prob
    assert ExpertsConfig(**{**one, "top_k": 2}).norm_topk_prob


def test_updates_of_the_queries_leave_all_other_products_as_they_are():
    """Experts with updates have no other backend than the general one."""
    attention = AttentionConfig(hidden_size=WIDTH, num_heads=1, num_kv_heads=1, head_dim=16)
    experts, lora = {"intermediate_size": 24, "num_experts": 6, "top_k": 2}, LoraConfig(r=8, targets=("q_proj",))
    added = ModalityExpertsConfig(**experts, lora=lora)
    block = build_block(attention, ExpertsConfig(**experts), lora=lora, modality_experts=[added])
    others = block.modality_experts[0].attention
    assert list(block.attention.lora) == list(others) == ["qkv"] and not len(block.mlp.experts.lora)
    x = torch.randn(1, 3, WIDTH)
    assert UpdatesOfSome(others, torch.tensor([1])).updated("output", x, x) is x
