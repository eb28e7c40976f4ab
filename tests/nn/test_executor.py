"""Compiled and recomputed blocks give what plain ones give, and nothing is compiled anew for another packing."""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from openm6.core.log import get_log
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.executor import CheckpointedExecutor, CompiledExecutor, LayerExecutor
from openm6.ops.matmul import bf16_matmul
from openm6.ops.sequence import (
    SequenceMeta,
    additive_mask,
    block_mask,
    causal_meta,
    join,
    visible,
)
from tests.devices import CPU, on_each_device
from tests.sequences import padding_meta


def model(top_k: int = 2) -> Backbone:
    """Four layers, every other one sparse, in bf16: the compiler's stand-in for grouped products knows no other."""
    config = BackboneConfig(
        hidden_size=32, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16, moe_layer_freq=2,
        dense=DenseConfig(intermediate_size=32),
        experts=ExpertsConfig(intermediate_size=16, num_experts=4, top_k=top_k),
    )  # fmt: skip
    torch.manual_seed(0)
    return Backbone(config).bfloat16()


def packings(length: int = 32) -> list[SequenceMeta]:
    """Rows of equal length, packed differently each."""
    return [
        causal_meta(2, length),
        join([causal_meta(2, length - 12), padding_meta(2, 12)]),
        join([padding_meta(2, 5), causal_meta(2, length - 5, start=3)]),
    ]


def gradients(backbone: Backbone, meta: SequenceMeta, device: torch.device = CPU) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, meta.length, 32).bfloat16().to(device).requires_grad_()
    hidden, loads = backbone(x, meta.to(device))
    upstream, leaves = torch.randn(2, meta.length, 32).to(device), [x, *backbone.parameters()]
    found = torch.autograd.grad(
        (hidden.float() * upstream).sum() + sum(load.side_loss for load in loads), leaves, allow_unused=True
    )
    assert [load.layer for load in loads] == [1, 3]
    return [hidden, *(gradient for gradient in found if gradient is not None)]


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """torch counts the graphs of a function, whoever compiled them."""
    torch.compiler.reset()


@pytest.fixture
def dense_mask(monkeypatch):
    """Masks as on a GPU for rows of any length: tensors, not pieces with the numbers of this batch in them."""
    monkeypatch.setattr(
        "openm6.models.backbone.query_blocks",
        lambda meta, dtype: additive_mask(visible(meta, meta), dtype),
    )


def test_compiled_once_for_all_layers_and_packings(dense_mask):
    backbone = model()
    run = CompiledExecutor(backend="aot_eager")
    for meta in packings():
        backbone.executor = LayerExecutor()
        plain = gradients(backbone, meta)
        backbone.executor = run
        compiled = gradients(backbone, meta)
        for ours, theirs in zip(compiled, plain, strict=True):
            assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    assert run.compilations == 2  # one graph of a dense layer, one of a sparse layer


def test_block_masks_of_other_packings_compile_nothing_anew(monkeypatch):
    """As on a GPU; forward alone, for FlexAttention has no backward pass on a CPU."""
    monkeypatch.setattr("openm6.models.backbone.choose_mask", lambda meta, *_: block_mask(meta))
    backbone, run = model(), CompiledExecutor(backend="aot_eager")
    backbone.executor = run
    metas = [
        causal_meta(1, 256),
        join([causal_meta(1, 200), padding_meta(1, 56)]),
        join([padding_meta(1, 130), causal_meta(1, 126)]),
    ]
    with torch.no_grad():
        for meta in metas:
            x = torch.randn(1, 256, 32).bfloat16()
            ours, _ = backbone(x, meta)
            mask = additive_mask(visible(meta, meta), x.dtype)
            with monkeypatch.context() as patch:
                patch.setattr("openm6.models.backbone.choose_mask", lambda *_, mask=mask: mask)
                backbone.executor = LayerExecutor()
                theirs, _ = backbone(x, meta)
                backbone.executor = run
            assert (ours - theirs).float().norm() <= 0.02 * theirs.float().norm()
    assert run.compilations == 2


def test_decoding_is_not_compiled(dense_mask):
    backbone, run = model(), CompiledExecutor(backend="aot_eager")
    backbone.executor = run
    with torch.no_grad():
        backbone.eval()(torch.randn(2, 32, 32).bfloat16(), packings()[0])
    assert run.compilations == 0


def test_experts_in_fp32_are_not_compiled(dense_mask):
    """Their product asks the device for counts, which no graph can hold."""
    backbone = model().float()
    run = CompiledExecutor(backend="aot_eager")
    results = []
    for backbone.executor in (LayerExecutor(), run):
        hidden, _ = backbone(torch.ones(2, 32, 32, requires_grad=True), packings()[0])
        results.append(hidden)
    torch.testing.assert_close(results[1], results[0])
    assert run.compilations == 1 and not run.broken  # the dense layer's graph


def test_a_compiler_that_fails_is_named_once_and_blocks_run_uncompiled(dense_mask, monkeypatch, caplog):
    tried = []

    def failing(self, graph, inputs):
        tried.append(graph)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(CompiledExecutor, "_compile", failing)
    backbone = model()
    plain = gradients(backbone, packings()[0])
    backbone.executor = CompiledExecutor()
    with caplog.at_level(logging.WARNING, logger=get_log().name):
        again, *_ = (gradients(backbone, meta) for meta in packings())
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert len(tried) == 1
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.message and "loop.compile=false" in record.message
    assert "\n" not in record.message


def backend(made: list[str], fails_on: str, at: int) -> Any:
    """A backend without a compiler whose graph number `at` fails: to be made or to run, forwards or backwards."""

    def compiler(direction: str) -> Any:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            made.append(direction)
            fails = made.count(direction) == at
            if fails and fails_on == f"compile {direction}":
                raise RuntimeError("Failed to find C compiler.\nmore")

            def run(*arguments: Any) -> Any:
                if fails and fails_on == f"run {direction}":
                    raise RuntimeError("Triton Error [CUDA]: out of resource")
                return graph(*arguments)

            return make_boxed_func(run)

        return compile_graph

    return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))


@on_each_device
@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("fails_on", ["compile forward", "compile backward", "run forward", "run backward"])
def test_a_block_that_fails_anywhere_runs_uncompiled(fails_on, at, device, dense_mask, monkeypatch, caplog):
    """The graph of the sparse layers, or one of a later shape; the first two layers are computed again."""
    backbone, made = model(top_k=4).to(device), []
    metas = [packings(32)[0], packings(48)[0]]
    plain = [gradients(backbone, meta, device) for meta in metas]
    run = CompiledExecutor()
    failing = backend(made, fails_on, at)
    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: failing)
    backbone.executor = CheckpointedExecutor(run, 2)
    with caplog.at_level(logging.WARNING, logger=get_log().name):
        found = [gradients(backbone, meta, device) for meta in metas]
    for ours, theirs in zip([*found[0], *found[1]], [*plain[0], *plain[1]], strict=True):
        assert (ours - theirs).float().norm() <= 0.05 * theirs.float().norm()
    assert run.broken and len(made) > at - 1 and all(parameter.grad is None for parameter in backbone.parameters())
    (record,) = caplog.records
    assert ("out of resource" if "run" in fails_on else "Failed to find C compiler") in record.message


def test_memory_that_runs_out_is_no_failure_of_the_compiler(dense_mask, monkeypatch):
    backbone, run = model(), CompiledExecutor(backend="aot_eager")
    backbone.executor = run
    monkeypatch.setattr(run, "_run", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        gradients(backbone, packings()[0])
    assert not run.broken


@pytest.mark.slow
def test_fp32_blocks_under_inductor(dense_mask):
    """As on a GPU without bf16: experts, which would ask for counts, stay uncompiled, all else is compiled."""
    backbone, run, meta = model().float(), CompiledExecutor(), packings()[1]
    results = []
    for backbone.executor in (LayerExecutor(), run):
        x = torch.linspace(-1, 1, 2 * 32 * 32).view(2, 32, 32).requires_grad_()
        hidden, _ = backbone(x, meta)
        results.append([hidden, *torch.autograd.grad((hidden * x.detach().cos()).sum(), [x, *backbone.parameters()])])
    for compiled, plain in zip(results[1], results[0], strict=True):
        assert (compiled - plain).norm() <= 1e-3 * plain.norm()
    assert run.compilations == 1 and not run.broken


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("num_layers", [1, 4])
def test_recomputed_layers_give_the_same_gradients(num_layers, half):
    backbone = model().float()
    x, meta = torch.randn(2, 32, 32, requires_grad=True), packings()[1]
    results = []
    for run in (LayerExecutor(), CheckpointedExecutor(LayerExecutor(), num_layers)):
        backbone.executor = run
        with bf16_matmul(half):
            hidden, _ = backbone(x, meta)
        matrices = [matrix for block in backbone.blocks for matrix in block.matrices().values()]
        found = torch.autograd.grad(hidden.sum(), [x, *matrices], allow_unused=True)
        results.append([hidden, *found])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain)


@on_each_device
def test_compiled_and_recomputed_layers_are_the_plain_ones(device, monkeypatch):
    """In bf16, forwards and backwards; on a GPU compiled to its kernels, with FlexAttention on the packed rows."""
    length, backend = 256, "inductor"
    if device == CPU:
        length, backend = 32, "aot_eager"
        masks = lambda meta, dtype: additive_mask(visible(meta, meta), dtype)  # noqa: E731
        monkeypatch.setattr("openm6.models.backbone.query_blocks", masks)
    # With all experts chosen, the last bit of a score chooses nothing.
    backbone = model(top_k=4).to(device)
    compiled = CompiledExecutor(backend=backend)
    for meta in packings(length)[1:]:  # both have padding, so that the mask is of the same kind
        backbone.executor = LayerExecutor()
        plain = gradients(backbone, meta, device)
        for backbone.executor in (compiled, CheckpointedExecutor(compiled, 2)):
            found = gradients(backbone, meta, device)
            for ours, theirs in zip(found, plain, strict=True):
                assert (ours - theirs).float().norm() <= 0.05 * theirs.float().norm()
    assert not compiled.broken and compiled.compilations == 2  # a dense and a sparse layer
