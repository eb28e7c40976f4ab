"""The size and shape of a backbone, and how many parameters that makes; without torch."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from openm6.core.config import Config
from openm6.nn import config as layers

Stage = Literal["pseudo", "real"]


class BackboneConfig(Config):
    """A stack of `num_layers` layers; which of them hold experts, and which share their weights.

    moe_layer_freq: of `moe_layer_freq` layers the last holds experts, the others `dense`; `dense_layers` never do.
    qk_norm: of queries and keys; "joint" normalizes all heads together, as OLMoE does. qkv_bias: as in Qwen2.
    rope_sections: frequencies (half of head_dim) driven by time, height and width; default 6 : 5 : 5.
    sharing: layer -> index of the group whose weights it shares; "all" makes one group of all layers of a kind, a
        number n one of every n consecutive layers; None shares nothing.
    initializer_range: of the first weights; default 0.64/sqrt(width), which is 0.02 at a width of 1024.
    lora: low-rank adapters of each layer's projections, beside weights that are frozen.
    modality_experts: of every layer, beside its own network, which all tokens pass; a list, or those of one group.
    """

    hidden_size: int = Field(gt=0, multiple_of=8)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, multiple_of=8)
    dense: layers.DenseConfig | None = None
    experts: layers.ExpertsConfig | None = None
    moe_layer_freq: int = Field(default=1, gt=0)
    dense_layers: tuple[int, ...] = ()
    qk_norm: layers.QKNormKind = True
    qkv_bias: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=1)
    rope_sections: tuple[int, int, int] | None = None
    rope_scaling: layers.RopeScaling | None = None
    sharing: tuple[int, ...] | int | Literal["all"] | None = None
    share_routers: bool = False
    initializer_range: float | None = Field(default=None, gt=0)
    lora: layers.LoraConfig | None = None
    modality_experts: layers.ModalityExpertsConfigs = ()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        kinds = [self.has_experts(layer) for layer in range(self.num_layers)]
        if any(kinds) and self.experts is None:
            raise ValueError("set experts, or dense alone with moe_layer_freq left out")
        if not all(kinds) and self.dense is None:
            raise ValueError("some layers hold no experts: set dense.intermediate_size, too")
        wrong = [layer for layer in self.dense_layers if not 0 <= layer < self.num_layers]
        if wrong:
            raise ValueError(f"dense_layers {wrong} do not exist: layers are 0 to {self.num_layers - 1}")
        if sum(self.sections) != self.head_dim // 2 or min(self.sections) < 0:
            raise ValueError(f"rope_sections {list(self.sections)} must sum to half of head_dim={self.head_dim}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if isinstance(self.sharing, int) and self.sharing < 1:
            raise ValueError(f"sharing={self.sharing} must be 1 or more layers that share their weights")
        groups = self.layer_groups
        if len(groups) != self.num_layers:
            raise ValueError(f"sharing lists {len(groups)} layers, but num_layers={self.num_layers}")
        if sorted(set(groups)) != list(range(len(set(groups)))):
            raise ValueError("sharing must number its groups of layers from 0 without a gap")
        for layer, first in enumerate(self.shared_with):
            if self.has_experts(layer) != self.has_experts(first):
                raise ValueError(
                    f"layers {first} and {layer} share weights (group {groups[layer]}), "
                    f"but only one of them holds experts"
                )
        if (self.lora is not None or self.modality_experts) and self.stage == "pseudo":
            raise ValueError("lora and modality_experts need layers with weights of their own: leave sharing out")
        if self.lora is not None and self.experts is not None and self.lora.r % 8:
            raise ValueError(f"lora.r={self.lora.r} must be a multiple of 8 for experts, as their products need it")
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is sparse. A config with `dense` alone has no sparse layer."""
        dense_only = self.experts is None and self.dense is not None
        return not dense_only and (layer + 1) % self.moe_layer_freq == 0 and layer not in self.dense_layers

    def feed_forward(self, layer: int) -> layers.DenseConfig | layers.ExpertsConfig:
        part = self.experts if self.has_experts(layer) else self.dense
        if part is None:
            raise ValueError(f"layer {layer} has no feed-forward part: set dense or experts")
        return part

    @property
    def layer_groups(self) -> tuple[int, ...]:
        """layer -> index of the group of layers with which it shares weights."""
        if self.sharing is None:
            return tuple(range(self.num_layers))
        if isinstance(self.sharing, int):
            return tuple(layer // self.sharing for layer in range(self.num_layers))
        if self.sharing != "all":
            return self.sharing
        first = self.has_experts(0)
        return tuple(int(self.has_experts(layer) != first) for layer in range(self.num_layers))

    @property
    def group_layers(self) -> tuple[int, ...]:
        """group -> its first layer, under whose name a checkpoint holds the shared weights."""
        groups = self.layer_groups
        return tuple(groups.index(group) for group in range(len(set(groups))))

    @property
    def shared_with(self) -> tuple[int, ...]:
        """layer -> the first layer of its group."""
        firsts = self.group_layers
        return tuple(firsts[group] for group in self.layer_groups)

    @property
    def stage(self) -> Stage:
        """Pseudo while layers share weights (M6-10T, 2110.03888), real once each has its own."""
        return "pseudo" if len(self.group_layers) < self.num_layers else "real"

    @property
    def sections(self) -> tuple[int, int, int]:
        if self.rope_sections is not None:
            return self.rope_sections
        part = self.head_dim // 2 * 5 // 16
        return self.head_dim // 2 - 2 * part, part, part

    @property
    def rotary(self) -> tuple[float, tuple[int, int, int], tuple[float, ...] | None, float]:
        """What `rotary_table` takes besides positions."""
        scaling = self.rope_scaling
        if scaling is None:
            return self.rope_theta, self.sections, None, 1.0
        divisors = scaling.divisors(self.rope_theta, self.head_dim // 2)
        return self.rope_theta, self.sections, divisors, scaling.amplitude

    @property
    def attention(self) -> layers.AttentionConfig:
        return layers.AttentionConfig.model_validate(self, from_attributes=True)

    @property
    def deviation(self) -> float:
        """Standard deviation of the first weights."""
        return self.initializer_range or 0.64 / self.hidden_size**0.5

    @property
    def output_deviation(self) -> float:
        """The same for what is added to the stream: its variance is to stay, however many layers add to it."""
        return self.deviation / (2 * self.num_layers) ** 0.5


@dataclass(frozen=True)
class ParameterCount:
    """Parameters that exist, and those that one token meets (shared ones count once per layer)."""

    total: int
    active: int


def count_parameters(config: BackboneConfig) -> ParameterCount:
    """Parameters of a backbone (no embedding, no head), from its config; a token of text meets the active."""
    heads = 2 * (config.num_heads + config.num_kv_heads)  # of queries and outputs, keys and values
    attention = config.hidden_size * heads * config.head_dim
    normalized = config.num_heads + config.num_kv_heads if config.qk_norm == "joint" else 2 * bool(config.qk_norm)
    biases = (config.num_heads + 2 * config.num_kv_heads) * config.qkv_bias
    norms = 2 * config.hidden_size + (normalized + biases) * config.head_dim
    total = active = config.hidden_size  # the final norm
    for layer, first in enumerate(config.shared_with):
        part = config.feed_forward(layer)
        network = layers.matrices_of(part.hidden_act) * config.hidden_size * part.intermediate_size
        router, existing, used = 0, 1, 1
        if isinstance(part, layers.ExpertsConfig):
            router = part.num_experts * config.hidden_size
            existing, used = part.num_shared + part.num_experts, part.num_shared + part.experts_per_token
        active += norms + router + attention + used * network
        total += norms + (0 if config.share_routers and first != layer else router)
        total += attention + existing * network if first == layer else 0
    total += config.num_layers * sum(modality_parameters(config, one).total for one in config.modality_experts)
    return ParameterCount(total, active)


def modality_parameters(config: BackboneConfig, experts: layers.ModalityExpertsConfig) -> ParameterCount:
    """Parameters of modality experts in one layer, and those that one of their tokens meets."""
    width, heads, key = (config.hidden_size, *(n * config.head_dim for n in (config.num_heads, config.num_kv_heads)))
    added = experts.num_experts * width  # the router
    if experts.lora is not None:
        sizes = {"q_proj": width + heads, "k_proj": width + key, "v_proj": width + key, "o_proj": heads + width}
        chosen = sizes if experts.lora.targets == "all-linear" else experts.lora.targets
        added += experts.lora.r * sum(sizes.get(name, 0) for name in chosen)
    network = layers.matrices_of(experts.hidden_act) * width * experts.intermediate_size
    return ParameterCount(added + experts.num_experts * network, added + experts.experts_per_token * network)
