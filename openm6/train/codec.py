"""Training of image and audio codecs: recipes, averaged weights, the best of them, and the checks of the latent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from PIL.Image import Image
from pydantic import Field, model_validator
from torch import Tensor

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.codecs.base import Codec, QuantizerStats
from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.codecs.registry import save_codec
from openm6.core.config import Config
from openm6.core.errors import TrainingError, nearest
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import derive_seed
from openm6.data.source import Split
from openm6.data.sources import AnySourceConfig
from openm6.train.audio_codec import AudioData, AudioDataConfig, audio_scores, read_clip
from openm6.train.codec_data import hold_out, read_records
from openm6.train.config import LoopConfig
from openm6.train.image_codec import (
    ImageData,
    ImageDataConfig,
    image_scores,
    read_small,
    to_pixels,
)
from openm6.train.step import seed_everything
from openm6.train.training_task import StepResult, TrainingTask

CODEC_FILE = "codec.safetensors"
SCORES_FILE = "scores.json"
AVERAGED, BEST = "averaged.", "best."


class CodecRecipe(Config):
    """Settings that image and audio codecs have in common.

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
    data: ImageDataConfig = ImageDataConfig()

    @model_validator(mode="after")
    def _fits(self) -> ImageCodecRecipe:
        _check_shares(self.data.shares, self.sources)
        for side in self.data.sides:
            if side % self.codec.stride:
                raise ValueError(f"data.sides: {side} must be a multiple of {self.codec.stride}, the stride")
        return self


class AudioCodecRecipe(CodecRecipe):
    """What `openm6 train` reads when `kind` is `codec-audio`."""

    kind: Literal["codec-audio"] = "codec-audio"
    codec: AudioCodecConfig = AudioCodecConfig()
    data: AudioDataConfig = AudioDataConfig()

    @model_validator(mode="after")
    def _fits(self) -> AudioCodecRecipe:
        _check_shares(self.data.shares, self.sources)
        return self


def _check_shares(shares: dict[str, float], sources: dict[str, AnySourceConfig]) -> None:
    for name in shares:
        if name not in sources:
            hint = nearest(name, list(sources))
            raise ValueError(f"data.shares names {name!r}, which is not a source; {hint}")


@dataclass(frozen=True)
class CodecBatch:
    """One step's batch: only its number, from which the device makes the data."""

    step: int
    tokens: int

    @property
    def cursor(self) -> dict[str, Any]:
        return {"step": self.step}


class CodecData(Protocol):
    """What differs between images and audio: data and loss."""

    def draw(self, seed: int) -> Tensor: ...

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor: ...


class CodecTraining(TrainingTask):
    """Trains a codec, averages its weights, keeps the average that does best on held-out records, and writes it."""

    recipe: CodecRecipe
    data: CodecData

    def __init__(self, recipe: CodecRecipe, codec: Codec, device: torch.device) -> None:
        self.recipe = recipe
        self.device = device
        self.codec = self.model = codec.to(device)
        self.averaged = deepcopy(codec).requires_grad_(False).eval()
        self.best = deepcopy(self.averaged)
        self.best_score = float("-inf")
        self.updates = 0
        self.health: QuantizerStats | None = None
        self._begin = 0

    def batches(self) -> Iterator[CodecBatch]:
        step = self._begin
        while True:
            step += 1
            yield CodecBatch(step, self.positions_per_batch())

    def restore(self, cursor: dict[str, Any]) -> None:
        self._begin = int(cursor["step"])

    def positions_per_batch(self) -> int:
        """Places that a batch trains on: what counts as tokens here."""
        raise NotImplementedError

    def loss(self, batch: CodecBatch) -> StepResult:
        settling = batch.step > self.recipe.settle_from
        for norm in self.codec.latent_norms():
            norm.frozen = settling
        # Data, losses and rounding stay in fp32; the loop's autocast holds for the networks alone.
        with torch.autocast(self.device.type, enabled=False):
            raw = self.data.draw(derive_seed(self.recipe.loop.seed, "batch", batch.step))
        output, quantized = self.codec.reconstruct(raw)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.data.loss(raw, output, settling)
        self.health = quantized.health
        return StepResult(loss, health_metrics(self.health))

    def after_step(self, result: StepResult) -> None:
        self.updates += 1
        keep = min(self.recipe.average, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            pairs = zip(self.averaged.state_dict().values(), self.codec.state_dict().values(), strict=True)
            for average, new in pairs:
                average.lerp_(new, 1.0 - keep)

    def state(self) -> dict[str, Any]:
        averaged = {AVERAGED + name: value for name, value in self.averaged.state_dict().items()}
        best = {BEST + name: value for name, value in self.best.state_dict().items()}
        # JSON has no infinity.
        score = None if self.best_score == float("-inf") else self.best_score
        return {**averaged, **best, "updates": self.updates, "best_score": score}

    def load_state(self, state: dict[str, Any]) -> None:
        for codec, prefix in ((self.averaged, AVERAGED), (self.best, BEST)):
            tensors = {
                key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
            }
            codec.load_state_dict(tensors)
        self.updates = int(state["updates"])
        self.best_score = float("-inf") if state["best_score"] is None else float(state["best_score"])

    def files(self) -> dict[str, str]:
        return {"codec.json": self.codec.config.model_dump_json(indent=2) + "\n"}

    def evaluate(self, step: int) -> dict[str, float]:
        """Scores of the averaged weights on held-out records; the best so far are kept."""
        if self.health is not None and step > self.recipe.guard_from:
            check_health(self.health, self.recipe)
        with torch.autocast(self.device.type, enabled=False):
            scores = self.held_out_scores(self.averaged)
        if self.selection_score(scores) > self.best_score:
            self.best_score = self.selection_score(scores)
            self.best.load_state_dict(self.averaged.state_dict())
        return scores

    def held_out_scores(self, codec: Codec) -> dict[str, float]:
        """Scores on training records that are never trained on."""
        raise NotImplementedError

    def selection_score(self, scores: dict[str, float]) -> float:
        """One number, higher is better."""
        raise NotImplementedError

    def test_scores(self, codec: Codec) -> dict[str, dict[str, float]]:
        """Scores on each source's test records."""
        raise NotImplementedError

    def finish(self, run: RunFolder) -> None:
        """Writes codec.safetensors and scores.json into the run's folder."""
        if self.best_score == float("-inf"):
            self.best.load_state_dict(self.averaged.state_dict())
        save_codec(self.best, run.path / CODEC_FILE)
        scores = {"held_out": self.held_out_scores(self.best), "test": self.test_scores(self.best)}
        replace_text(run.path / SCORES_FILE, json.dumps(scores, indent=2) + "\n")
        get_log().info(f"wrote {run.path / CODEC_FILE}: {json.dumps(scores['test'])}")


class ImageCodecTraining(CodecTraining):
    """Trains an image codec from the `image` field of its sources."""

    recipe: ImageCodecRecipe

    def __init__(self, recipe: ImageCodecRecipe, device: torch.device) -> None:
        seed_everything(recipe.loop.seed, "weights")
        super().__init__(recipe, ImageCodec(recipe.codec), device)
        self.side = max(recipe.data.sides, key=lambda side: recipe.data.sides[side])
        kept, held = hold_out(self._read("train"), recipe.held_out)
        self.data = ImageData(recipe.data, kept, device)
        self.held_out = to_pixels([image for part in held.values() for image in part], self.side)

    def _read(self, split: Split) -> dict[str, list[Image]]:
        largest = max(self.recipe.data.sides)
        return read_records(self.recipe.sources, split, "image", lambda data: read_small(data, largest))

    def positions_per_batch(self) -> int:
        return self.recipe.data.batch * (self.side // self.recipe.codec.stride) ** 2

    def held_out_scores(self, codec: Codec) -> dict[str, float]:
        return image_scores(codec, self.held_out)

    def selection_score(self, scores: dict[str, float]) -> float:
        return scores["psnr"]

    def test_scores(self, codec: Codec) -> dict[str, dict[str, float]]:
        return {
            f"{name}_{side}": image_scores(codec, to_pixels(part, side))
            for name, part in self._read("test").items()
            for side in self.recipe.data.sides
        }


class AudioCodecTraining(CodecTraining):
    """Trains an audio codec from the `audio` field of its sources."""

    recipe: AudioCodecRecipe

    def __init__(self, recipe: AudioCodecRecipe, device: torch.device) -> None:
        seed_everything(recipe.loop.seed, "weights")
        super().__init__(recipe, AudioCodec(recipe.codec), device)
        kept, held = hold_out(read_records(recipe.sources, "train", "audio", read_clip), recipe.held_out)
        self.data = self.audio = AudioData(recipe.data, recipe.codec, kept, device)
        self.held_out = [clip for part in held.values() for clip in part]

    def positions_per_batch(self) -> int:
        return self.recipe.data.batch * self.audio.length // self.recipe.codec.samples_per_position

    def held_out_scores(self, codec: Codec) -> dict[str, float]:
        return audio_scores(codec, self.held_out)

    def selection_score(self, scores: dict[str, float]) -> float:
        return -scores["log_mel_l1"]

    def test_scores(self, codec: Codec) -> dict[str, dict[str, float]]:
        clips = read_records(self.recipe.sources, "test", "audio", read_clip)
        return {name: audio_scores(codec, part) for name, part in clips.items()}


def health_metrics(health: QuantizerStats) -> dict[str, float | Tensor]:
    """What the guards watch, for the run's metrics."""
    return {
        "latent/mean_magnitude": health.mean_magnitude,
        "latent/saturated": health.saturated,
        "latent/bits": health.bits.sum(),
        "latent/poorest_channel": (health.bits / health.capacity).min(),
    }


def check_health(health: QuantizerStats, recipe: CodecRecipe) -> None:
    """Stops a run whose latent has died, since longer training cannot revive it.

    Raises:
        TrainingError: too much of the latent is saturated, or a channel carries too few bits.
    """
    saturated = health.saturated.item()
    if saturated > recipe.max_saturated:
        raise TrainingError(
            f"{saturated:.0%} of the latent is saturated, over {recipe.max_saturated:.0%}:"
            " lower loop.optimizer.learning_rate"
        )
    share = health.bits / health.capacity
    if share.min() < recipe.min_bits:
        raise TrainingError(
            f"channel {int(share.argmin())} of the latent carries {share.min():.0%} of its bits, under"
            f" {recipe.min_bits:.0%}: lower loop.optimizer.learning_rate or train on more varied data"
        )
