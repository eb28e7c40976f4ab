"""Settings of the training loop: the section `loop:` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from openm6.checkpoint.optimizer import Moments
from openm6.core.config import Config
from openm6.core.errors import ConfigError
from openm6.energy.meter import EnergyConfig
from openm6.offload.config import OffloadConfig
from openm6.optim.config import OptimizerConfig, ScheduleConfig
from openm6.optim.registry import check_optimizer_name

Precision = Literal["auto", "fp32", "bf16", "bf16-products"]
LOOP_SECTION = "loop"  # the name of this section in a run's config.yaml
STAGES_SECTION = "stages"  # the name of this section within the loop's


class HeldOutConfig(Config):
    """How often the loss on held-out records is taken, and over how many packed batches of them."""

    every: int = Field(default=100, ge=1)  # steps
    batches: int = Field(default=4, ge=1)


class LoopConfig(Config):
    """How long to train, by which rule, and how often to log, evaluate and save."""

    steps: int | Literal["auto"] = 1000
    minutes: float | None = Field(default=None, gt=0.0)  # with steps: auto, the time that the run may take
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    offload: OffloadConfig | None = None  # weights that come to the device block by block
    stages: StagesConfig | None = None  # Pseudo-to-Real, for a model whose layers share weights at first
    max_grad_norm: float | None = Field(default=1.0, gt=0.0)  # bound on the gradient's global norm
    # auto: bf16 where the device computes it fast; bf16-products: on a CPU, the large products alone.
    precision: Precision = "auto"
    compile: bool | Literal["auto"] = "auto"  # the blocks; auto: on a GPU
    activation_checkpointing: int | Literal["auto"] = (
        "auto"  # layers that keep their input alone; auto: as few as fit into memory
    )
    seed: int = 0
    log_every: int = Field(default=10, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)
    held_out: HeldOutConfig | None = None  # the loss on records that are never trained on, as the run goes on
    save_every: int = Field(default=500, ge=1)
    keep_last: int = Field(default=2, ge=1)  # checkpoints kept
    prefetch: int = Field(default=2, ge=1)  # batches made ahead
    # Processes that share a step on a CPU; auto: one a core. A run keeps its number, which decides the order of sums.
    num_processes: int | Literal["auto"] = "auto"
    max_non_finite: int = Field(default=10, ge=0)  # skipped steps in a row before the run ends with an error
    energy: EnergyConfig = EnergyConfig()
    tensorboard: bool = True  # where the package is installed

    @field_validator("steps", "num_processes")
    @classmethod
    def _at_least_one(cls, number: int | str) -> int | str:
        if isinstance(number, int) and number < 1:
            raise ValueError("must be at least 1, or auto")
        return number

    @field_validator("activation_checkpointing")
    @classmethod
    def _not_below_zero(cls, layers: int | str) -> int | str:
        if isinstance(layers, int) and layers < 0:
            raise ValueError("must be 0 or more, or auto")
        return layers

    @field_validator("optimizer")
    @classmethod
    def _known(cls, optimizer: OptimizerConfig) -> OptimizerConfig:
        try:
            check_optimizer_name(optimizer.name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return optimizer

    @property
    def offloaded(self) -> bool:
        """Whether gradients are used up block by block, as offloading and a precision below fp32 need."""
        return self.offload is not None or self.optimizer.precision != "fp32"

    @model_validator(mode="after")
    def _rule_for_offload(self) -> LoopConfig:
        if self.offloaded and self.optimizer.name != "adamw":
            raise ValueError(
                "offload and a precision below fp32 have an update rule of their own, with adamw for embeddings "
                f"and norms: take optimizer.name={self.optimizer.name} out"
            )
        return self

    @model_validator(mode="after")
    def _time_for_auto(self) -> LoopConfig:
        if self.steps == "auto" and self.minutes is None:
            raise ValueError("steps: auto needs minutes: add e.g. minutes: 8")
        if self.steps == "auto" and self.schedule.decay_fraction > 0.9:
            raise ValueError(
                "steps: auto needs some steps at the full rate: set schedule.decay_fraction to 0.9 or less"
            )
        return self


class PlateauConfig(Config):
    """The loss stands still: its mean over `window` steps is hardly below that of the window before."""

    window: int = Field(default=200, ge=2)
    improvement: float = Field(default=0.01, gt=0, lt=1)  # share of the loss


class SwitchConfig(Config):
    """When the shared weights are taken apart: after a step, after so many minutes of steps, or at a plateau."""

    step: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    plateau: PlateauConfig | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SwitchConfig:
        if sum(way is not None for way in (self.step, self.minutes, self.plateau)) != 1:
            raise ValueError("set one of step, minutes and plateau, e.g. switch: {step: 500}")
        return self


class StagesConfig(Config):
    """Pseudo-to-Real (M6-10T, arXiv 2110.03888, section 3): the model's `sharing` holds until the switch.

    moments: what the optimizer remembers of a shared set is scaled for its layers, or forgotten (checkpoint/delink.py)
    warmup_steps: over which the rate climbs back after the switch
    noise: share of each matrix's own deviation that is added to it at the switch, so that layers are no longer alike;
        0 leaves the model's answers exactly as they were
    """

    switch: SwitchConfig
    moments: Moments = "independent"
    warmup_steps: int = Field(default=20, ge=0)
    noise: float = Field(default=0.0, ge=0, le=1)
