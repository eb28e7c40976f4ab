"""Published Qwen3 and Qwen3-MoE weights as a backbone, a word embedding and a text head."""

# Dimensions: D width, F hidden, E experts, V vocabulary

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from openm6.core.errors import CheckpointError, ConfigError
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig

# Parameters of a layer that keep their shape, and the names that Qwen gave them.
RENAMED = {
    "attention.output": "self_attn.o_proj",
    "qk_norm.query": "self_attn.q_norm",
    "qk_norm.key": "self_attn.k_norm",
    "attention_norm.weight": "input_layernorm",
    "mlp_norm.weight": "post_attention_layernorm",
}


@dataclass(frozen=True)
class ImportedModel:
    """The parts of a decoder for text.

    backbone: state of a `Backbone(config)`; embedding and head: V D (one tensor if they are tied)
    """

    config: BackboneConfig
    backbone: dict[str, Tensor]
    embedding: Tensor
    head: Tensor


def read_qwen(folder: Path) -> ImportedModel:
    """A model from a folder as published: config.json and one or more safetensors files.

    Raises:
        CheckpointError: no config.json, no weights, or a tensor missing.
        ConfigError: a model of another kind.
    """
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no readable config.json: download the whole model ({error})") from None
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    if not state:
        raise CheckpointError(f"{folder} holds no *.safetensors file: download the whole model")
    return import_qwen(state, settings)


def import_qwen(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> ImportedModel:
    """Maps the tensors of a Qwen3 or Qwen3-MoE decoder; `settings` is its config.json as a dictionary.

    With `causal_meta` a row is computed as its decoder would. Matrices are copied.

    Raises:
        ConfigError: a model of another kind, or with features that the backbone lacks.
        CheckpointError: a tensor is missing.
    """
    config = qwen_config(settings)
    try:
        backbone = {"final_norm.weight": state["model.norm.weight"]}
        for layer in range(config.num_layers):
            part = config.feed_forward(layer)
            found = _layer(state, f"model.layers.{layer}", part.num_experts if isinstance(part, ExpertsConfig) else 0)
            backbone |= {f"layers.{layer}.{name}": tensor for name, tensor in found.items()}
        embedding = state["model.embed_tokens.weight"]
        head = embedding if settings.get("tie_word_embeddings") else state["lm_head.weight"]
    except KeyError as missing:
        raise CheckpointError(f"the weights lack the tensor {missing.args[0]}: download the whole model") from None
    return ImportedModel(config, backbone, embedding, head)


def _layer(state: Mapping[str, Tensor], prefix: str, num_experts: int) -> dict[str, Tensor]:
    """Projections of one input become one matrix, and experts two stacks, E D 2F and E F D; 0 experts: a dense MLP."""

    def joined(of: str, *names: str) -> Tensor:
        return torch.cat([state[f"{of}.{name}_proj.weight"] for name in names])

    layer = {ours: state[f"{prefix}.{theirs}.weight"] for ours, theirs in RENAMED.items()}
    layer["attention.qkv"] = joined(f"{prefix}.self_attn", "q", "k", "v")
    mlp = f"{prefix}.mlp"
    if not num_experts:
        return {**layer, "mlp.up": joined(mlp, "gate", "up"), "mlp.down": state[f"{mlp}.down_proj.weight"]}
    if f"{mlp}.experts.gate_up_proj" in state:  # as transformers 5 holds them; published files hold them singly
        up, down = state[f"{mlp}.experts.gate_up_proj"], state[f"{mlp}.experts.down_proj"]  # E 2F D, E D F
    else:
        experts = [f"{mlp}.experts.{index}" for index in range(num_experts)]
        up = torch.stack([joined(expert, "gate", "up") for expert in experts])
        down = torch.stack([state[f"{expert}.down_proj.weight"] for expert in experts])
    return {
        **layer,
        "mlp.router.weight": state[f"{mlp}.gate.weight"],
        "mlp.experts.up": up.transpose(1, 2).contiguous(),
        "mlp.experts.down": down.transpose(1, 2).contiguous(),
    }


def qwen_config(settings: Mapping[str, Any]) -> BackboneConfig:
    """Our config for a config.json; raise ConfigError for another kind of model, or features the backbone lacks."""
    kind = settings.get("model_type")
    if kind not in ("qwen3", "qwen3_moe"):
        raise ConfigError(f"model_type {kind!r} cannot be imported: choose a qwen3 or qwen3_moe model")
    # Each version of `transformers` writes the rotary settings elsewhere.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope = {"rope_theta": settings.get("rope_theta", 10_000.0), **rope}
    lacking = {
        "attention_bias": settings.get("attention_bias"),
        "use_sliding_window": settings.get("use_sliding_window"),
        "scaled rotary positions": rope.get("rope_type", rope.get("type", "default")) != "default",
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
    }
    found = [name for name, present in lacking.items() if present]
    if found:
        raise ConfigError(f"this {kind} model uses {', '.join(found)}, which the backbone lacks: choose another")
    experts, every, dense_layers = None, 1, ()
    if kind == "qwen3_moe":
        every = settings.get("decoder_sparse_step", 1)
        dense_layers = tuple(settings.get("mlp_only_layers") or ())
        num_experts = settings.get("num_experts") or settings.get("num_local_experts")  # the latter by transformers 5
        if num_experts is None:
            raise ConfigError("config.json of this qwen3_moe model lacks num_experts: download it again")
        experts = ExpertsConfig(
            intermediate_size=settings["moe_intermediate_size"],
            num_experts=num_experts,
            top_k=settings["num_experts_per_tok"],
            norm_topk_prob=settings.get("norm_topk_prob", False),
            balance="none",
        )
    has_dense = experts is None or every > 1 or dense_layers
    heads = settings["num_attention_heads"]
    return BackboneConfig(
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        norm_eps=settings["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        moe_layer_freq=every,
        dense_layers=dense_layers,
        experts=experts,
        dense=DenseConfig(intermediate_size=settings["intermediate_size"]) if has_dense else None,
    )
