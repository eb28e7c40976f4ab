"""Named sizes: four to train and the papers' own, from which everything else of a model's shape follows."""

from typing import Any, Self

from pydantic import Field, model_validator

from openm6.core.config import Config, build
from openm6.core.errors import ConfigError, nearest
from openm6.models.config import BackboneConfig, ParameterCount, count_parameters
from openm6.nn.config import DenseConfig, ExpertsConfig, LoraConfig, ModalityExpertsConfig


class Preset(Config):
    """A backbone with the vocabulary it was sized for; embedding and text head share their weights."""

    name: str
    description: str
    backbone: BackboneConfig
    vocab_size: int = Field(gt=0)

    @property
    def parameters(self) -> ParameterCount:
        """Backbone and word embedding; a token counts the whole embedding as active, as it is the text head too."""
        count = count_parameters(self.backbone)
        embedding = self.vocab_size * self.backbone.hidden_size
        return ParameterCount(count.total + embedding, count.active + embedding)


def preset(name: str) -> Preset:
    """The preset of that name; raise ConfigError, which names the nearest, if there is none."""
    if name not in PRESETS:
        raise ConfigError(f"no preset {name!r}; {nearest(name, list(PRESETS))}")
    return PRESETS[name]


def _paper(
    name: str, description: str, width: int, num_layers: int, num_heads: int, hidden: int,
    num_experts: int = 0, num_prototypes: int = 1, moe_layer_freq: int = 1,
) -> Preset:  # fmt: skip
    """Of the M6 papers: a key-value head per head, GELU; as in M6-T one expert per prototype, capacity 1.25."""
    experts = ExpertsConfig(
        intermediate_size=hidden, num_experts=num_experts, num_prototypes=num_prototypes, hidden_act="gelu",
        balance="none", router_z_loss_coef=0.0, capacity_factor=1.25,
    ) if num_experts else None  # fmt: skip
    backbone = BackboneConfig(
        hidden_size=width, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=width // num_heads, experts=experts, moe_layer_freq=moe_layer_freq, qk_norm=False,
        dense=DenseConfig(intermediate_size=hidden, hidden_act="gelu") if not experts or moe_layer_freq > 1 else None,
    )  # fmt: skip
    return Preset(name=name, description=description, backbone=backbone, vocab_size=21_128)


PRESETS: dict[str, Preset] = {entry.name: entry for entry in (
    Preset(
        name="nano", description="for two cores and the demo", vocab_size=4096,
        backbone=BackboneConfig(
            hidden_size=192, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=64,
            experts=ExpertsConfig(intermediate_size=192, num_experts=8, top_k=2),
        ),
    ),
    Preset(
        name="tiny", description="for one small GPU", vocab_size=16_384,
        backbone=BackboneConfig(
            hidden_size=384, num_layers=8, num_heads=6, num_kv_heads=2, head_dim=64,
            experts=ExpertsConfig(intermediate_size=512, num_experts=8, top_k=2),
        ),
    ),
    Preset(
        name="small", description="for one GPU", vocab_size=32_768,
        backbone=BackboneConfig(
            hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=4, head_dim=64,
            experts=ExpertsConfig(intermediate_size=576, num_experts=16, top_k=2),
        ),
    ),
    Preset(
        name="base", description="for one large GPU", vocab_size=32_768,
        backbone=BackboneConfig(
            hidden_size=1536, num_layers=18, num_heads=24, num_kv_heads=8, head_dim=64,
            experts=ExpertsConfig(intermediate_size=512, num_experts=64, top_k=4),
        ),
    ),
    _paper("m6-base", "M6 base, dense (2103.00823)", width=1024, num_layers=24, num_heads=16, hidden=4096),
    _paper("m6-10b", "M6-10B, dense (2103.00823)", width=4096, num_layers=50, num_heads=128, hidden=16_384),
    _paper(
        "m6-100b", "M6-100B, experts in every other layer (2103.00823)",
        width=1024, num_layers=24, num_heads=16, hidden=4096, num_experts=1024, moe_layer_freq=2,
    ),
    _paper(
        "m6t-1t", "M6-T, a trillion parameters (2105.15082)",
        width=1024, num_layers=24, num_heads=16, hidden=21_248, num_experts=960,
    ),
    _paper(
        "m6-10t", "M6-10T, ten trillion parameters in 80 prototypes (2110.03888)",
        width=1024, num_layers=48, num_heads=16, hidden=9984, num_experts=10_240, num_prototypes=80,
    ),
)}  # fmt: skip


class ModelConfig(Config):
    """A preset by name, with any field of the backbone overridden; or the run, checkpoint or Hub id that training
    starts from, with what is frozen: a modality, `backbone`, `embeddings` (of words), or prefixes of parameters; with
    `lora`, adapters are trained in place of the backbone and the text. `modality_experts` adds experts to a start.
    """

    preset: str = "nano"
    overrides: dict[str, Any] = {}
    start: str | None = None
    freeze: list[str] = []
    lora: LoraConfig | None = None
    modality_experts: ModalityExpertsConfig | None = None

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.start is not None and (shape := sorted(self.model_fields_set & {"preset", "overrides"})):
            raise ValueError(f"start={self.start} has a shape of its own: leave {' and '.join(shape)} out")
        if self.freeze and self.start is None:
            raise ValueError("freeze keeps weights of a start: add start: RUN, or leave freeze out")
        if self.lora is not None and self.start is None:
            raise ValueError("lora adapts the weights of a start: add start: RUN, or leave lora out")
        if self.modality_experts is not None and self.start is None:
            raise ValueError("modality_experts adds to a start: add start: RUN, or set overrides.modality_experts")
        return self


def build_backbone(config: ModelConfig) -> BackboneConfig:
    """The backbone of a preset; mappings override field by field; raise ConfigError if they do not fit."""
    values = preset(config.preset).backbone.model_dump(exclude_defaults=True)
    for name, value in config.overrides.items():
        known = values.get(name)
        values[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return build(BackboneConfig, values, "model.overrides")
