"""The request to the planner: a model, how it is trained and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt

from openm6.core.config import Config, apply_overrides, build, read_yaml
from openm6.core.errors import ConfigError, nearest
from openm6.energy.meter import EnergyConfig
from openm6.models.config import BackboneConfig
from openm6.models.presets import PRESETS, ModelConfig, build_backbone, preset
from openm6.offload.config import OffloadConfig
from openm6.optim.config import BYTES_PER_PARAMETER, OptimizerConfig
from openm6.plan.memory import TIERS

SHIPPED = Path(__file__).parents[1] / "recipes"
SEQ_LEN = 512  # tokens per row, by default
ROWS = 4  # of a batch of an offloaded run, by default
BATCH = 16_384  # tokens per step of one device, by default


class Packing(Config):
    """Of this section of a recipe, whose class needs torch, only what a plan reads is checked."""

    batch_size: PositiveInt | Literal["auto"] = "auto"
    seq_len: int = Field(default=SEQ_LEN, ge=16)
    buffer_size: Any = None
    num_shards: Any = None


@dataclass(frozen=True)
class Model:
    """What is to be trained; of a recipe also the tokens of its batch, its optimizer and how blocks are recomputed.

    batch: of all devices together, None if each has BATCH; adapters: whether it has other modalities than text;
    bytes_per_parameter: of its blocks, None if the optimizer decides; offloaded: blocks are trained one by one.
    """

    name: str
    backbone: BackboneConfig
    vocabulary: int
    batch: int | None = None
    seq_len: int = SEQ_LEN
    optimizer: str | None = None
    adapters: bool = False
    activation_checkpointing_every: int = 1
    bytes_per_parameter: int | None = None
    offloaded: bool = False

    def tokens_on(self, devices: int) -> int:
        """Per step of one of so many devices: its part of the batch, at least a row."""
        return BATCH if self.batch is None else max(self.seq_len, self.batch // devices)


@dataclass(frozen=True)
class PlanRequest:
    """`tokens`: budget in tokens; `days`: available time; neither: 20 tokens per active parameter.

    batch: tokens per step of one device; bytes_per_parameter: the tier, None for the most precise that fits;
    pseudo_fraction: fraction of the tokens in the stage whose layers share their weights;
    activation_checkpointing_every: of so many blocks the first's input is kept, if they are recomputed; None: as in the
    recipe, or 1.
    """

    model: Model
    batch: int | None = None
    tokens: float | None = None
    days: float | None = None
    bytes_per_parameter: int | None = None
    pseudo_fraction: float = 0.0
    activation_checkpointing_every: int | None = None
    energy: EnergyConfig = field(default_factory=EnergyConfig)

    def __post_init__(self) -> None:
        if self.bytes_per_parameter is not None and self.bytes_per_parameter not in TIERS:
            choices = ", ".join(map(str, sorted(TIERS)))
            raise ConfigError(f"no tier of {self.bytes_per_parameter} bytes per parameter: choose {choices}")
        if not 0.0 <= self.pseudo_fraction <= 1.0:
            raise ConfigError(f"pseudo fraction {self.pseudo_fraction:g} must lie between 0 and 1")
        for name in ("batch", "tokens", "days", "activation_checkpointing_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name}={value:g} must be a finite number above 0")
        if self.tokens is not None and self.days is not None:
            raise ConfigError("tokens and days both set the length of the run: leave one of them out")


def read_model(name: str | None, overrides: list[str] | None = None) -> Model:
    """A preset by name, or the model of a recipe: its file, shipped name or run's folder; else a ConfigError."""
    if name is None:
        raise ConfigError("name a preset or a recipe to plan, as openm6 plan small --gpu h100-80gb")
    path = Path(name)
    if path.is_dir():
        return _model_of_recipe(path.resolve().name, path / "config.yaml", overrides)
    if path.is_file():
        return _model_of_recipe(path.stem, path, overrides)
    if name in PRESETS:
        choice = ModelConfig(preset=name, overrides=apply_overrides({}, overrides or []))
        return Model(name, build_backbone(choice), preset(name).vocab_size)
    shipped = SHIPPED / f"{path.stem}.yaml"
    if shipped.is_file() and str(path.parent) in (".", "recipes"):
        return _model_of_recipe(path.stem, shipped, overrides)
    known = [*PRESETS, *sorted(path.stem for path in SHIPPED.glob("*.yaml"))]
    raise ConfigError(f"no preset and no recipe {name!r}; {nearest(name, known)}")


def _section(values: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{name}: {key} is {found!r}, not a mapping of settings: indent them below {key}:")
    return found


def _size_of_tokenizer(path: Path, name: str) -> int:
    """The number of tokens in a tokenizer.json."""
    # The library takes a fifth of a second to import: only such recipes need it.
    from tokenizers import Tokenizer  # noqa: PLC0415

    try:
        return int(Tokenizer.from_str(path.read_text(encoding="utf-8")).get_vocab_size())
    except Exception as error:  # the library raises no other class
        raise ConfigError(f"{name}: modalities.text.tokenizer={str(path)!r} cannot be read: {error}") from None


def _model_of_recipe(name: str, path: Path, overrides: list[str] | None) -> Model:
    values = apply_overrides(read_yaml(path), overrides or [])
    kind = values.get("kind", "multimodal")
    if kind != "multimodal":
        raise ConfigError(f"{name} is a recipe of kind {kind!r}: only multimodal recipes and presets are planned")
    loop, text = _section(values, "loop", name), _section(_section(values, "modalities", name), "text", name)
    optimizer = build(OptimizerConfig, loop.get("optimizer") or {}, f"{name}: loop.optimizer")
    bytes_ = BYTES_PER_PARAMETER[optimizer.precision]  # at 16 the optimizer decides
    offload = build(OffloadConfig, loop.get("offload") or {}, f"{name}: loop.offload")
    choice = build(ModelConfig, values.get("model") or {}, f"{name}: model")
    if choice.start is not None:
        raise ConfigError(f"{name} trains a model of the shape of {choice.start}: plan that run, or name a preset")
    vocabulary = text.get("vocab_size") or preset(choice.preset).vocab_size
    if file := text.get("tokenizer"):
        vocabulary = _size_of_tokenizer(Path(str(file)), name)
    packing = build(Packing, values.get("packing") or {}, f"{name}: packing")
    seq_len, rows = packing.seq_len, packing.batch_size
    if rows == "auto" and (loop.get("offload") is not None or bytes_ < 16):
        rows = ROWS
    batch = None if rows == "auto" else rows * seq_len
    backbone = build_backbone(choice)
    if loop.get("stages"):
        # The last stage has weights for each layer; the plan adds the stage of shared ones.
        backbone = backbone.model_copy(update={"sharing": None})
    return Model(
        name, backbone, vocabulary, batch, seq_len, optimizer.name, adapters=True,
        activation_checkpointing_every=offload.activation_checkpointing_every,
        bytes_per_parameter=bytes_ if bytes_ < 16 else None, offloaded=loop.get("offload") is not None,
    )  # fmt: skip
