"""A record through a task and the modalities: an example as a sequence of tokens."""

from __future__ import annotations

from collections.abc import Sequence as Many
from itertools import islice

import numpy as np

from openm6.base.errors import DataError
from openm6.base.seeds import numpy_generator
from openm6.data.mixture import Draw, Mixture
from openm6.data.records import Record
from openm6.data.source import Source
from openm6.modalities.interface import Part
from openm6.modalities.pool import pooled
from openm6.modalities.registry import Modalities, source_pieces, target_piece
from openm6.modalities.sequence import Sequence, lay_out, lay_out_pair
from openm6.tasks.registry import task_named
from openm6.tasks.task import Example

UNCONDITIONAL_SHARE = (
    0.1  # of drawn and spoken examples lose their whole source, for classifier-free guidance
)
OTHERS = 2  # records whose texts a matching task may show instead


def example_sequence(
    example: Example,
    modalities: Modalities,
    rng: np.random.Generator | None = None,
    source: Many[Part] | None = None,
    weight: float = 1.0,
) -> Sequence:
    """The example as tokens; `source` replaces its own (None: its own); a generator means training.

    Raises:
        DataError: a part is broken or out of bounds.
    """
    if task_named(example.task).contrasts:
        return _pair_sequence(example, modalities, rng, weight)
    target = target_piece(example.target, modalities, rng)
    parts = example.source if source is None else source
    drops = rng is not None and target.placement == "block" and example.target.modality != "numbers"
    if drops and rng is not None and rng.random() < UNCONDITIONAL_SHARE:
        parts = []
    return lay_out([*source_pieces(parts, modalities, rng), target], example.task, weight)


def _pair_sequence(
    example: Example, modalities: Modalities, rng: np.random.Generator | None, weight: float
) -> Sequence:
    """Both sides of a contrastive example, each closed by the token that pools it."""
    kinds = {part.modality for part in example.source}
    space = f"{sorted(kinds)} {example.target.modality}"
    left = source_pieces(example.source, modalities, rng)
    right = source_pieces([example.target], modalities, rng)
    left, right = (pooled(side, example.key, space, learn=True) for side in (left, right))
    return lay_out_pair(left, right, example.task, weight)


def with_others(record: Record, source: Source, rng: np.random.Generator) -> Record:
    """The record with what a few others of its source hold, for tasks that show a wrong one or a second one.

    Broken ones are passed over: the quarantine names a record when it is drawn itself, never for another's fault.
    """
    drawn = (_unbroken(source, int(index)) for index in rng.integers(0, len(source), 4 * OTHERS))
    chosen = islice((other for other in drawn if other is not None), OTHERS)
    others = [
        {"en": other.get("text_en"), "zh": other.get("text_zh")}
        | {key: other[key] for key in ("image", "audio", "label") if key in other}
        for other in chosen
    ]
    return {**record, "others": others}


def _unbroken(source: Source, index: int) -> Record | None:
    try:
        return source[index]
    except DataError:
        return None


class Preparer:
    """Makes the training sequence of a draw: a pure function of the run's seed and the draw."""

    def __init__(
        self, mixture: Mixture, modalities: Modalities, seed: int, loss_weights: dict[str, float]
    ) -> None:
        self.mixture = mixture
        self.modalities = modalities
        self.seed = seed
        self.loss_weights = loss_weights

    def sequence(self, draw: Draw) -> Sequence:
        """Raises DataError where the record is broken or lacks what its task needs."""
        component = self.mixture.components[draw.component]
        rng = numpy_generator(self.seed, component.key, draw.epoch, draw.index)
        task = task_named(component.task)
        record = self.mixture.record(draw)
        if task.compares:
            record = with_others(record, component.source, rng)
        example = task.example(record, rng, train=True)
        weight = self.loss_weights.get(example.target.modality, 1.0)
        return example_sequence(example, self.modalities, rng, weight=weight)

    def name(self, draw: Draw) -> tuple[str, str]:
        """Source and record of a draw, for the quarantine."""
        component = self.mixture.components[draw.component]
        try:
            return component.source.name, str(self.mixture.record(draw).get("id", draw.index))
        except DataError:
            return component.source.name, f"row {draw.index}"
