"""Named sizes: four to train and the papers' own, from which everything else of a model's shape follows."""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from openm6.core.config import Config, build, read_yaml
from openm6.core.errors import ConfigError, nearest
from openm6.models.config import BackboneConfig, ParameterCount, count_parameters
from openm6.nn.config import LoraConfig, ModalityExpertsConfigs


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


PRESETS: dict[str, Preset] = {
    name: build(Preset, {"name": name, **values}, f"preset {name}")
    for name, values in read_yaml(Path(__file__).with_name("presets.yaml")).items()
}


class ModelConfig(Config):
    """A preset by name, with any field of the backbone overridden; or the run, checkpoint or Hub id that training
    starts from, with what is frozen: a modality, a kind of token such as `image_in`, `backbone`, `embeddings` (of
    words), or prefixes of parameters. With `lora`, adapters are trained in place of the backbone and the text.
    `modality_experts` adds to those of a start.
    """

    preset: str = "nano"
    overrides: dict[str, Any] = {}
    start: str | None = None
    freeze: list[str] = []
    lora: LoraConfig | None = None
    modality_experts: ModalityExpertsConfigs = ()

    @model_validator(mode="after")
    def _one_shape(self) -> Self:
        if self.start is not None and (shape := sorted(self.model_fields_set & {"preset", "overrides"})):
            raise ValueError(f"start={self.start} has a shape of its own: leave {' and '.join(shape)} out")
        if self.freeze and self.start is None:
            raise ValueError("freeze keeps weights of a start: add start: RUN, or leave freeze out")
        if self.lora is not None and self.start is None:
            raise ValueError("lora adapts the weights of a start: add start: RUN, or leave lora out")
        if self.modality_experts and self.start is None:
            raise ValueError("modality_experts adds to a start: add start: RUN, or set overrides.modality_experts")
        return self


def build_backbone(config: ModelConfig) -> BackboneConfig:
    """The backbone of a preset; mappings override field by field; raise ConfigError if they do not fit or act."""
    values = preset(config.preset).backbone.model_dump(exclude_defaults=True)
    for name, value in config.overrides.items():
        known = values.get(name)
        values[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    backbone = build(BackboneConfig, values, "model.overrides")
    is_new = config.start is None and config.overrides.get("dense") is not None
    if is_new and all(map(backbone.has_experts, range(backbone.num_layers))):
        raise ConfigError("model.overrides.dense has no effect, as every layer has experts: set experts: null, too")
    added = backbone.modality_experts
    if shared := [one.num_shared for one in added if one.num_shared]:
        raise ConfigError(f"modality_experts.num_shared={shared[0]} is not supported: leave it out")
    # Only one router of a layer reports its load, and that of the layer's own experts comes first.
    beside = added if backbone.experts is not None else added[1:]
    if any(one.balance == "bias" for one in beside):
        raise ConfigError("modality_experts.balance: bias has no effect beside other experts: set balance: aux")
    return backbone
