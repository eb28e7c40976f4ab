"""A model as recipes and plans name it: a preset, with fields of its backbone overridden."""

from __future__ import annotations

from typing import Any

from openm6.base.config import Config, build
from openm6.models.config import BackboneConfig
from openm6.models.presets import preset


class ModelChoice(Config):
    """A preset by name, with any field of the backbone overridden."""

    preset: str = "nano"
    overrides: dict[str, Any] = {}


def build_backbone(choice: ModelChoice) -> BackboneConfig:
    """The backbone of a preset with its overrides; a mapping overrides field by field.

    Raises:
        ConfigError: no such preset, or sizes that do not fit one another.
    """
    values = preset(choice.preset).backbone.model_dump(exclude_defaults=True)
    for name, value in choice.overrides.items():
        known = values.get(name)
        values[name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return build(BackboneConfig, values, "model.overrides")


def vocabulary_size(choice: ModelChoice, named: int | None) -> int:
    """Tokens that a tokenizer learns for the model: the number named, or else the preset's.

    Raises:
        ConfigError: no such preset.
    """
    return preset(choice.preset).vocabulary if named is None else named
