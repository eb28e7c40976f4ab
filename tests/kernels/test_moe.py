"""The kernels of the mixture of experts equal their references."""

from __future__ import annotations

import ast
import inspect
from contextlib import nullcontext

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from openm6.kernels import cross_entropy, moe, optimizers  # noqa: E402
from openm6.ops import moe as ops  # noqa: E402
from openm6.ops.moe import sum_rows_reference  # noqa: E402


@pytest.mark.parametrize("width", [8, 24, 40])
def test_gathered_rows(device, width):
    x, source = torch.randn(5, width, device=device), torch.tensor([4, 0, 0, 2, 3, 1, 4], device=device)
    assert torch.equal(moe.gather_rows(x, source), x[source])


@pytest.mark.parametrize("choices", [1, 2, 5])
def test_summed_rows(device, choices):
    values = torch.randn(3 * choices, 24, device=device)
    slot = torch.randperm(3 * choices, device=device).view(3, choices)
    torch.testing.assert_close(moe.sum_rows(values, slot), sum_rows_reference(values, slot))


def test_wide_rows_are_cut(device, monkeypatch):
    monkeypatch.setattr(moe, "WIDEST", 16)
    values, slot = torch.randn(4, 40, device=device), torch.tensor([[3, 0], [1, 2]], device=device)
    torch.testing.assert_close(moe.sum_rows(values, slot), sum_rows_reference(values, slot))
    assert torch.equal(moe.gather_rows(values, slot[0]), values[slot[0]])


def check_swiglu(product, gate, upstream):
    """The kernels against the operations in plain torch, which run on the CPU."""
    on_cpu = product.cpu(), gate.cpu()
    ours = moe.swiglu_gate(product, gate), *moe.swiglu_gate_backward(product, gate, upstream)
    theirs = ops.swiglu_gate(*on_cpu), *ops.swiglu_gate_backward(*on_cpu, upstream.cpu())
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu(), other)


@pytest.mark.parametrize(("width", "block"), [(8, 1024), (24, 16), (40, 16)])
def test_gated_swiglu_and_its_adjoint(device, monkeypatch, width, block):
    monkeypatch.setattr(moe, "BLOCK_F", block)
    product, gate = torch.randn(6, 2 * width, device=device), torch.rand(6, device=device)
    check_swiglu(product, gate, torch.randn(6, width, device=device))


def test_gated_swiglu_reads_what_is_not_contiguous(device):
    product, gate = torch.randn(16, 6, device=device).t(), torch.rand(6, 2, device=device)[:, 0]
    check_swiglu(product, gate, torch.randn(8, 6, device=device).t())


CHOSEN = {
    "even": (torch.randn(150, 6, generator=torch.Generator().manual_seed(1)).topk(2).indices, 6),
    "one choice": (torch.randint(0, 3, (7, 1), generator=torch.Generator().manual_seed(2)), 3),
    "one expert": (torch.zeros(130, 1, dtype=torch.int64), 1),
    "all to the last": (torch.full((129, 1), 3), 4),
    "some empty": (torch.tensor([[1, 5], [5, 1], [6, 5]]), 7),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_sort_by_expert(device, name):
    chosen, num_experts = CHOSEN[name]
    ours = moe.sort_by_expert(chosen.to(device), num_experts)
    for mine, other in zip(ours, ops.sort_by_expert(chosen, num_experts), strict=True):
        assert torch.equal(mine.cpu(), other)


def guarded(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and "device_of" in ast.unparse(node.items[0])


def launches(tree: ast.AST) -> set[str]:
    return {one.func.value.id for one in ast.walk(tree) if isinstance(one, ast.Call) and is_launch(one.func)}


def is_launch(function: ast.AST) -> bool:
    return isinstance(function, ast.Subscript) and ast.unparse(function.value).endswith("_kernel")


@pytest.mark.parametrize("module", [cross_entropy, moe, optimizers])
def test_kernels_are_launched_on_the_gpu_of_their_tensors(module):
    """Not on the thread's current one, on which Triton alone launches them."""
    tree = ast.parse(inspect.getsource(module))
    assert launches(tree) == set().union(*(launches(node) for node in ast.walk(tree) if guarded(node))) != set()


def test_the_guard_is_of_the_rows(device, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or nullcontext())
    x, source = torch.randn(2, 8, device=device), torch.tensor([1, 0], device=device)
    assert torch.equal(moe.gather_rows(x, source), x[source])
    assert len(entered) == 1 and entered[0] is x
