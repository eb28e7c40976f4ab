"""Settings of offloaded training: the section `loop.offload` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from openm6.core.config import Config


class OffloadConfig(Config):
    """Weights stay on the device, or in host memory, from which they are copied for each use.

    Layers that share their weights count as one.

    num_gpu_layers: how many layers, or which, stay on the device; auto: as many as fit, less `margin_gib`
    gradient_accumulation_steps: parts of a batch (along its rows) that go through a block one after the
        other, so that weights are fetched once for all of them
    activation_checkpointing_every: of so many layers the first's input is kept, the others' are computed again
    activation_storage: where those inputs wait for the backward pass
    buffers: offloaded layers that are on the device at a time
    compile: whether blocks are compiled; off until a GPU has shown that compiled offloaded blocks are right
    host_gib: most host memory that weights may take; None: what is free, less a tenth
    pin: register host memory with the GPU, without which copies are slow and wait for one another
    """

    num_gpu_layers: int | tuple[int, ...] | Literal["auto"] = "auto"
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    activation_checkpointing_every: int = Field(default=1, ge=1)
    activation_storage: Literal["device", "host"] = "device"
    buffers: int = Field(default=2, ge=2)
    compile: bool = False
    margin_gib: float = Field(default=4.0, ge=0)
    host_gib: float | None = Field(default=None, gt=0)
    pin: bool = True

    @field_validator("num_gpu_layers")
    @classmethod
    def _not_negative(cls, on_device: int | tuple[int, ...] | str) -> int | tuple[int, ...] | str:
        numbers = on_device if isinstance(on_device, tuple) else () if on_device == "auto" else (on_device,)
        if any(int(number) < 0 for number in numbers):
            raise ValueError("counts and indices of layers start at 0")
        return on_device
