"""Baseline of the training benchmarks: Qwen3-MoE of `transformers` with the same sizes, in its fastest setting."""

# Shapes: B rows, S tokens of a row, N = B·S, D width

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.candidate import Candidate, Part, backward_of, products_of, update_of
from benchmarks.harness import Deadline, alternate
from benchmarks.sizes import Sizes
from openm6.core.errors import ConfigError

MAX_COPIED = 2**33  # bytes of weights: `batched_mm` copies those of each choice
EXPERT_LIBRARIES = {"sonicmoe": "SonicMoE", "deepgemm": "DeepGEMM", "grouped_mm": "CUTLASS"}  # on a GPU; else cuBLAS


def missing_baseline() -> str | None:
    """Return a sentence for the report if the baseline is not installed, else None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install '.[hf]' measures the baseline as well"
    return None


def choose_experts(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Time a sparse layer with each experts implementation of this `transformers`, and name the fastest.

    Returns:
        `experts_implementation`, `milliseconds_per_layer` of each that trains here, and `unusable`: why others do not.

    Raises:
        ConfigError: this version of transformers has no such implementations.
    """
    try:
        import transformers  # noqa: PLC0415 - optional
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ConfigError(f"this transformers has no choice of experts: install 5.0 or newer ({error})") from None
    torch.manual_seed(0)
    x = torch.randn(sizes.rows, sizes.length, sizes.width, device=device, dtype=_dtype(device))  # B S D
    parts: dict[str, Part] = {}
    unusable: dict[str, str] = {}
    for name in ("eager", *sorted(ALL_EXPERTS_FUNCTIONS.keys())):
        try:
            parts[name] = _layer_pass(sizes, x, name)
        except Exception as error:  # whatever it raises is the reason
            unusable[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    timings = alternate(parts, 5, 1, Deadline(10.0), device)  # the trial was a warm-up, too
    return {
        "version": f"transformers {transformers.__version__}",
        "experts_implementation": min(timings, key=lambda name: timings[name].median),
        "milliseconds_per_layer": {name: round(1000 * timing.median, 3) for name, timing in timings.items()},
        "unusable": unusable,
    }


def _layer_pass(sizes: Sizes, x: Tensor, experts: str) -> Part:
    """Return a forward and backward pass of a layer, after one trial that must reach the experts' weights."""
    copied = sizes.tokens * sizes.top_k * 3 * sizes.width * sizes.hidden * x.element_size()
    if experts == "batched_mm" and copied > MAX_COPIED:
        raise MemoryError(f"would copy {copied / 2**30:.0f} GiB of weights")
    layer = build_layer(sizes, x.device, experts)
    forward = torch.compile(layer.forward) if x.is_cuda else layer.forward
    (gradient,) = torch.autograd.grad(forward(x).sum(), [layer.experts.gate_up_proj], allow_unused=True)
    if gradient is None:
        raise RuntimeError("its experts have no gradient")
    return backward_of(forward, x, [*layer.parameters()])


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_baseline(sizes: Sizes, device: torch.device, experts: str) -> nn.Module:
    """Return a Qwen3MoeForCausalLM with random weights, in bf16 on a GPU and in fp32 on a CPU."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM  # noqa: PLC0415

    settings = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.hidden,
        "intermediate_size": 4 * sizes.hidden,
        "decoder_sparse_step": 1,
        "output_router_logits": True,
        "norm_topk_prob": True,
        "max_position_embeddings": sizes.length,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    config = Qwen3MoeConfig.from_dict(settings)
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(device))
    try:
        with device:
            model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation=experts)
    finally:
        torch.set_default_dtype(usual)
    return model.train()


def build_layer(sizes: Sizes, device: torch.device, experts: str) -> Any:
    """Return the sparse layer of the baseline."""
    one = sizes.model_copy(update={"num_layers": 1, "vocabulary": 8})
    model: Any = build_baseline(one, device, experts)
    return model.model.layers[0].mlp


def baseline_variants(sizes: Sizes, precision: str, experts: str) -> dict[str, Part]:
    """Return steps of the baseline on a CPU: one in fp32; in bf16 by autocast, and with weights in bf16."""
    cpu = torch.device("cpu")
    if precision == "fp32":
        return {"baseline": baseline_candidate(sizes, cpu, experts).step}
    mixed = baseline_candidate(sizes, cpu, experts).step

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mixed()

    half = baseline_candidate(sizes, cpu, experts, torch.bfloat16).step
    return {"baseline, autocast": autocast, "baseline, weights in bf16": half}


def baseline_candidate(sizes: Sizes, device: torch.device, experts: str, dtype: torch.dtype | None = None) -> Candidate:
    """Return the model of the baseline, compiled on a GPU, and a step with torch's fused AdamW."""
    model = build_baseline(sizes, device, experts).to(dtype)
    # Uncompiled on a CPU: see docs/benchmarks.md.
    compiled = device.type == "cuda"
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(0, sizes.vocabulary, (sizes.rows, sizes.length), device=device)

    def step() -> Tensor:
        loss: Tensor = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Candidate(model, optimizer, step, lambda: _parts(model, optimizer, ids, compiled))


def _parts(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, compiled: bool) -> Mapping[str, tuple[int, Part]]:
    """Return the parts of layer 0, compiled if the step is; the same parts as those of OpenM6."""
    layer, count = model.model.layers[0], len(model.model.layers)
    x = torch.randn_like(model.model.embed_tokens(ids))
    rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1], device=ids.device)[None])
    ready = torch.compile if compiled else _as_it_is

    @ready
    def attention(leaf: Tensor) -> Tensor:
        answer = layer.self_attn(layer.input_layernorm(leaf), position_embeddings=rotary, attention_mask=None)
        return answer[0]

    @ready
    def sparse(leaf: Tensor) -> Tensor:
        return layer.mlp(layer.post_attention_layernorm(leaf))

    @ready
    def head(leaf: Tensor) -> Tensor:
        logits = model.lm_head(leaf[:, :-1]).float().flatten(0, 1)  # B S D -> B·S V
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    experts, num_rows = layer.mlp.experts, ids.numel() * model.config.num_experts_per_tok
    up, down = experts.gate_up_proj.transpose(1, 2), experts.down_proj.transpose(1, 2)
    return {
        "attention": (count, backward_of(attention, x, [*layer.self_attn.parameters()])),
        "expert_products": (count, products_of(up, down, num_rows)),
        "sparse_layer": (count, backward_of(sparse, x, [*layer.mlp.parameters()])),
        "head_and_loss": (1, backward_of(head, x, [model.lm_head.weight])),
        "optimizer": (1, update_of(optimizer)),
    }


def _as_it_is(function: Any) -> Any:
    return function
