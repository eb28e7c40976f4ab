"""Decoders of Hugging Face in our terms: config.json to a `BackboneConfig` and back, and the names of their tensors."""

# Dimensions: D hidden size, F intermediate size, E experts, V rows of the embedding

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig, QKNormKind, RopeScaling

Shape = tuple[int, ...]
Settings = Mapping[str, Any]
EMBEDDING, HEAD, NORM = "adapters.text.embedding.weight", "adapters.text.head", "backbone.final_norm.weight"
THEIR_EMBEDDING, THEIR_HEAD, THEIR_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# Kinds of scaled rotary positions, and the fields of each.
_CONTEXT = {"rope_type", "factor", "original_max_position_embeddings"}
SCALINGS: dict[str, set[str]] = {
    "linear": {"rope_type", "factor"},
    "llama3": {*_CONTEXT, "low_freq_factor", "high_freq_factor"},
    "yarn": {*_CONTEXT, "beta_fast", "beta_slow", "attention_factor"},
}
EXPERT_NAMES = ("mlp.gate", "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")
MIXTRAL_NAMES = tuple(f"block_sparse_moe.{x}" for x in ("gate", "experts.{e}.w1", "experts.{e}.w3", "experts.{e}.w2"))


class Kind(NamedTuple):
    """What distinguishes a `model_type`; `experts` are the keys of their number and intermediate size."""

    architecture: str
    qk_norm: QKNormKind = False
    qkv_bias: bool = False
    experts: tuple[str, str] | None = None
    windowed: bool = False  # `sliding_window` alone turns it on
    # What transformers takes for a setting that the file lacks.
    theta: float = 10_000.0
    window: int | None = None


KINDS = {
    "llama": Kind("LlamaForCausalLM"),
    "mistral": Kind("MistralForCausalLM", windowed=True, window=4096),
    "qwen2": Kind("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Kind("Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": Kind("Qwen3MoeForCausalLM", qk_norm=True, experts=("num_experts", "moe_intermediate_size")),
    "mixtral": Kind(
        "MixtralForCausalLM", experts=("num_local_experts", "intermediate_size"), windowed=True, theta=1_000_000.0
    ),
    "olmoe": Kind("OlmoeForCausalLM", qk_norm="joint", experts=("num_experts", "intermediate_size")),
}


class Weights(Protocol):
    """Tensors of a published model by Hugging Face's names, read one at a time, whole or some rows."""

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> Shape: ...
    def read(self, name: str, rows: slice | None = None) -> Tensor: ...


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of ours, and theirs that it holds one below the other, each with its number of rows.

    columns: of a matrix, None for a vector. experts: names hold {e}, and ours is E columns rows, theirs rows columns.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None = None
    experts: int = 0

    @property
    def shape(self) -> Shape:
        if self.experts and self.columns is not None:
            return self.experts, self.columns, sum(self.rows)
        return (sum(self.rows),) if self.columns is None else (sum(self.rows), self.columns)

    def parts(self, stacked: bool = False) -> Iterator[tuple[str, Shape]]:
        """Name and shape of each of their tensors; `stacked`: of all experts in one, named as that of the first."""
        for name, part in self.split(torch.empty(self.shape, device="meta"), stacked):
            yield name, tuple(part.shape)

    def read(self, weights: Weights) -> Tensor:
        """Ours from theirs."""
        if not self.experts:
            found = [weights.read(name) for name in self.theirs]
            return found[0] if len(found) == 1 else torch.cat(found)
        stack: Tensor | None = None
        for expert in range(self.experts):
            matrix = torch.cat([weights.read(name.format(e=expert)) for name in self.theirs])
            stack = torch.empty(self.shape, dtype=matrix.dtype) if stack is None else stack
            stack[expert] = matrix.t()
        assert stack is not None
        return stack

    def split(self, tensor: Tensor, stacked: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Theirs from ours, as `parts` names them."""
        matrices = tensor.mT if self.experts else tensor[None]
        for expert, matrix in enumerate(matrices[None] if stacked and self.experts else matrices):
            parts = matrix.split(self.rows, 0 if self.columns is None else -2)
            for name, part in zip(self.theirs, parts, strict=True):
                yield name.format(e=expert), part.contiguous()


def outer_tensors(config: BackboneConfig, rows: int, tied: bool) -> list[StoredTensor]:
    """The tensors outside of layers; `rows` of the embedding."""
    width = config.hidden_size
    found = [StoredTensor(NORM, (THEIR_NORM,), (width,)), StoredTensor(EMBEDDING, (THEIR_EMBEDDING,), (rows,), width)]
    return found if tied else [*found, StoredTensor(HEAD, (THEIR_HEAD,), (rows,), width)]


def layer_tensors(kind: str, config: BackboneConfig, layer: int) -> list[StoredTensor]:
    """The tensors of one layer; those that it shares have the names of the first layer of its group."""
    own, first = (f"backbone.layers.{index}." for index in (layer, config.shared_with[layer]))
    theirs, width = f"model.layers.{layer}.", config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [f"{theirs}self_attn.{name}_proj" for name in "qkv"]
    sizes = (query, key, key)

    def names(*short: str) -> tuple[str, ...]:
        return tuple(f"{theirs}{name}.weight" for name in short)

    found = [
        StoredTensor(f"{own}attention_norm.weight", names("input_layernorm"), (width,)),
        StoredTensor(f"{own}mlp_norm.weight", names("post_attention_layernorm"), (width,)),
        StoredTensor(f"{first}attention.qkv", tuple(f"{name}.weight" for name in qkv), sizes, width),
        StoredTensor(f"{first}attention.output", names("self_attn.o_proj"), (width,), query),
    ]
    if config.qkv_bias:
        found.append(StoredTensor(f"{own}qkv_bias", tuple(f"{name}.bias" for name in qkv), sizes))
    if config.qk_norm:
        joint = config.qk_norm == "joint"
        for ours, name, size in (("query", "q_norm", query), ("key", "k_norm", key)):
            rows = (size if joint else config.head_dim,)
            found.append(StoredTensor(f"{own}qk_norm.{ours}", names(f"self_attn.{name}"), rows))
    part = config.feed_forward(layer)
    hidden = part.intermediate_size
    if isinstance(part, DenseConfig):
        ours, count, matrices = f"{first}mlp", 0, names("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    else:
        ours, count = f"{first}mlp.experts", part.num_experts
        gate, *experts = names(*(MIXTRAL_NAMES if kind == "mixtral" else EXPERT_NAMES))
        matrices = tuple(experts)
        router = first if config.share_routers else own
        found.append(StoredTensor(f"{router}mlp.router.weight", (gate,), (count,), width))
    found.append(StoredTensor(f"{ours}.up", matrices[:2], (hidden, hidden), width, count))
    return [*found, StoredTensor(f"{ours}.down", matrices[2:], (width,), hidden, count)]


def check_tensors(weights: Weights, tensors: list[StoredTensor], where: str) -> None:
    """Raise CheckpointError if one of their tensors is missing or of another shape; nothing is read."""
    for name, shape in (part for tensor in tensors for part in tensor.parts()):
        if name not in weights:
            raise CheckpointError(f"{where} lacks the tensor {name}: download the whole model")
        if weights.shape(name) != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(weights.shape(name))}, its config says {list(shape)}: "
                "download weights and config of one model"
            )


def backbone_config(settings: Settings) -> BackboneConfig:
    """Our config for a config.json; ConfigError for another kind of model, features we lack, or a missing field."""
    name = str(settings.get("model_type"))
    if name not in KINDS:
        raise ConfigError(f"model_type {name!r} cannot be imported: choose one of {', '.join(KINDS)}")
    kind = KINDS[name]
    try:
        scaling, theta = _rope_scaling(settings, kind.theta)
        _refuse_lacking(name, settings)
        heads = settings["num_attention_heads"]
        values: dict[str, Any] = {
            "hidden_size": settings["hidden_size"],
            "num_layers": settings["num_hidden_layers"],
            "num_heads": heads,
            "num_kv_heads": settings.get("num_key_value_heads") or heads,
            "head_dim": settings.get("head_dim") or settings["hidden_size"] // heads,
            "norm_eps": settings["rms_norm_eps"],
            "rope_theta": theta,
            "rope_scaling": scaling,
            "qk_norm": kind.qk_norm,
            "qkv_bias": kind.qkv_bias,
        }
        if kind.experts:
            number, hidden = kind.experts
            values["experts"] = {
                "intermediate_size": settings[hidden],
                # transformers 5 writes another name than the published files hold, and GGUF has one for all.
                "num_experts": settings.get(number) or settings.get("num_experts") or settings["num_local_experts"],
                "top_k": settings["num_experts_per_tok"],
                "norm_topk_prob": name == "mixtral" or settings.get("norm_topk_prob", False),
                "balance": "none",
            }
        every, dense_layers = settings.get("decoder_sparse_step", 1), tuple(settings.get("mlp_only_layers") or ())
        values |= {"moe_layer_freq": every, "dense_layers": dense_layers} if kind.experts else {}
        if not kind.experts or every > 1 or dense_layers:
            values["dense"] = {"intermediate_size": settings["intermediate_size"]}
    except KeyError as missing:
        raise ConfigError(f"the config of this {name} model lacks {missing.args[0]}: download it again") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"the config of this {name} model is broken ({error}): download it again") from None
    return build(BackboneConfig, values, f"config of this {name} model")


def _rope_scaling(settings: Settings, default_theta: float) -> tuple[RopeScaling | None, float]:
    # Each version of `transformers` writes the rotary settings elsewhere.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or settings.get("rope_theta") or default_theta
    form = rope.get("rope_type", rope.get("type", "default"))
    if form == "default":
        return None, theta
    unknown = [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    unknown += [] if rope.get("truncate", True) else ["truncate"]
    if form not in SCALINGS or unknown:
        what = f"{form} with {', '.join(unknown)}" if unknown else repr(form)
        raise ConfigError(
            f"rotary positions scaled by {what} are not supported: choose a model with {', '.join(SCALINGS)}"
        )
    context = rope.get("original_max_position_embeddings") or settings.get("max_position_embeddings", 8192)
    known = {key: rope[key] for key in RopeScaling.model_fields if rope.get(key) is not None}
    values = {**known, "rope_type": form, "original_max_position_embeddings": context}
    return build(RopeScaling, values, "rope_parameters"), theta


def _refuse_lacking(name: str, settings: Settings) -> None:
    """Raise ConfigError if the model uses something that the backbone does not have."""
    window = settings.get("sliding_window", KINDS[name].window)
    active = KINDS[name].windowed or settings.get("use_sliding_window")
    # Each version of `transformers` writes it elsewhere.
    rotated = {**settings, **(settings.get("rope_parameters") or {})}.get("partial_rotary_factor") or 1.0
    lacking = {
        "attention_bias": settings.get("attention_bias"),
        "mlp_bias": settings.get("mlp_bias"),
        f"a sliding window of {window}": window and active and window < settings.get("max_position_embeddings", 0),
        "clip_qkv": settings.get("clip_qkv"),
        "rotary positions in part of each head": rotated != 1.0,
        f"hidden_act {settings.get('hidden_act')!r}": settings.get("hidden_act", "silu") != "silu",
        "quantization_config": settings.get("quantization_config"),
    }
    found = [feature for feature, present in lacking.items() if present]
    if found:
        raise ConfigError(f"this {name} model uses {', '.join(found)}, which the backbone lacks: choose another")


def settings_of(config: BackboneConfig, rows: int, tied: bool, context: int) -> dict[str, Any]:
    """A config.json for our config, of the kind of model that computes the same; ConfigError if none does."""
    layers = [config.feed_forward(layer) for layer in range(config.num_layers)]
    experts = next((part for part in layers if isinstance(part, ExpertsConfig)), None)
    dense = next((part for part in layers if isinstance(part, DenseConfig)), None)
    lacking: dict[str, Any] = {"GELU networks": any(part.hidden_act != "swiglu" for part in layers)}
    if experts is not None:
        lacking |= {
            "prototypes": experts.num_prototypes,
            "shared experts": experts.num_shared,
            "a capacity of experts": experts.capacity_factor,
            "a balance bias of the router (train with experts.balance: aux)": experts.balance == "bias",
        }
    found = [feature for feature, present in lacking.items() if present]
    fitting = [
        name
        for name, kind in KINDS.items()
        if (kind.qk_norm, kind.qkv_bias, bool(kind.experts)) == (config.qk_norm, config.qkv_bias, experts is not None)
        and (name == "qwen3_moe" or experts is None or dense is None)
        and (name != "mixtral" or (experts is not None and experts.norm_topk_prob))
    ]
    if found or not fitting:
        what = ", ".join(found) or "this combination of norms, biases and experts"
        raise ConfigError(f"no decoder of Hugging Face has {what}, so the text path cannot be exported")
    name, kind = fitting[0], KINDS[fitting[0]]
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    scaling = config.rope_scaling
    if scaling is not None:
        rope |= scaling.model_dump(exclude_none=True, include=SCALINGS[scaling.rope_type])
    settings: dict[str, Any] = {
        "architectures": [kind.architecture], "model_type": name, "vocab_size": rows,
        "hidden_size": config.hidden_size, "intermediate_size": (dense or layers[0]).intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_parameters": rope,
        "rope_scaling": None if scaling is None else rope, "max_position_embeddings": context,
        "tie_word_embeddings": tied, "attention_bias": False, "sliding_window": None,
    }  # fmt: skip
    if experts is not None and kind.experts is not None:
        number, hidden = kind.experts
        settings |= {number: experts.num_experts, hidden: experts.intermediate_size}
        settings |= {"num_experts_per_tok": experts.top_k, "norm_topk_prob": experts.norm_topk_prob}
        if name == "qwen3_moe":
            settings |= {"decoder_sparse_step": config.moe_layer_freq, "mlp_only_layers": list(config.dense_layers)}
    return settings
