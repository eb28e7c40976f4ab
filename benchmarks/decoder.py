"""OpenM6 in the training benchmarks: a text decoder with the backbone, and one sparse layer."""

# Shapes: B rows, S tokens of a row, D width

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.candidate import Candidate, Part, backward_of, own_products_of, update_of
from benchmarks.harness import Timing
from benchmarks.sizes import Sizes, peak_tflops
from openm6.models.backbone import Backbone, choose_mask, side_loss
from openm6.nn.config import ExpertsConfig
from openm6.nn.executor import CompiledExecutor
from openm6.nn.layers import MLP
from openm6.nn.moe import Experts, MoE, Router, TokenDispatcher
from openm6.ops.losses import linear_cross_entropy
from openm6.ops.matmul import bf16_matmul
from openm6.ops.pointwise import rotary_table
from openm6.ops.sequence import SequenceMeta, causal_meta
from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import build_optimizer, default_groups


class Decoder(nn.Module):
    """Embedding, backbone and untied head, as in the baseline."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.backbone = Backbone(sizes.backbone)
        self.head = nn.Parameter(torch.empty(sizes.vocabulary, sizes.width))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head, std=0.02)

    def forward(self, ids: Tensor, meta: SequenceMeta) -> Tensor:
        """Return the mean loss of the next tokens of B S ids, with the auxiliary losses of the routers."""
        hidden, loads = self.backbone(self.embedding(ids), meta)
        return self.loss(hidden, ids) + side_loss(loads)

    def loss(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the mean loss in nats; the last token of a row has no target.  # B S D, B S"""
        flat, label = hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten()  # B·(S-1) D
        weight = torch.full((len(label),), 1.0 / len(label), device=ids.device)
        return linear_cross_entropy(flat, self.head, label, weight)[0]


def our_candidate(sizes: Sizes, device: torch.device, bf16_products: bool = False) -> Candidate:
    """Return the decoder with random weights and a step on random tokens; a CPU multiplies in bf16 if asked."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(sizes)
    if device.type == "cuda":
        model.to(torch.bfloat16)
        model.backbone.executor = CompiledExecutor()
    optimizer = build_optimizer(default_groups(model), OptimizerConfig(name="adamw", learning_rate=1e-4))
    ids = torch.randint(0, sizes.vocabulary, (sizes.rows, sizes.length), device=device)
    meta = causal_meta(sizes.rows, sizes.length, device=device)

    executor = model.backbone.executor

    def step() -> Tensor:
        with bf16_matmul(bf16_products):
            loss = model(ids, meta)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Candidate(
        model,
        optimizer,
        step,
        lambda: _parts(model, optimizer, ids, meta),
        compilations=lambda: executor.compilations if isinstance(executor, CompiledExecutor) else 0,
    )


def _parts(
    model: Decoder, optimizer: torch.optim.Optimizer, ids: Tensor, meta: SequenceMeta
) -> Mapping[str, tuple[int, Part]]:
    """Return the parts of layer 0, each run once per layer, and the parts that a step runs once."""
    config = model.backbone.config
    block = model.backbone.blocks[0]
    moe = cast(MoE, block.mlp)
    router, experts = moe.router, moe.experts
    x = torch.randn_like(model.embedding(ids))
    rotary = rotary_table(meta.positions, config.rope_theta, config.sections)
    mask = choose_mask(meta, None, x)

    ready = torch.compile if x.is_cuda else _as_it_is  # as the blocks of a step are

    @ready
    def attention(leaf: Tensor) -> Tensor:
        return block.attention(block.attention_norm(leaf), block.qk_norm, rotary, mask, None, 0)

    @ready
    def sparse(leaf: Tensor) -> Tensor:
        return moe(block.mlp_norm(leaf), meta.valid, TokenDispatcher(), 0)[0]

    rows = ids.numel() * experts.config.experts_per_token
    return {
        "attention": (config.num_layers, backward_of(attention, x, [*block.attention.parameters()])),
        "expert_products": (config.num_layers, own_products_of(experts.up, experts.down, rows)),
        "sparse_layer": (
            config.num_layers,
            backward_of(sparse, x, [experts.up, experts.down, router.weight]),
        ),
        "head_and_loss": (1, backward_of(lambda leaf: model.loss(leaf, ids), x, [model.head])),
        "optimizer": (1, update_of(optimizer)),
    }


def _as_it_is(function: Any) -> Any:
    return function


def our_layer(config: ExpertsConfig, x: Tensor) -> tuple[Part, Part]:
    """Return a forward and backward pass of a sparse layer on x (B S D), and of its products alone with equal loads."""
    width = x.shape[-1]
    with x.device:
        experts, router = Experts(width, config), Router(width, config)
        shared = None if config.shared is None else MLP(width, config.shared)
    experts.reset_parameters(0.02, 0.02)
    router.reset_parameters(0.02)
    dense = [] if shared is None else [shared.up, shared.down]
    for weight in dense:
        nn.init.normal_(weight, std=0.02)
    moe = MoE(router, experts, shared).to(x.dtype)
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def forward(leaf: Tensor) -> Tensor:
        return moe(leaf, valid, TokenDispatcher(), 0)[0]

    layer = backward_of(as_trained(forward, x), x, [*experts.parameters(), router.weight, *dense])
    return layer, own_products_of(experts.up, experts.down, x.shape[0] * x.shape[1] * config.experts_per_token)


def as_trained(forward: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function, compiled on a GPU as in training."""
    compiled: Callable[[Tensor], Tensor] = torch.compile(forward) if x.is_cuda else forward
    return compiled


def layer_figures(timing: Timing, products: Timing, call: Part, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Return the results of one layer; routing is its time minus that of its products."""
    tflops, peak = sizes.expert_flops / timing.median / 1e12, peak_tflops(device)
    bare = 1000 * products.median
    return {
        "tokens_per_second": round(sizes.tokens / timing.median, 1),
        "mfu": None if peak is None else round(tflops / peak, 4),
        "tflops": round(tflops, 4),
        "peak_memory_gib": _peak_memory(call, device),
        "breakdown_ms": {
            "expert_products": round(bare, 3),
            "routing": round(1000 * timing.median - bare, 3),
        },
        "layer_seconds": timing.summary(),
    }


def _peak_memory(call: Part, device: torch.device) -> float | None:
    """Return the GiB that a pass allocates."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**30, 3)
