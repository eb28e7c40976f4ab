"""Matrix products by precision, library and expert, against plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from openm6.core.errors import ConfigError
from openm6.inference.decode_batch import PADDED_ROWS
from openm6.ops import matmul as ops
from openm6.ops.int8 import Int8Weight
from openm6.ops.losses import (
    grouped_cross_entropy,
    linear_cross_entropy,
)
from openm6.ops.matmul import (
    HALF,
    ROWS,
    _IdleWithoutGradient,
    bf16_matmul,
    capture_precision,
    check_experts,
    grouped_mm,
    has_bf16,
    linear,
    matmul_dtype,
)
from openm6.ops.moe import moe_mlp_fused, moe_mlp_per_expert
from tests.ops.test_losses import linear_cross_entropy_reference
from tests.ops.test_pointwise import plain


@pytest.fixture(params=["oneDNN", "MKL"], autouse=True)
def library(request, monkeypatch):
    """Every product by the one library, then by the other, whatever this machine would choose."""
    if request.param == "oneDNN" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(ops, "onednn_is_faster", lambda: request.param == "oneDNN")
    monkeypatch.setattr(ops, "MIN_PRODUCT", 1)
    torch.manual_seed(0)
    return request.param


def same_gradients(ours: torch.Tensor, theirs: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, upstream)
    for one, other in zip(mine, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("shape", [(32, 24), (2, 32, 24), (5, 24)])
def test_linear_equals_torchs(shape):
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    same_gradients(ops.linear(x, weight), F.linear(x, weight), [x, weight])


def test_shapes_that_do_not_repeat_stay_with_torch(library):
    weight = torch.randn(8, 24, requires_grad=True)

    def taken(rows: int) -> bool:
        return "_Linear" in type(ops.linear(torch.randn(rows, 24), weight).grad_fn).__name__

    assert taken(3 * ops.ROWS) == (library == "oneDNN")
    assert not taken(3 * ops.ROWS - 1)


@pytest.mark.parametrize("width", [64, 150, 200, 300])
def test_the_library_does_not_depend_on_the_rows_of_a_decoding_step(width, monkeypatch):
    used, weight, choose = [], torch.randn(width, width), ops.use_onednn
    monkeypatch.setattr(ops, "MIN_PRODUCT", 2**20)
    monkeypatch.setattr(ops, "use_onednn", lambda *pair: used.append(choose(*pair)) or used[-1])
    for rows in range(PADDED_ROWS, 20 * PADDED_ROWS, PADDED_ROWS):
        ops.linear(torch.randn(rows, width), weight)
    assert len(used) in (0, 19) and len(set(used)) <= 1


def test_products_of_any_strides_and_added():
    x, weight, bias = torch.randn(24, 16).t(), torch.randn(24, 40).t(), torch.randn(40)
    torch.testing.assert_close(ops.matmul(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    gaps = torch.randn(40, 48)[:, ::2]
    torch.testing.assert_close(ops.matmul(x, gaps), F.linear(x, gaps), rtol=1e-5, atol=1e-5)
    assert not ops.use_onednn(x, gaps)
    out = torch.ones(16, 40)
    ops.matmul_add(out, x, weight)
    torch.testing.assert_close(out, 1 + x @ weight.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [11, 64])
@pytest.mark.parametrize("choices", [1, 3])
def test_expert_after_expert_equals_all_at_once(tokens, choices):
    width, hidden, experts = 16, 8, 4
    x = torch.randn(tokens, width, requires_grad=True)
    gate = torch.rand(tokens, choices, requires_grad=True)
    up = torch.randn(experts, width, 2 * hidden, requires_grad=True)
    down = torch.randn(experts, hidden, width, requires_grad=True)
    leaves = [x, gate, up, down]
    # The last expert is chosen by nobody in the first case, by everybody in the second.
    for scores in (torch.tensor([0.0, 0, 0, -99]), torch.tensor([0.0, 0, 0, 99])):
        chosen = (torch.randn(tokens, experts) + scores).topk(choices).indices
        ours = moe_mlp_per_expert(x, gate, chosen, up, down)
        same_gradients(ours, moe_mlp_fused(x, gate, chosen, up, down), leaves)


def test_padded_rows_do_not_change_the_losses():
    hidden, weight = torch.randn(13, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    label, token_weight = torch.randint(0, 20, (13,)), torch.rand(13)
    ours, nll = linear_cross_entropy(hidden, weight, label, token_weight)
    theirs, their_nll = linear_cross_entropy_reference(hidden, weight, label, token_weight)
    torch.testing.assert_close(nll, their_nll, rtol=1e-5, atol=1e-5)
    same_gradients(ours, theirs, [hidden, weight])
    states, heads = torch.randn(7, 3, 8, requires_grad=True), torch.randn(3, 8, 12, requires_grad=True)
    target = torch.randint(0, 12, (7, 3))
    ours = grouped_cross_entropy(states, heads, target, 0.1)
    same_gradients(ours, plain(grouped_cross_entropy, states, heads, target, 0.1), [states, heads])


def test_many_row_counts_are_padded_to_few(library):
    lengths = {ops.pad_rows(rows, torch.float32) for rows in range(1, 4 * 16 * ops.ROWS + 1)}
    if library == "MKL":
        assert len(lengths) == 4 * 16 * ops.ROWS
        assert ops.pad_rows(7, torch.bfloat16) == ops.ROWS
        return
    assert len(lengths) == 16 + 2 * 8
    assert all(length % ops.ROWS == 0 for length in lengths)
    for rows in (0, 1, ops.ROWS, 600, 5000):
        assert rows <= ops.pad_rows(rows, torch.float32) < max(1.13 * rows, rows + ops.ROWS)


Leaves = list[Tensor]


def leaves(*shapes: tuple[int, ...]) -> Leaves:
    torch.manual_seed(len(shapes))
    return [(torch.randn(shape) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def one_linear() -> tuple[Callable[[], Tensor], Leaves]:
    x, weight = leaves((2, ROWS, 48), (40, 48))
    return lambda: linear(x, weight), [x, weight]


def experts() -> tuple[Callable[[], Tensor], Leaves]:
    x, gate, up, down = leaves((90, 32), (90, 2), (4, 32, 48), (4, 24, 32))
    chosen = torch.randn(90, 4).topk(2).indices
    return lambda: moe_mlp_per_expert(x, gate, chosen, up, down), [x, gate, up, down]


def head() -> tuple[Callable[[], Tensor], Leaves]:
    hidden, weight = leaves((50, 32), (70, 32))
    label, token_weight = torch.randint(0, 70, (50,)), torch.rand(50)
    return lambda: linear_cross_entropy(hidden, weight, label, token_weight)[0], [hidden, weight]


def classifiers() -> tuple[Callable[[], Tensor], Leaves]:
    states, weight = leaves((37, 3, 32), (3, 32, 60))
    target = torch.randint(0, 60, (37, 3))
    return lambda: grouped_cross_entropy(states, weight, target, 0.1), [states, weight]


@pytest.mark.parametrize("case", [one_linear, experts, head, classifiers])
def test_values_and_gradients_are_near_those_in_fp32_and_in_fp32_themselves(case):
    call, inputs = case()
    exact = call()
    slope = torch.randn_like(exact)
    expected = [exact, *torch.autograd.grad(exact, inputs, slope)]
    with bf16_matmul():
        rounded = call()
    found = [rounded, *torch.autograd.grad(rounded, inputs, slope)]  # outside: it follows its forward pass
    for half, full in zip(found, expected, strict=True):
        error = float(((half - full).norm() / full.norm()).detach())
        assert half.dtype == torch.float32 and error < 0.02
        assert error > 1e-6  # it was rounded


def test_it_holds_within_and_for_fp32_on_a_processor_alone():
    x = torch.randn(2, 2)
    with bf16_matmul():
        assert matmul_dtype(x) == HALF and matmul_dtype(x.double()) == torch.float64
        with bf16_matmul(False):
            assert matmul_dtype(x) == torch.float32
        assert matmul_dtype(x) == HALF
    assert matmul_dtype(x) == torch.float32


def test_what_runs_again_runs_in_the_precision_it_had():
    x = torch.ones(2, 2)
    with bf16_matmul():
        halved = capture_precision("cpu")
    with torch.autocast("cpu", dtype=HALF):
        cast = capture_precision("cpu")
    with halved():
        assert matmul_dtype(x) == HALF and (x @ x).dtype == torch.float32
    with bf16_matmul(), cast():
        assert matmul_dtype(x) == torch.float32 and (x @ x).dtype == HALF
    assert (x @ x).dtype == torch.float32


def test_bf16_support_is_that_of_the_cpu(monkeypatch):
    for answer in (True, False):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        has_bf16.cache_clear()
        assert has_bf16() == answer
    has_bf16.cache_clear()


@pytest.mark.parametrize("counts", [[5, 3, 4, 8], [0, 20, 0, 0], [7, 0, 13, 0], [20, 0, 0, 0]])
def test_values_and_gradients_equal_the_reference(counts):
    torch.manual_seed(0)
    rows = torch.randn(20, 16, requires_grad=True)
    weight = torch.randn(4, 16, 24, requires_grad=True)
    upstream = torch.randn(20, 24)
    ours = grouped_mm(rows, weight, torch.tensor(counts))
    groups = rows.split(counts)
    reference = torch.cat([group @ matrix for group, matrix in zip(groups, weight, strict=True)])
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (rows, weight), upstream),
        torch.autograd.grad(reference, (rows, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_autocast_decides_the_dtype():
    rows, weight = torch.ones(4, 8), torch.ones(2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert grouped_mm(rows, weight, torch.tensor([1, 3])).dtype == torch.bfloat16
    assert grouped_mm(rows, weight, torch.tensor([1, 3])).dtype == torch.float32


def test_idle_experts_get_no_gradient_whatever_the_kernel_leaves_there():
    weight = torch.randn(3, 2, 2, requires_grad=True)
    passed = _IdleWithoutGradient.apply(weight, torch.tensor([4, 0, 1]))
    assert torch.equal(passed, weight)
    garbage = torch.full_like(weight, float("nan"))
    garbage[[0, 2]] = 3.0
    (gradient,) = torch.autograd.grad(passed, [weight], garbage)
    assert gradient.amax((1, 2)).tolist() == [3.0, 0.0, 3.0]


def test_more_experts_than_a_gpu_takes_are_refused():
    check_experts(1024, torch.device("cpu"))
    check_experts(1023, torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"1024 experts on one GPU, .* takes 1023: lower experts.num_experts"):
        check_experts(1024, torch.device("cuda"))


def test_the_product_asks_how_many_experts_a_gpu_takes():
    """Without a GPU: tensors that have a device and shapes only."""
    with FakeTensorMode():
        rows = torch.empty(16, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(1024, 8, 8, device="cuda", dtype=torch.bfloat16)
        counts = torch.empty(1024, device="cuda", dtype=torch.int64)
        with pytest.raises(ConfigError, match="1024 experts"):
            grouped_mm(rows, weight, counts)
        with pytest.raises(ConfigError, match="1024 experts"):
            moe_mlp_fused(rows, torch.empty(16, 1), torch.empty(16, 1, dtype=torch.int64), weight, weight)


def test_no_rows_have_no_product() -> None:
    with torch.inference_mode():
        for weight in (torch.ones(3, 8, dtype=HALF), Int8Weight.of(torch.ones(3, 8))):
            assert linear(torch.ones(2, 0, 8, dtype=HALF), weight).shape == (2, 0, 3)


def test_no_rows_have_gradients_of_zero(library) -> None:
    x, weight = torch.randn(2, 0, 24, requires_grad=True), torch.randn(8, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight)
    found.sum().backward()
    assert found.shape == (2, 0, 8) and x.grad.shape == x.shape and not weight.grad.any()
