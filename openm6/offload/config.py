"""Settings of offloaded training: the section `loop.streaming` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from openm6.core.config import Config


class OffloadConfig(Config):
    """Weight sets live on the device (resident), or in host memory, from where they are fetched for each use.

    resident: how many sets, or which, stay on the device; auto: as many as fit, less `margin_gib`
    micro_batches: parts of a batch (along its rows) that go through a block one after the other, so that a set which
        has been fetched serves them all
    recompute_every: of so many layers the first's input is kept, the others' are computed again
    boundaries: where those inputs wait for the backward pass
    buffers: sets on the device at a time, besides the resident ones
    compile: whether blocks are compiled; off until a GPU has shown that compiled offloaded blocks are right
    host_gib: most host memory that weights may take; None: what is free, less a tenth
    pin: register host memory with the GPU, without which copies are slow and wait for one another
    """

    resident: int | tuple[int, ...] | Literal["auto"] = "auto"
    micro_batches: int = Field(default=1, ge=1)
    recompute_every: int = Field(default=1, ge=1)
    boundaries: Literal["device", "host"] = "device"
    buffers: int = Field(default=2, ge=2)
    compile: bool = False
    margin_gib: float = Field(default=4.0, ge=0)
    host_gib: float | None = Field(default=None, gt=0)
    pin: bool = True

    @field_validator("resident")
    @classmethod
    def _not_negative(cls, resident: int | tuple[int, ...] | str) -> int | tuple[int, ...] | str:
        numbers = resident if isinstance(resident, tuple) else () if resident == "auto" else (resident,)
        if any(int(number) < 0 for number in numbers):
            raise ValueError("counts and numbers of weight sets start at 0")
        return resident


def evenly_spaced(count: int, num_sets: int) -> tuple[int, ...]:
    """`count` resident sets, evenly between offloaded ones, so that their work hides the others' transfers."""
    count = min(count, num_sets)
    return tuple(int((place + 0.5) * num_sets / count) for place in range(count)) if count else ()
