"""Sizes and choices of the layers; without torch, so that presets and plans are read at once."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from openm6.core.config import Config

Activation = Literal["swiglu", "gelu"]
Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# True: each query and key head is normalized by itself; joint: all query heads together, and all key heads.
QKNormKind = bool | Literal["joint"]


def matrices_of(activation: Activation) -> int:
    """Weight matrices of one feed-forward network: gate, up and down, or up and down."""
    return 3 if activation == "swiglu" else 2


class DenseConfig(Config):
    """One feed-forward network that every token goes through."""

    intermediate_size: int = Field(gt=0, multiple_of=8)
    hidden_act: Activation = "swiglu"


class ExpertsConfig(Config):
    """Many feed-forward networks, a few of which each token goes through.

    Either `top_k` experts of all, or one expert in each of `num_prototypes` equal groups (M6-T). `num_shared` more
    see every token. `balance: bias` steers the choice by a bias that `update_balance` moves by `balance_rate`;
    `aux` adds a loss. `capacity_factor` is the factor γ above which an expert drops tokens in training; None: never.
    `norm_topk_prob`: gates of a token sum to 1. By default not with `top_k: 1`, whose gate would always be 1, so that
    the router would learn nothing from the loss.
    """

    intermediate_size: int = Field(gt=0, multiple_of=8)
    num_experts: int = Field(gt=0)
    top_k: int | None = Field(default=None, gt=0)
    num_prototypes: int | None = Field(default=None, gt=0)
    num_shared: int = Field(default=0, ge=0)
    hidden_act: Activation = "swiglu"
    norm_topk_prob: bool = True
    balance: Literal["bias", "aux", "none"] = "bias"
    balance_rate: float = Field(default=0.01, gt=0)
    router_aux_loss_coef: float = Field(default=0.01, ge=0)
    router_z_loss_coef: float = Field(default=0.001, ge=0)
    capacity_factor: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _gate_of_one(cls, values: Any) -> Any:
        is_one = isinstance(values, dict) and values.get("top_k") == 1
        return {"norm_topk_prob": False, **values} if is_one else values

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if (self.top_k is None) == (self.num_prototypes is None):
            raise ValueError("set either top_k or num_prototypes, and the other to null if the preset has it")
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={self.num_experts}: lower top_k or raise num_experts"
            )
        if self.num_prototypes is not None and self.num_experts % self.num_prototypes:
            raise ValueError(
                f"num_experts={self.num_experts} must be a multiple of num_prototypes={self.num_prototypes}"
            )
        return self

    @property
    def experts_per_token(self) -> int:
        return self.top_k or self.num_prototypes or 0

    @property
    def shared(self) -> DenseConfig | None:
        """The shared experts as one dense network."""
        if not self.num_shared:
            return None
        return DenseConfig(intermediate_size=self.intermediate_size * self.num_shared, hidden_act=self.hidden_act)


class AttentionConfig(Config):
    """What one attention layer needs of the backbone's config, where its fields are checked."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QKNormKind = True
    qkv_bias: bool = False
    norm_eps: float = 1e-6


class LoraConfig(Config):
    """Low-rank adapters of rank r, scaled by alpha / r (alpha / √r with `use_rslora`).

    targets: all-linear, which is all but routers, or names of projections as in PEFT.
    """

    r: int = Field(default=16, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    targets: Literal["all-linear"] | tuple[Projection, ...] = "all-linear"
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class ModalityExpertsConfig(ExpertsConfig):
    """Experts, with a router of their own, for the tokens of some modalities beside the layer's network.

    modalities: their names, or kinds of tokens, as `audio_out`, which is what is generated.
    lora: low-rank updates of the attention's projections for these tokens alone.
    """

    modalities: tuple[str, ...] = ("image", "audio", "numbers")
    lora: LoraConfig | None = None


def _several(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(value, Mapping | ModalityExpertsConfig) else value


ModalityExpertsConfigs = Annotated[tuple[ModalityExpertsConfig, ...], BeforeValidator(_several)]
"""Those of several groups of tokens, or the mapping of a single one."""


class RopeScaling(Config):
    """Rotary positions stretched for a longer context; fields as in Hugging Face's `rope_parameters`.

    linear: all frequencies are divided by `factor`. llama3: only those whose wavelength exceeds the original context
    over `high_freq_factor`. yarn (2309.00071): a ramp between `beta_fast` and `beta_slow` turns, and longer vectors.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(default=8192, gt=0)
    low_freq_factor: float = Field(default=1.0, gt=0)
    high_freq_factor: float = Field(default=4.0, gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    attention_factor: float | None = Field(default=None, gt=0)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.rope_type != "yarn":  # as in transformers, which ignores a factor then
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    def divisors(self, theta: float, count: int) -> tuple[float, ...]:
        if self.rope_type == "linear":
            return (self.factor,) * count
        context = self.original_max_position_embeddings
        turns = [context / (2 * math.pi * theta ** (index / count)) for index in range(count)]
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = [min(1.0, max(0.0, (turn - low) / (high - low))) for turn in turns]
        else:
            first, last = (
                count * math.log(context / (2 * math.pi * beta)) / math.log(theta)
                for beta in (self.beta_fast, self.beta_slow)
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * count - 1)
            width = max(last - first, 0.001)
            kept = [1 - min(1.0, max(0.0, (index - first) / width)) for index in range(count)]
        return tuple(1 / (part + (1 - part) / self.factor) for part in kept)
