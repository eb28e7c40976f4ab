"""Settings of the energy account: where the current comes from, and what the building adds."""

from __future__ import annotations

from pydantic import Field, field_validator

from openm6.base.config import Config
from openm6.base.energy.grid import WORLD, grid
from openm6.base.errors import ConfigError


class EnergyConfig(Config):
    """`country` by three-letter code or name; `pue`: joules of the building for each joule of the devices.

    cpu_watts: rated power of all processors, for the estimate where nothing can be read; default 5 W a core.
    """

    country: str = WORLD
    pue: float = Field(default=1.0, ge=1.0, le=3.0)
    cpu_watts: float | None = Field(default=None, gt=0)

    @field_validator("country")
    @classmethod
    def _known(cls, country: str) -> str:
        try:
            return grid(country).code
        except ConfigError as error:
            raise ValueError(str(error)) from None
