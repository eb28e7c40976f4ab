"""A record through a task and the modalities: an example as a sequence of tokens."""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, replace
from itertools import islice

import numpy as np

from openm6.core.errors import DataError
from openm6.core.seeds import numpy_generator
from openm6.data.mixture import MixtureSampler, SampleIndex
from openm6.data.records import Record, unless_broken
from openm6.data.source import Source
from openm6.modalities.batch import PackedExample, build_pair, build_sequence
from openm6.modalities.interface import Part
from openm6.modalities.pool import pooled
from openm6.modalities.registry import Modalities, opened, source_segments, split_opening, target_segment
from openm6.modalities.text import MASK_CHARACTER
from openm6.tasks.registry import NONE, task_named
from openm6.tasks.task import Example, Task

NULL_FRACTION = 0.1  # of every task's examples: likelihoods without inputs must be learned to be measured
UNCONDITIONAL_FRACTION = 0.05  # of image and audio targets, beyond these: no source, for classifier-free guidance
OTHERS = 2  # records whose texts a matching task may show instead


def null_example(example: Example, source_name: str) -> Example:
    """The example with its inputs dropped: a mark and the name of its data source stand before the prompt.

    The name keeps the null likelihood within one source. Tasks share prompts across sources, and which source a
    record comes from would otherwise count as information of its inputs. A target to inpaint loses its context.
    """
    source = [Part("text", f"{MASK_CHARACTER}{source_name} {example.prompt}", {"gaps": True})]
    target = replace(example.target, options={**example.target.options, "mask_context": True})
    return replace(example, source=source, target=target)


def example_sequence(
    example: Example, modalities: Modalities, rng: np.random.Generator | None = None, weight: float = 1.0
) -> PackedExample:
    """The example as tokens; a generator means training. DataError if a part is broken or out of bounds."""
    if example.contrastive:
        space = f"{sorted({part.modality for part in example.source})} {example.target.modality}"
        sides = (source_segments(parts, modalities, rng) for parts in (example.source, [example.target]))
        left, right = (pooled(side, example.key, space, learn=True) for side in sides)
        return build_pair(left, right, example.task, weight)
    target = target_segment(example.target, modalities, rng)
    guided = example.target.modality in ("image", "audio")
    unconditional = rng is not None and guided and rng.random() < UNCONDITIONAL_FRACTION
    # A clip of another pitch or tempo would have another number than the one that is learned, and a shifted image
    # another edited one.
    options = {"numbers": {"measured": True}, "image": {"aligned": True}}.get(example.target.modality, {})
    parts = [replace(part, options=part.options | options) for part in example.source]
    source = [] if unconditional else source_segments(parts, modalities, rng)
    if target.placement == "causal":
        source, opening = split_opening(source)
        target = opened(target, opening)
    return build_sequence([*source, target], example.task, weight)


def with_negatives(record: Record, source: Source, rng: np.random.Generator) -> Record:
    """The record with what a few others of its source hold, for tasks that show another; broken ones are left out."""
    drawn = (unless_broken(source.__getitem__, int(index)) for index in rng.integers(0, len(source), 4 * OTHERS))
    chosen = islice((other for other in drawn if other is not None), OTHERS)
    others = [
        {"en": other.get("text_en"), "zh": other.get("text_zh")}
        | {key: other[key] for key in ("image", "audio", "label") if key in other}
        for other in chosen
    ]
    return {**record, "others": others}


@dataclass(eq=False)
class ExampleTransform:
    """A sample of the mixture as a packed example: a pure function of the run's seed and the sample."""

    sampler: MixtureSampler
    modalities: Modalities
    seed: int
    loss_weights: dict[str, float]
    known: InitVar[Mapping[str, Task] | None] = None  # tasks; by default all but own ones

    def __post_init__(self, known: Mapping[str, Task] | None) -> None:
        self.tasks = [task_named(component.task, known or NONE) for component in self.sampler.components]

    def __call__(self, sample: SampleIndex) -> PackedExample:
        """The example as tokens; DataError if the record is broken or lacks what its task needs."""
        component = self.sampler.components[sample.component]
        rng = numpy_generator(self.seed, component.key, sample.epoch, sample.index)
        task = self.tasks[sample.component]
        record = self.sampler.record(sample)
        if task.needs_negatives:
            record = with_negatives(record, component.source, rng)
        example = task.example(record, rng, train=True).of_source(component.source.name)
        if not task.contrastive and rng.random() < NULL_FRACTION:
            example = null_example(example, component.source.name)
        weight = self.loss_weights.get(example.target.modality, 1.0)
        return example_sequence(example, self.modalities, rng, weight=weight)

    def name(self, sample: SampleIndex) -> tuple[str, str]:
        """Source and record of a sample, for the quarantine."""
        component = self.sampler.components[sample.component]
        try:
            return component.source.name, str(self.sampler.record(sample).get("id", sample.index))
        except DataError:
            return component.source.name, f"row {sample.index}"
