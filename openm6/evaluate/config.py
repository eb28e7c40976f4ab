"""Settings of an evaluation: the section `judge` of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from openm6.base.config import Config
from openm6.inference.sampling import MaskedSampling


class JudgeConfig(Config):
    """How many test records are judged, and how pictures and sounds are decoded."""

    # Whether a run is judged when it has been trained; auto: unless its weights are streamed, which takes long.
    at_end: bool | Literal["auto"] = "auto"
    records: int = Field(default=160, ge=2)  # per task, for the information gain
    answers: int = Field(default=60, ge=1)  # of them answered in text or numbers
    drawn: int = Field(default=20, ge=1)  # of them answered in pictures or sound
    decoding: MaskedSampling = MaskedSampling()
    samples: int = Field(default=6, ge=0)  # kept for the report
    # Processes that judge side by side on a CPU; auto: one a core. They change no result.
    workers: PositiveInt | Literal["auto"] = "auto"
    seed: int = 0
