"""A small backbone under words: it learns to count on, in a second, so that runs can be compared to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.seeds import numpy_generator
from openm6.models.backbone import Backbone, side_loss
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.moe import RouterStats
from openm6.ops.sequence import causal_meta
from openm6.optim.config import OptimizerConfig, ScheduleConfig
from openm6.train.config import LoopConfig
from openm6.train.training_task import StepResult, TrainingTask

WORDS, LENGTH, ROWS, WIDTH = 32, 16, 4, 32


def words_backbone(**changes: Any) -> BackboneConfig:
    """Four layers, every second one with experts, one of which sees every token."""
    values: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_layers": 4,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
        "dense": DenseConfig(intermediate_size=32),
        "experts": ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2, num_shared=1),
        "moe_layer_freq": 2,
    }
    return BackboneConfig(**{**values, **changes})


class WordModel(nn.Module):
    """An embedding, a backbone, and the embedding again."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.backbone = Backbone(config)

    def forward(self, words: Tensor) -> tuple[Tensor, list[RouterStats]]:
        hidden, loads = self.backbone(self.embedding(words), causal_meta(*words.shape, device=words.device))
        return F.linear(hidden, self.embedding.weight), loads


@dataclass(frozen=True)
class WordBatch:
    words: Tensor
    index: int

    @property
    def tokens(self) -> int:
        return self.words.numel()

    @property
    def cursor(self) -> dict[str, Any]:
        return {"next": self.index + 1}


class WordsTraining(TrainingTask):
    """Each row counts up in steps of its own; the next number is to be predicted."""

    def __init__(
        self, config: BackboneConfig, spoilt: tuple[int, ...] = (), device: torch.device | None = None
    ) -> None:
        torch.manual_seed(3)
        self.words = WordModel(config).to(device or torch.device("cpu"))
        self.model: nn.Module = self.words
        self.spoilt, self.first = spoilt, 0

    def batch(self, index: int) -> WordBatch:
        draw = numpy_generator(3, "batch", index)
        start, stride = draw.integers(0, WORDS, (ROWS, 1)), draw.integers(1, 5, (ROWS, 1))
        return WordBatch(torch.from_numpy((start + stride * np.arange(LENGTH + 1)) % WORDS), index)

    def batches(self) -> Iterator[WordBatch]:
        index = self.first
        while True:
            yield self.batch(index)
            index += 1

    def restore(self, cursor: dict[str, Any]) -> None:
        self.first = cursor["next"]

    def loss(self, batch: WordBatch) -> StepResult:
        words = batch.words.to(self.words.embedding.weight.device)
        logits, loads = self.words(words[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        if batch.index + 1 in self.spoilt:
            loss = loss * float("nan")
        return StepResult(loss + side_loss(loads), {"loss/words": loss}, loads)

    def after_step(self, result: StepResult) -> None:
        self.words.backbone.update_balance(list(result.loads))

    @property
    def backbone(self) -> Backbone:
        return self.words.backbone

    @property
    def tokens_per_step(self) -> int:
        return ROWS * LENGTH

    def delink(self) -> dict[str, str]:
        return {f"backbone.{new}": f"backbone.{old}" for new, old in self.words.backbone.delink().items()}


def words_config(steps: int = 12, **changes: Any) -> LoopConfig:
    """A short run in fp32, saved at odd moments."""
    values: dict[str, Any] = {
        "steps": steps,
        "optimizer": OptimizerConfig(learning_rate=0.01),
        "schedule": ScheduleConfig(warmup_steps=2, decay_fraction=0.3),
        "log_every": 1,
        "save_every": 5,
        "keep_last": 9,
        "tensorboard": False,
        "precision": "fp32",
    }
    return LoopConfig(**{**values, **changes})
