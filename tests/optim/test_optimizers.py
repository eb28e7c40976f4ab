"""The contract of every optimizer in the list."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import OPTIMIZERS, build_optimizer, default_groups, set_lr

RATES = {"adamw": 0.01, "adafactor": 0.03, "muon": 0.01}


class Mixed(nn.Module):
    """Every kind of parameter that our models have: a table, a map, a stack of expert maps, a kernel, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.kernel = nn.Conv1d(8, 8, 3, padding=1)
        self.map = nn.Linear(8, 16)
        self.experts = nn.Parameter(torch.randn(3, 16, 8) * 0.2)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12)
        self.unused = nn.Parameter(torch.ones(4, 4))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    def forward(self, words: Tensor) -> Tensor:
        x = self.kernel(self.table(words).mT).mT
        x = self.map(x).tanh()
        x = torch.einsum("bsf,efd->bsd", x, self.experts)
        return self.head(self.norm(x))


def mixed() -> Mixed:
    torch.manual_seed(3)
    return Mixed()


def loss_of(model: nn.Module) -> Tensor:
    words = torch.arange(24).reshape(2, 12) % 12
    return nn.functional.cross_entropy(model(words).flatten(0, 1), (words.flatten() * 5 + 1) % 12)


def config_of(name: str, weight_decay: float = 0.1) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=RATES[name], weight_decay=weight_decay)


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
class TestContract:
    def test_learns(self, name: str) -> None:
        model = mixed()
        before = loss_of(model).item()
        take_steps(model, build_optimizer(default_groups(model), config_of(name)), 60)
        assert loss_of(model).item() < 0.3 * before

    def test_updates_what_has_a_gradient_and_nothing_else(self, name: str) -> None:
        model = mixed()
        before = {key: parameter.clone() for key, parameter in model.named_parameters()}
        take_steps(model, build_optimizer(default_groups(model), config_of(name)), 1)
        still = {key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])}
        assert still == {"unused", "frozen"}

    def test_repeats_to_the_bit(self, name: str) -> None:
        first, second = mixed(), mixed()
        for model in (first, second):
            take_steps(model, build_optimizer(default_groups(model), config_of(name)), 5)
        for left, right in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(left, right)

    def test_a_learning_rate_of_zero_changes_nothing(self, name: str) -> None:
        model = mixed()
        before = [parameter.clone() for parameter in model.parameters()]
        optimizer = build_optimizer(default_groups(model), config_of(name))
        set_lr(optimizer, 0.0)
        take_steps(model, optimizer, 2)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))

    def test_weight_decay_is_for_matrices_and_not_for_vectors(self, name: str) -> None:
        """With gradients of zero only the decay acts."""
        model = mixed()
        before = {key: parameter.clone() for key, parameter in model.named_parameters()}
        optimizer = build_optimizer(default_groups(model), config_of(name, weight_decay=0.5))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
        after = dict(model.named_parameters())
        for key in ("map.weight", "experts", "table.weight", "kernel.weight"):
            assert after[key].norm() < before[key].norm(), key
        for key in ("norm.weight", "map.bias"):
            assert torch.equal(after[key], before[key]), key

    def test_a_groups_scale_multiplies_the_rate(self, name: str) -> None:
        model = mixed()
        before = model.map.weight.clone()
        groups = [{**group, "lr_scale": 0.0 if group["muon"] else 1.0} for group in default_groups(model)]
        optimizer = build_optimizer(groups, config_of(name))
        set_lr(optimizer, RATES[name])
        take_steps(model, optimizer, 1)
        assert torch.equal(model.map.weight, before)


def test_groups_sort_parameters_by_kind() -> None:
    model = mixed()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others, vectors = ({names[id(p)] for p in group["params"]} for group in default_groups(model))
    assert matrices == {"map.weight", "experts", "unused", "head.weight"}
    assert others == {"table.weight", "kernel.weight"}
    assert vectors == {"kernel.bias", "map.bias", "norm.weight", "norm.bias", "head.bias"}


def test_a_shared_parameter_is_in_one_group_once() -> None:
    model = mixed()
    model.head = nn.Linear(8, 12, bias=False)
    model.head.weight = model.table.weight
    taken = [id(parameter) for group in default_groups(model) for parameter in group["params"]]
    assert taken.count(id(model.table.weight)) == 1
