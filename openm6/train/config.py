"""Settings of the training loop: the section `loop:` of a recipe."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from openm6.checkpoint.optimizer import Moments
from openm6.core.config import Config
from openm6.core.errors import nearest
from openm6.energy.meter import EnergyConfig
from openm6.offload.config import OffloadConfig
from openm6.optim.config import OptimizerConfig, ScheduleConfig
from openm6.optim.registry import OPTIMIZERS

Precision = Literal["auto", "fp32", "bf16", "bf16-products"]
LOOP_SECTION = "loop"  # the name of this section in a run's config.yaml


class HeldOutConfig(Config):
    """How often the loss on held-out records is computed, and over how many packed batches of them."""

    every: int = Field(default=100, ge=1)  # steps
    batches: int = Field(default=4, ge=1)


class PlateauConfig(Config):
    """A plateau of the loss: its mean over `window` steps is hardly below that of the window before."""

    window: int = Field(default=200, ge=2)
    improvement: float = Field(default=0.01, gt=0, lt=1)  # fraction of the loss


class SwitchConfig(Config):
    """When each layer gets its own weights: after a step, after so many minutes of steps, or at a plateau."""

    step: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    plateau: PlateauConfig | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.step, self.minutes, self.plateau)) != 1:
            raise ValueError("set one of step, minutes and plateau, e.g. switch: {step: 500}")
        return self


class StagesConfig(Config):
    """Pseudo-to-Real (M6-10T, arXiv 2110.03888, section 3): the model's `sharing` holds until the switch.

    moments: the optimizer's moments of a shared set are scaled for its layers, or reset (checkpoint/optimizer.py)
    warmup_steps: over which the learning rate warms up again after the switch
    noise: standard deviation of the noise added to each matrix at the switch, as a fraction of the matrix's own, so
        that layers are no longer alike; 0 leaves the model's outputs exactly as they were
    """

    switch: SwitchConfig
    moments: Moments = "independent"
    warmup_steps: int = Field(default=20, ge=0)
    noise: float = Field(default=0.0, ge=0, le=1)


class LoopConfig(Config):
    """How long to train, with which optimizer, and how often to log, evaluate and save."""

    steps: int | Literal["auto"] = 1000  # auto if minutes are set alone
    # With steps: auto, the time of the training: simple predictors, steps, held-out losses and saves.
    minutes: float | None = Field(default=None, gt=0.0)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    offload: OffloadConfig | None = None  # weights that are copied to the device block by block
    stages: StagesConfig | None = None  # Pseudo-to-Real, for a model whose layers share weights at first
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)  # bound on the gradient's global norm
    # auto: bf16 if the device computes it fast; bf16-products: on a CPU, only the large products.
    precision: Precision = "auto"
    compile: bool | Literal["auto"] = "auto"  # the blocks; auto: on a GPU
    # Layers that keep only their input; auto: as few as memory requires.
    activation_checkpointing: int | Literal["auto"] = "auto"
    seed: int = 0
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    held_out: HeldOutConfig | None = None  # the loss on records that are never trained on
    # Held-out losses in a row that are not the lowest, after which the learning rate decays and the run ends.
    early_stopping_patience: int | None = Field(default=None, ge=1)
    load_best_model_at_end: bool = False  # the weights with the lowest held-out loss, kept as a checkpoint
    save_every: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)  # checkpoints kept
    prefetch: int = Field(default=2, ge=1)  # batches made ahead
    # Processes that make them; auto: on a GPU one per core but one, at most 8, else 1. The batches do not depend on it.
    num_data_workers: int | Literal["auto"] = "auto"
    # Processes that share a step on a CPU; auto: one per core. A run keeps the number, which decides the order of sums,
    # and the parts of a batch on which `balance: aux` and `capacity_factor` act.
    num_processes: int | Literal["auto"] = "auto"
    max_non_finite: int = Field(default=10, ge=0)  # skipped steps in a row before the run ends with an error
    energy: EnergyConfig = EnergyConfig()
    tensorboard: bool = True  # if the package is installed

    @field_validator("steps", "num_processes", "num_data_workers", "activation_checkpointing")
    @classmethod
    def _not_too_small(cls, number: int | str, info: ValidationInfo) -> int | str:
        least = 0 if info.field_name == "activation_checkpointing" else 1
        if isinstance(number, int) and number < least:
            raise ValueError("must be at least 1, or auto" if least else "must be 0 or more, or auto")
        return number

    @field_validator("optimizer")
    @classmethod
    def _known(cls, optimizer: OptimizerConfig) -> OptimizerConfig:
        if optimizer.name not in OPTIMIZERS:
            raise ValueError(f"no optimizer {optimizer.name!r}; {nearest(optimizer.name, list(OPTIMIZERS))}")
        return optimizer

    @property
    def offloaded(self) -> bool:
        """Return whether weights are updated block by block, as offloading and a precision below fp32 need."""
        return self.offload is not None or self.optimizer.precision != "fp32"

    @model_validator(mode="before")
    @classmethod
    def _minutes_alone(cls, values: Any) -> Any:
        is_alone = isinstance(values, Mapping) and values.get("minutes") is not None and "steps" not in values
        return {**values, "steps": "auto"} if is_alone else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.offloaded and (self.compile is True or self.activation_checkpointing != "auto"):
            raise ValueError(
                "with offload or a precision below fp32 blocks are compiled and recomputed by loop.offload.compile and "
                "loop.offload.activation_checkpointing_every: take compile and activation_checkpointing out"
            )
        if self.offloaded and self.optimizer.name != "adamw":
            raise ValueError(
                "offload and a precision below fp32 have an update rule of their own, with adamw for embeddings "
                f"and norms: take optimizer.name={self.optimizer.name} out"
            )
        if (self.early_stopping_patience or self.load_best_model_at_end) and (self.held_out is None or self.stages):
            raise ValueError(
                "early_stopping_patience and load_best_model_at_end need the loss on held-out records of a run without "
                "stages: add e.g. held_out: {every: 50}, and take stages out"
            )
        if self.steps == "auto" and self.minutes is None:
            raise ValueError("steps: auto needs minutes: add e.g. minutes: 8")
        setting = "steps: auto" if self.steps == "auto" else "early_stopping_patience"
        if self.schedule.decay_fraction > 0.9 and (self.steps == "auto" or self.early_stopping_patience):
            raise ValueError(f"{setting} needs some steps at the full rate: set schedule.decay_fraction to 0.9 or less")
        return self
