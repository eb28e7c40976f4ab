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

State = Mapping[str, Tensor]


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
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file: download the whole model")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    return import_qwen(state, settings)


def import_qwen(state: State, settings: Mapping[str, Any]) -> ImportedModel:
    """Maps the tensors of a Qwen3 or Qwen3-MoE decoder; `settings` is its config.json as a dictionary.

    With `causal_meta` a row is computed as its decoder would. Matrices are copied.

    Raises:
        ConfigError: a model of another kind, or with features that the backbone lacks.
        CheckpointError: a tensor is missing.
    """
    config = qwen_config(settings)
    backbone = {"final_norm.weight": _tensor(state, "model.norm.weight")}
    for layer in range(config.num_layers):
        backbone.update(_attention(state, layer))
        if config.experts is not None and config.has_experts(layer):
            backbone.update(_experts(state, layer, config.experts.num_experts))
        else:
            backbone.update(_dense(state, layer))
    embedding = _tensor(state, "model.embed_tokens.weight")
    head = embedding if settings.get("tie_word_embeddings") else _tensor(state, "lm_head.weight")
    return ImportedModel(config, backbone, embedding, head)


def qwen_config(settings: Mapping[str, Any]) -> BackboneConfig:
    """Our config for a Qwen3 or Qwen3-MoE config.json.

    Raises:
        ConfigError: another kind of model, or a feature that the backbone lacks.
    """
    _refuse_what_we_lack(settings)
    sparse = settings["model_type"] == "qwen3_moe"
    dense_layers = tuple(settings.get("mlp_only_layers") or ()) if sparse else ()
    every = settings.get("decoder_sparse_step", 1) if sparse else 1
    heads = settings["num_attention_heads"]
    return BackboneConfig(
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=settings["num_key_value_heads"],
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        norm_eps=settings["rms_norm_eps"],
        rope_theta=_rope(settings).get("rope_theta", 10_000.0),
        moe_layer_freq=every,
        dense_layers=dense_layers,
        experts=_experts_config(settings) if sparse else None,
        dense=DenseConfig(intermediate_size=settings["intermediate_size"])
        if not sparse or every > 1 or dense_layers
        else None,
    )


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary settings, wherever this version of `transformers` wrote them."""
    written = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return {"rope_theta": settings["rope_theta"], **written} if "rope_theta" in settings else written


def _refuse_what_we_lack(settings: Mapping[str, Any]) -> None:
    kind = settings.get("model_type")
    if kind not in ("qwen3", "qwen3_moe"):
        raise ConfigError(f"model_type {kind!r} cannot be imported: choose a qwen3 or qwen3_moe model")
    rope = _rope(settings)
    lacking = {
        "attention_bias": settings.get("attention_bias"),
        "use_sliding_window": settings.get("use_sliding_window"),
        "scaled rotary positions": rope.get("rope_type", rope.get("type", "default")) != "default",
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
    }
    found = [name for name, present in lacking.items() if present]
    if found:
        raise ConfigError(f"this {kind} model uses {', '.join(found)}, which the backbone lacks: choose another")


def _experts_config(settings: Mapping[str, Any]) -> ExpertsConfig:
    # `num_local_experts` is the name that transformers 5 writes.
    num_experts = settings.get("num_experts") or settings.get("num_local_experts")
    if num_experts is None:
        raise ConfigError("config.json of this qwen3_moe model lacks num_experts: download it again")
    return ExpertsConfig(
        intermediate_size=settings["moe_intermediate_size"],
        num_experts=num_experts,
        top_k=settings["num_experts_per_tok"],
        norm_topk_prob=settings.get("norm_topk_prob", False),
        balance="none",
    )


def _tensor(state: State, name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"the weights lack the tensor {name}: download the whole model")
    return state[name]


def _attention(state: State, layer: int) -> dict[str, Tensor]:
    """Queries, keys and values become one matrix."""
    theirs, ours = f"model.layers.{layer}", f"layers.{layer}"
    projections = [_tensor(state, f"{theirs}.self_attn.{name}_proj.weight") for name in "qkv"]
    return {
        f"{ours}.attention.qkv": torch.cat(projections),
        f"{ours}.attention.output": _tensor(state, f"{theirs}.self_attn.o_proj.weight"),
        f"{ours}.qk_norm.query": _tensor(state, f"{theirs}.self_attn.q_norm.weight"),
        f"{ours}.qk_norm.key": _tensor(state, f"{theirs}.self_attn.k_norm.weight"),
        f"{ours}.attention_norm.weight": _tensor(state, f"{theirs}.input_layernorm.weight"),
        f"{ours}.mlp_norm.weight": _tensor(state, f"{theirs}.post_attention_layernorm.weight"),
    }


def _dense(state: State, layer: int) -> dict[str, Tensor]:
    """Gate and up become one matrix."""
    theirs = f"model.layers.{layer}.mlp"
    gate_up = [_tensor(state, f"{theirs}.{name}_proj.weight") for name in ("gate", "up")]
    return {
        f"layers.{layer}.mlp.up": torch.cat(gate_up),
        f"layers.{layer}.mlp.down": _tensor(state, f"{theirs}.down_proj.weight"),
    }


def _experts(state: State, layer: int, num_experts: int) -> dict[str, Tensor]:
    """Experts become two stacks, E D 2F and E F D; published files hold them singly, transformers 5 in stacks."""
    theirs = f"model.layers.{layer}.mlp"
    if f"{theirs}.experts.gate_up_proj" in state:
        up = state[f"{theirs}.experts.gate_up_proj"]  # E 2F D
        down = _tensor(state, f"{theirs}.experts.down_proj")  # E D F
    else:
        experts = [f"{theirs}.experts.{index}" for index in range(num_experts)]
        up = torch.stack(
            [torch.cat([_tensor(state, f"{name}.{part}_proj.weight") for part in ("gate", "up")]) for name in experts]
        )
        down = torch.stack([_tensor(state, f"{name}.down_proj.weight") for name in experts])
    return {
        f"layers.{layer}.mlp.router.weight": _tensor(state, f"{theirs}.gate.weight"),
        f"layers.{layer}.mlp.experts.up": up.transpose(1, 2).contiguous(),
        f"layers.{layer}.mlp.experts.down": down.transpose(1, 2).contiguous(),
    }
