"""Twenty steps in fp32 on every mesh of up to four ranks: losses and gradients are those of one process."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from openm6.distributed.config import MeshShape
from openm6.distributed.fsdp import with_offsets
from openm6.distributed.process_group import ProcessGroupContext
from openm6.distributed.processes import DistributedContext
from openm6.models.backbone import side_loss
from openm6.optim.config import OptimizerConfig
from openm6.train.step import TrainStep
from openm6.train.training_task import StepResult
from tests.distributed.fleet import Fleet
from tests.distributed.test_process_group import CPU
from tests.train.words_training import ROWS, WordBatch, WordsTraining, words_backbone, words_config

Axes = tuple[int, int, int]
STEPS = 20
GATHERED = (1, 2, 10, 20)  # steps whose gradients are compared, as gathering them takes most of the time
MESHES: list[Axes] = [
    (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 1), (2, 1, 2), (1, 2, 2),
]  # fmt: skip


class SharedWords(WordsTraining):
    """Each rank has its rows of the batch, and its share of the loss."""

    def loss(self, batch: WordBatch) -> StepResult:
        rows = ROWS // self.ranks.size
        words = batch.words[self.ranks.rank * rows : (self.ranks.rank + 1) * rows]
        logits, loads = self.words(words[:, :-1])
        share = 1 / self.ranks.size
        loss = share * F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        return StepResult(loss + share * side_loss(loads), {}, loads)


class Watched(TrainStep):
    """Keeps the gradients of the whole model, before they are clipped, in steps that are `watched`."""

    watched = False

    def _clip(self) -> Tensor:
        self.seen: dict[str, Any] = {}
        if not self.watched:
            return super()._clip()
        model, layout = self.training.model, self.training.ranks.layout
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if layout is not None:
            found = with_offsets(model, found, layout)
        whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}
        self.seen = {name: gradient.clone().numpy() for name, gradient in whole.items()}
        return super()._clip()


def steps_on(
    axes: Axes, steps: int = STEPS, changes: dict[str, Any] | None = None, recomputed: int = 0
) -> list[tuple[float, dict[str, np.ndarray]]]:
    """Losses and gradients of a backbone with `changes`, whose first `recomputed` layers run again backwards."""
    training = SharedWords(words_backbone(**(changes or {})))
    if dist.is_initialized():
        training.ranks = DistributedContext(CPU, 60)
        training.ranks.shard(training.model, MeshShape(*axes))
        training.words.backbone.executor.dispatcher = training.ranks.token_dispatcher(1)
    # AdamW divides by a gradient's size: where that is no more than rounding, its default epsilon makes steps of noise.
    optimizer = OptimizerConfig(learning_rate=0.003, epsilon=1e-3)
    config = words_config(STEPS, optimizer=optimizer, activation_checkpointing=recomputed)
    train_step = Watched(training, config)
    found = []
    for step in range(1, steps + 1):
        train_step.watched = step in GATHERED
        report = train_step.update(training.batch(step), step, STEPS)
        found.append((report.loss, train_step.seen))
    return found if training.ranks.is_main_process else []


@cache
def alone() -> list[tuple[float, dict[str, np.ndarray]]]:
    assert type(SharedWords(words_backbone()).ranks) is ProcessGroupContext
    return steps_on((1, 1, 1))


def assert_equal(
    found: list[tuple[float, dict[str, np.ndarray]]], expected: list[tuple[float, dict[str, np.ndarray]]]
) -> None:
    for (loss, gradients), (other, references) in zip(found, expected, strict=True):
        assert loss == pytest.approx(other, rel=1e-5)
        assert gradients.keys() == references.keys()
        apart = {name: float(np.linalg.norm(gradients[name] - one)) for name, one in references.items()}
        wrong = [name for name, one in references.items() if apart[name] > 1e-5 * np.linalg.norm(one)]
        assert not wrong


@pytest.mark.parametrize("axes", MESHES)
def test_losses_and_gradients_equal_one_process(axes: Axes, request: pytest.FixtureRequest) -> None:
    fleet: Fleet = request.getfixturevalue({2: "two", 4: "four"}[math.prod(axes)])
    found = fleet.run(steps_on, axes)[0]
    assert len(found) == STEPS and [step for step, (_, seen) in enumerate(found, 1) if seen] == [*GATHERED]
    assert alone()[-1][0] < 0.97 * alone()[0][0], "it learns: there is something to compare"
    assert_equal(found, alone())


@pytest.mark.parametrize("changes", [{}, {"sharing": "all"}, {"sharing": "all", "share_routers": True}])
def test_layers_that_run_again_backwards_equal_one_process(changes: dict[str, Any], four: Fleet) -> None:
    """Activation checkpointing over sharded modules, which on a GPU is chosen by the memory."""
    found = four.run(steps_on, (1, 2, 2), 3, changes, 3)[0]
    assert_equal(found, steps_on((1, 1, 1), 3, changes))
