"""Training of image and audio codecs: averaged weights, the best of them, and the checks of the latent."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from openm6.codecs.base import COMMITMENT, QuantizerConfig, QuantizerStats, TrainableCodec, VectorQuantizer
from openm6.codecs.registry import CODECS, load_codec, save_codec
from openm6.core.config import Config
from openm6.core.errors import ConfigError, DataError, TrainingError, nearest
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.core.seeds import derive_seed
from openm6.data.source import SourceConfig, Split
from openm6.data.sources import AnySourceConfig, open_sources
from openm6.train.config import LoopConfig
from openm6.train.step import seed_everything
from openm6.train.training_task import StepResult, TrainingTask

CODEC_FILE = "codec.safetensors"
SCORES_FILE = "scores.json"
Raw = TypeVar("Raw")  # a decoded image or clip


class CodecDataConfig(Config):
    """How training data is drawn: `source_weights` as fractions of all, a source without one by its size."""

    source_weights: dict[str, float] = {}


class CodecRecipe(Config):
    """Settings that image and audio codecs have in common.

    `start` names the trained codec, of the same shape, that training continues from; None: training from scratch.
    One record in `held_out` of each source is never trained on and selects the best averaged weights. In the last
    `settle_fraction` of the run the latent's statistics are frozen. A run fails if, after `guard_from` steps, more
    than `max_saturated` of the latent is beyond the gradient, or a channel carries less than `min_bits` of its bits.
    """

    kind: str
    start: str | None = None
    codec: QuantizerConfig
    data: CodecDataConfig = CodecDataConfig()
    sources: dict[str, AnySourceConfig] = Field(min_length=1)
    loop: LoopConfig = LoopConfig()
    held_out: int = Field(default=20, ge=2)
    settle_fraction: float = Field(default=0.2, ge=0, le=1)
    average: float = Field(default=0.999, ge=0, lt=1)
    guard_from: int = Field(default=200, ge=1)
    max_saturated: float = Field(default=0.1, gt=0, le=1)
    min_bits: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not isinstance(self.loop.steps, int):
            raise ValueError("a codec's loop.steps must be a number, since its loss changes near the end")
        for name in self.data.source_weights:
            if name not in self.sources:
                hint = nearest(name, list(self.sources))
                raise ValueError(f"data.source_weights names {name!r}, which is not a source; {hint}")
        return self


@dataclass(frozen=True)
class CodecBatch:
    """One step's batch: only its index, from which the device makes the data."""

    step: int
    tokens: int

    @property
    def cursor(self) -> dict[str, Any]:
        return {"step": self.step}


class CodecSubject(Protocol):
    """What differs between images and audio; it is `selected_by` a score, the highest (1) or the lowest (-1)."""

    positions_per_batch: int
    selected_by: tuple[str, int]

    def draw(self, seed: int) -> Tensor: ...

    def loss(self, target: Tensor, output: Tensor, settling: bool) -> Tensor: ...

    def held_out_scores(self, codec: TrainableCodec) -> dict[str, float]: ...

    def test_scores(self, codec: TrainableCodec) -> dict[str, dict[str, float]]: ...


class CodecTraining(TrainingTask):
    """Train a codec, average its weights, keep the average that does best on held-out records, and write it."""

    def __init__(self, recipe: CodecRecipe, subject: CodecSubject, device: torch.device) -> None:
        self.recipe, self.subject, self.device = recipe, subject, device
        seed_everything(recipe.loop.seed, "weights")
        codec = first_codec(recipe)
        self.codec = self.model = codec.to(device)
        self.averaged = deepcopy(codec).requires_grad_(False).eval()
        self.best = deepcopy(self.averaged)
        self.averages = nn.ModuleDict({"averaged": self.averaged, "best": self.best})
        self.best_score: float | None = None  # JSON has no infinity
        self.updates = 0
        self.health: QuantizerStats | None = None
        self._begin = 0
        # The last step before the latent's statistics are frozen.
        self._settle_from = round(int(recipe.loop.steps) * (1.0 - recipe.settle_fraction))

    def batches(self) -> Iterator[CodecBatch]:
        for step in itertools.count(self._begin + 1):
            yield CodecBatch(step, self.subject.positions_per_batch)

    def restore(self, cursor: dict[str, Any]) -> None:
        self._begin = int(cursor["step"])

    def loss(self, batch: CodecBatch) -> StepResult:
        settling = batch.step > self._settle_from
        for norm in self.codec.latent_norms():
            norm.frozen = settling
        # Data, losses and rounding stay in fp32; the loop's autocast holds for the networks alone.
        with torch.autocast(self.device.type, enabled=False):
            # This word is part of the seed: with another one, the batches would not be those of the shipped codecs.
            raw = self.subject.draw(derive_seed(self.recipe.loop.seed, "lesson", batch.step))
        output, quantized = self.codec.reconstruct(raw)
        with torch.autocast(self.device.type, enabled=False):
            loss = self.subject.loss(raw, output, settling) + COMMITMENT * quantized.commitment
        self.health = health = quantized.health
        metrics: dict[str, float | Tensor] = {
            "latent/mean_magnitude": health.mean_magnitude,
            "latent/saturated": health.saturated,
            "latent/bits": health.bits.sum(),
            "latent/poorest_channel": (health.bits / health.capacity).min(),
        }
        return StepResult(loss, metrics)

    def after_step(self, result: StepResult) -> None:
        self.updates += 1
        keep = min(self.recipe.average, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            pairs = zip(self.averaged.state_dict().values(), self.codec.state_dict().values(), strict=True)
            for average, new in pairs:
                average.lerp_(new, 1.0 - keep)

    def state(self) -> dict[str, Any]:
        return {**self.averages.state_dict(), "updates": self.updates, "best_score": self.best_score}

    def load_state(self, state: dict[str, Any]) -> None:
        self.averages.load_state_dict({name: value for name, value in state.items() if isinstance(value, Tensor)})
        self.updates, self.best_score = state["updates"], state["best_score"]

    def files(self, last: bool = True) -> dict[str, str | bytes]:
        return {"codec.json": self.codec.config.model_dump_json(indent=2) + "\n"}

    def evaluate(self, step: int) -> dict[str, float]:
        """Return scores on held-out records, keep the best weights; TrainingError if the latent has collapsed."""
        health, recipe = self.health, self.recipe
        if health is not None and step > recipe.guard_from:
            if (saturated := health.saturated.item()) > recipe.max_saturated:
                raise TrainingError(
                    f"{saturated:.0%} of the latent is saturated, over {recipe.max_saturated:.0%}:"
                    " lower loop.optimizer.learning_rate"
                )
            used = health.bits / health.capacity
            if used.min() < recipe.min_bits:
                raise TrainingError(
                    f"channel {int(used.argmin())} of the latent carries {used.min():.0%} of its bits, under"
                    f" {recipe.min_bits:.0%}: lower loop.optimizer.learning_rate or train on more varied data"
                )
        with torch.autocast(self.device.type, enabled=False):
            scores = self.subject.held_out_scores(self.averaged)
        name, sign = self.subject.selected_by
        score = sign * scores[name]
        if score > (-math.inf if self.best_score is None else self.best_score):
            self.best_score = score
            self.best.load_state_dict(self.averaged.state_dict())
        return scores

    def finish(self, run: RunFolder) -> None:
        if self.best_score is None:
            self.best.load_state_dict(self.averaged.state_dict())
        save_codec(self.best, run.path / CODEC_FILE)
        scores = {"held_out": self.subject.held_out_scores(self.best), "test": self.subject.test_scores(self.best)}
        replace_text(run.path / SCORES_FILE, json.dumps(scores, indent=2) + "\n")
        get_log().info(f"wrote {run.path / CODEC_FILE}: {json.dumps(scores['test'])}")


def first_codec(recipe: CodecRecipe) -> TrainableCodec:
    """Return a new codec, with the weights of the recipe's start; ConfigError if that is of another shape.

    A codec with codebooks may start from one with FSQ: its networks, but no vectors.
    """
    make = CODECS[recipe.kind.removeprefix("codec-")][1]
    if recipe.start is None:
        return make(recipe.codec)
    start = load_codec(recipe.start)
    if isinstance(start, TrainableCodec) and start.config == recipe.codec:
        return start.requires_grad_(True).train()
    codec = make(recipe.codec)
    own, tensors = codec.state_dict(), start.state_dict()
    new = {f"quantizer.{name}" for name in VectorQuantizer.OWN} & own.keys()
    shapes = {name: one.shape for name, one in own.items() if name not in new}
    if not new or {name: one.shape for name, one in tensors.items()} != shapes:
        raise ConfigError(f"start={recipe.start} has another shape than codec, which must be {start.config!r}")
    codec.load_state_dict({**own, **tensors})
    return codec


def read_records(
    sources: Mapping[str, SourceConfig], split: Split, key: str, read: Callable[[bytes], Raw]
) -> dict[str, list[Raw]]:
    """Return the decoded images or audio of sources of a split without broken ones; DataError if none to train on."""
    found: dict[str, list[Raw]] = {}
    for name, source in open_sources(sources, split).items():
        records = []
        for index in range(len(source)):
            try:
                data = source[index].get(key)
                if data is not None:
                    records.append(read(data))
            except DataError as error:
                get_log().warning(f"source {name!r}, record {index} is left out: {error}")
        if records:
            found[name] = records
        elif split == "train":
            raise DataError(f"source {name!r} has no usable {key} in its records: map a column with fields, or drop it")
    return found


def hold_out(records: dict[str, list[Raw]], every: int) -> tuple[dict[str, list[Raw]], list[Raw]]:
    """Return each source's records without the second of every `every`, and all those; DataError if there is none."""
    kept = {name: [raw for i, raw in enumerate(part) if i % every != 1] for name, part in records.items()}
    held = [raw for part in records.values() for raw in part[1::every]]
    if not held:
        raise DataError("no source has two records, one to train on and one to evaluate on: add records")
    return kept, held


def draw_weights(sizes: Mapping[str, Sequence[float]], source_weights: Mapping[str, float]) -> Tensor:
    """Return how often each item is drawn: weights are fractions of all sizes, divided evenly; else by size.  # -> N"""
    total = sum(map(sum, sizes.values()))
    weights = {name: weight * total / len(sizes[name]) for name, weight in source_weights.items() if name in sizes}
    every = [weights.get(name, size) for name, part in sizes.items() for size in part]
    return torch.tensor(every, dtype=torch.float64)


class DeviceRng:
    """Random numbers from one generator on a device, so that the same seed makes the same batch."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def bernoulli(self, probability: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < probability
