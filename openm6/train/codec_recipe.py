"""Recipes of codec training: the network, the sources of raw pictures or sounds, how they are drawn, and the loop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from openm6.base.config import Config, nearest
from openm6.codecs.audio import SoundCodecConfig
from openm6.codecs.image import ImageCodecConfig
from openm6.data.sources import AnySourceConfig
from openm6.train.codec_pictures import PictureLessonsConfig
from openm6.train.codec_sounds import SoundLessonsConfig
from openm6.train.config import LoopConfig


class CodecRecipe(Config):
    """What picture and sound codecs have in common.

    One record in `held_out` of each source is never trained on and picks the best averaged weights. In the last
    `settle_share` of the run the latent's statistics stay as they are. A run fails where, after `guard_from` steps,
    more than `max_saturated` of the latent is beyond reach of the gradient, or a channel carries less than the share
    `min_bits` of what it could.
    """

    sources: dict[str, AnySourceConfig] = Field(min_length=1)
    loop: LoopConfig = LoopConfig()
    held_out: int = Field(default=20, ge=2)
    settle_share: float = Field(default=0.2, ge=0, le=1)
    average: float = Field(default=0.999, ge=0, lt=1)
    guard_from: int = Field(default=200, ge=1)
    max_saturated: float = Field(default=0.1, gt=0, le=1)
    min_bits: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _length_known(self) -> CodecRecipe:
        if not isinstance(self.loop.steps, int):
            raise ValueError("a codec's loop.steps must be a number, since its loss changes near the end")
        return self

    @property
    def settle_from(self) -> int:
        """First step of the last phase."""
        assert isinstance(self.loop.steps, int)
        return round(self.loop.steps * (1.0 - self.settle_share))


class ImageCodecRecipe(CodecRecipe):
    """What `openm6 train` reads when `kind` is `codec-image`."""

    kind: Literal["codec-image"] = "codec-image"
    codec: ImageCodecConfig = ImageCodecConfig()
    lessons: PictureLessonsConfig = PictureLessonsConfig()

    @model_validator(mode="after")
    def _fits(self) -> ImageCodecRecipe:
        _check_shares(self.lessons.shares, self.sources)
        for side in self.lessons.sides:
            if side % self.codec.stride:
                raise ValueError(
                    f"lessons.sides: {side} must be a multiple of {self.codec.stride}, the stride"
                )
        return self


class SoundCodecRecipe(CodecRecipe):
    """What `openm6 train` reads when `kind` is `codec-sound`."""

    kind: Literal["codec-sound"] = "codec-sound"
    codec: SoundCodecConfig = SoundCodecConfig()
    lessons: SoundLessonsConfig = SoundLessonsConfig()

    @model_validator(mode="after")
    def _fits(self) -> SoundCodecRecipe:
        _check_shares(self.lessons.shares, self.sources)
        return self


def _check_shares(shares: dict[str, float], sources: dict[str, AnySourceConfig]) -> None:
    for name in shares:
        if name not in sources:
            hint = nearest(name, list(sources))
            raise ValueError(f"lessons.shares names {name!r}, which is not a source; {hint}")
