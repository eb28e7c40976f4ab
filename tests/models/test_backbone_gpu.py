"""The backbone on a CUDA device: FlexAttention and grouped bf16 products agree with the CPU, and nothing waits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openm6.models.backbone import Backbone, side_loss
from openm6.models.presets import preset
from openm6.nn.executor import CompiledExecutor
from openm6.ops.sequence import SequenceMeta, causal_meta, join
from tests.sequences import padding_meta

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def meta(padding: int = 28) -> SequenceMeta:
    """512 tokens: a source, words and a private image, then a text, then 28 of padding."""
    order = torch.tensor([[0] * 50 + list(range(1, 31)) + [31] * 48], dtype=torch.int32).expand(2, 128)
    private = torch.tensor([[0] * 80 + [1] * 48], dtype=torch.int32).expand(2, 128)
    image = SequenceMeta(torch.ones_like(order), order, private, torch.randint(0, 30, (2, 128, 3)))
    return join([image, causal_meta(2, 356), padding_meta(2, padding)])


def gradients(model: Backbone, x: Tensor, where: SequenceMeta, upstream: Tensor) -> list[Tensor]:
    """The hidden states, then the gradient of each parameter, on the CPU in fp32."""
    model.zero_grad()
    hidden, loads = model(x, where)
    ((hidden.float() * upstream).sum() + side_loss(loads)).backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [tensor.detach().float().cpu().clone() for tensor in (hidden, *grads)]


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 0.05)])
@pytest.mark.parametrize("padding", [28, 3])  # rows of whole blocks of FlexAttention, or padded to them
def test_gpu_agrees_with_cpu(autocast, tolerance, padding):
    torch.manual_seed(0)
    model, where = Backbone(preset("nano").backbone), meta(padding)
    x, upstream = torch.randn(2, where.length, 192), torch.randn(2, where.length, 192)
    here = gradients(model, x, where, upstream)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        there = gradients(model.cuda(), x.cuda(), where.to("cuda"), upstream.cuda())
    for ours, theirs in zip(there, here, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_step_never_makes_the_gpu_wait():
    model, where, x = Backbone(preset("nano").backbone).cuda(), meta().to("cuda"), torch.randn(2, 512, 192)
    x = x.cuda()
    for mode in ("default", "error"):  # the first step compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                hidden, loads = model(x, where)
                (hidden.float().square().mean() + side_loss(loads)).backward()
            model.update_balance(loads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert hidden.isfinite().all()


def test_compiled_blocks_with_kernels_agree_with_the_cpu():
    torch.manual_seed(0)
    model, where = Backbone(preset("nano").backbone), meta()
    x, upstream = torch.randn(2, 512, 192), torch.randn(2, 512, 192)
    here = gradients(model, x, where, upstream)
    run = CompiledExecutor()
    model.executor = run
    with torch.autocast("cuda", dtype=torch.bfloat16):
        there = gradients(model.cuda(), x.cuda(), where.to("cuda"), upstream.cuda())
    for ours, theirs in zip(there, here, strict=True):
        assert (ours - theirs).norm() <= 0.05 * theirs.norm()
    assert run.compilations == 1
