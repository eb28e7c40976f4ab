"""The request to the planner: a model, how it is trained and for how long, and a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openm6.core.config import apply_overrides, build, read_yaml
from openm6.core.errors import ConfigError, nearest
from openm6.energy.meter import EnergyConfig
from openm6.models.config import BackboneConfig
from openm6.models.presets import PRESETS, ModelConfig, build_backbone, preset, vocabulary_size
from openm6.offload.config import OffloadConfig
from openm6.optim.config import BYTES_PER_PARAMETER
from openm6.plan.hardware import Cluster, ClusterOptions, Gpu, gpu, gpu_cluster, gpus
from openm6.plan.memory import TIERS

SHIPPED = Path(__file__).parents[1] / "recipes"
LENGTH = 512  # tokens of a row


@dataclass(frozen=True)
class Model:
    """What is to be trained: its name, backbone and vocabulary; of a recipe also rows, row length and optimizer.

    adapters: whether it takes other modalities than text; offload: how its blocks are offloaded, None where they are
    not; bytes_per_parameter: of its blocks, None where the optimizer decides.
    """

    name: str
    backbone: BackboneConfig
    vocabulary: int
    rows: int | None = None
    length: int = LENGTH
    optimizer: str | None = None
    adapters: bool = False
    offload: OffloadConfig | None = None
    bytes_per_parameter: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """`tokens`: budget in tokens; `days`: time that there is; neither: 20 tokens for each active parameter.

    batch: tokens a step of one device; bytes_per_parameter: the tier, None for the most precise that fits;
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

    @property
    def group(self) -> int:
        """Blocks of which the first's input is kept."""
        offload = self.model.offload
        return self.activation_checkpointing_every or (
            1 if offload is None else offload.activation_checkpointing_every
        )

    def __post_init__(self) -> None:
        if not 0.0 <= self.pseudo_fraction <= 1.0:
            raise ConfigError(f"pseudo fraction {self.pseudo_fraction:g} must lie between 0 and 1")
        for name in ("batch", "tokens", "days", "activation_checkpointing_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value:g} must be above 0")


def read_model(name: str, overrides: list[str] | None = None) -> Model:
    """A preset by name, or the model of a recipe by its file or shipped name; a run's folder stands for its recipe.

    Raises:
        ConfigError: neither exists, or the recipe trains something else than a backbone.
    """
    given = Path(name)
    if given.is_dir():
        return model_of_recipe(given.resolve().name, read_yaml(given / "config.yaml"), overrides)
    if given.is_file():
        return model_of_recipe(given.stem, read_yaml(given), overrides)
    if name in PRESETS:
        chosen = preset(name)
        backbone = chosen.backbone
        if overrides:
            backbone = build_backbone(ModelConfig(preset=name, overrides=apply_overrides({}, overrides)))
        return Model(name, backbone, chosen.vocab_size)
    shipped = SHIPPED / f"{given.stem}.yaml"
    if shipped.is_file() and str(given.parent) in (".", "recipes"):
        return model_of_recipe(given.stem, read_yaml(shipped), overrides)
    known = [*PRESETS, *sorted(path.stem for path in SHIPPED.glob("*.yaml"))]
    raise ConfigError(f"no preset and no recipe {name!r}; {nearest(name, known)}")


def model_of_recipe(name: str, values: dict[str, Any], overrides: list[str] | None = None) -> Model:
    """The model of a recipe's plain values.

    Raises:
        ConfigError: the recipe trains something else than a backbone.
    """
    values = apply_overrides(values, overrides or [])
    kind = values.get("kind", "multimodal")
    if kind != "multimodal":
        raise ConfigError(
            f"{name} is a recipe of kind {kind!r}: only multimodal recipes and presets are planned"
        )
    packing, loop = values.get("packing") or {}, values.get("loop") or {}
    text = (values.get("modalities") or {}).get("text") or {}
    optimizer, offload = loop.get("optimizer") or {}, loop.get("offload")
    choice = build(ModelConfig, values.get("model") or {}, f"{name}: model")
    return Model(
        name=name,
        backbone=build_backbone(choice),
        vocabulary=vocabulary_size(choice, text.get("vocab_size")),
        rows=int(packing.get("batch_size", 4)),
        length=int(packing.get("seq_len", LENGTH)),
        optimizer=str(optimizer.get("name", "adamw")),
        adapters=True,
        offload=None if offload is None else build(OffloadConfig, offload, f"{name}: loop.offload"),
        bytes_per_parameter=_bytes_of(optimizer.get("precision"), name),
    )


def _bytes_of(precision: str | None, name: str) -> int | None:
    """Bytes per parameter of an optimizer's precision; None if the recipe sets none."""
    if precision is None:
        return None
    if precision not in BYTES_PER_PARAMETER:
        hint = nearest(precision, list(BYTES_PER_PARAMETER))
        raise ConfigError(f"{name}: loop.optimizer.precision={precision} is not known; {hint}")
    return BYTES_PER_PARAMETER[precision]


@dataclass(frozen=True)
class PlanTarget:
    """The machine: a GPU of the table with the cluster's sizes."""

    gpu: Gpu
    known: tuple[Gpu, ...]
    options: ClusterOptions

    def cluster(self) -> Cluster:
        """What the plan is made for."""
        return gpu_cluster(self.gpu, self.options)


def read_target(kind: str, table: Path | None, options: ClusterOptions) -> PlanTarget:
    """The machine by the words of the command line.

    Raises:
        ConfigError: no such GPU, or a table that cannot be read.
    """
    return PlanTarget(gpu(kind, table), tuple(gpus(table).values()), options)


def read_request(
    model: str | None,
    overrides: list[str],
    batch: int | None = None,
    tokens: float | None = None,
    days: float | None = None,
    bytes_per_parameter: int | None = None,
    pseudo_fraction: float = 0.0,
    activation_checkpointing_every: int | None = None,
    energy: dict[str, Any] | None = None,
) -> PlanRequest:
    """Return the request from the options of the command line.

    Raises:
        ConfigError: no model was named, or a number that cannot be.
    """
    if model is None:
        raise ConfigError("name a preset or a recipe to plan, as openm6 plan small --gpu h100-80gb")
    check_bytes(bytes_per_parameter)
    return PlanRequest(
        read_model(model, overrides),
        batch=batch,
        tokens=tokens,
        days=days,
        bytes_per_parameter=bytes_per_parameter,
        pseudo_fraction=pseudo_fraction,
        activation_checkpointing_every=activation_checkpointing_every,
        energy=build(EnergyConfig, energy or {}, "the options of energy"),
    )


def check_bytes(bytes_: int | None) -> None:
    """Raises ConfigError for a number of bytes per parameter that no tier has."""
    if bytes_ is not None and bytes_ not in TIERS:
        raise ConfigError(
            f"no tier of {bytes_} bytes per parameter: choose {', '.join(map(str, sorted(TIERS)))}"
        )
