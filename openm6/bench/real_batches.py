"""The demo's data as a planner sees it: what an example of each task brings, and batches to time parts on."""

# Letters: E examples, Q queries and K keys of a piece

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.reduction import ForkingPickler

import torch

from openm6.base.run_folder import RunFolder
from openm6.bench.remembering import Watch
from openm6.data.mixture import Draw
from openm6.modalities.batch import Batch, PackedExample, collate
from openm6.ops.attention import piece_mask
from openm6.plan.examples import ExampleFacts
from openm6.train.multimodal import MultimodalJob
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path

EACH = 24  # examples of a task that are counted
PACKED = 6  # batches whose packing is timed
WATCHED, EPOCHS = (
    4,
    16,
)  # records of which is counted what they leave in memories, and how often they are shown


@dataclass(frozen=True)
class Data:
    """Facts of every task of the recipe, the share of places that rows fill, seconds of packing a token, and the bytes
    that each memory of codes holds at most.
    """

    facts: tuple[ExampleFacts, ...]
    fill: float
    token: float
    memories: dict[str, float]


def open_job(overrides: list[str]) -> MultimodalJob:
    """The demo's job with other settings, in a folder that is gone when it is built."""
    checked, _ = read_recipe(recipe_path("demo"), ["loop.minutes=null", "loop.steps=1", *overrides])
    assert isinstance(checked, MultimodalRecipe)
    with tempfile.TemporaryDirectory() as folder:
        return MultimodalJob(checked, RunFolder.open(folder), torch.device("cpu"))


def first_batches(overrides: list[str], count: int) -> list[Batch]:
    """The first batches that a run with these settings trains on."""
    return list(islice(open_job(overrides).batches(), count))


def read_data(job: MultimodalJob, parts: int) -> Data:
    """Counts and times the examples of each task, and their packing for so many processes.

    All are made twice, and the second time counts: but for its first epoch a run remembers codes of pictures and
    sounds.
    """
    watch = Watch(job)
    facts = tuple(_facts(job, number, watch) for number in range(len(job.packer.preparer.mixture.components)))
    by_key = {(one.source, one.task): one.seconds for one in facts}
    keys = [(part.source.name, part.task) for part in job.packer.preparer.mixture.components]
    start, batches = job.packer.state(), job.batches()
    for _ in islice(batches, PACKED):
        pass
    job.restore(start)
    batches = job.batches()
    began, made, tokens, places = time.thread_time(), 0.0, 0, 0
    for batch in islice(batches, PACKED):
        for part in job.split(batch, parts):
            ForkingPickler.dumps(part)  # as a pipe sends it
        made += sum(by_key[keys[draw.component]] for draw in batch.draws)
        tokens, places = tokens + batch.tokens, places + batch.layout.example_id.numel()
    packing = max(0.0, time.thread_time() - began - made)
    return Data(facts, tokens / places, packing / tokens, watch.limits)


def _facts(job: MultimodalJob, component: int, watch: Watch) -> ExampleFacts:
    """Of one component of the mixture: its first records, made as training makes them."""
    preparer = job.packer.preparer
    part = preparer.mixture.components[component]
    draws = [Draw(component, 0, index % len(part.source), index) for index in range(EACH)]
    remembered = watch.count(component)
    examples, times = [], []
    for draw in draws:
        preparer.sequence(draw)  # codes of pictures and sounds are made once and remembered
        began = time.thread_time()
        examples.append(preparer.sequence(draw))
        times.append(time.thread_time() - began)
    pairs, pieces = pairs_and_pieces(examples)
    read, learned = count_kinds(examples)
    return ExampleFacts(
        source=part.source.name,
        task=part.task,
        tokens=sum(map(len, examples)) / EACH,
        read={kind: count / EACH for kind, count in read.items()},
        learned={kind: count / EACH for kind, count in learned.items()},
        pairs=pairs / EACH,
        pieces=pieces / EACH,
        seconds=statistics.median(times),
        remembered=remembered,
    )


def count_kinds(examples: Sequence[PackedExample]) -> tuple[Counter[str], Counter[str]]:
    """Tokens of each kind, and those that are learned."""
    read: Counter[str] = Counter()
    learned: Counter[str] = Counter()
    for piece in (piece for example in examples for piece in example.segments):
        read[piece.kind] += len(piece)
        learned[piece.kind] += int(piece.learn.sum())
    return read, learned


def pairs_and_pieces(examples: Sequence[PackedExample]) -> tuple[int, int]:
    """Σ Q·K over the pieces in which attention goes through these examples, and how many there are."""
    pairs = pieces = 0
    for length, alike in _by_length(examples).items():
        mask = piece_mask(collate([[example] for example in alike], length).layout, torch.float32)
        pairs += sum((piece.stop - piece.start) * (piece.last - piece.first) for piece in mask.pieces)
        pieces += len(mask.pieces)
    return pairs, pieces


def _by_length(examples: Sequence[PackedExample]) -> dict[int, list[PackedExample]]:
    found: dict[int, list[PackedExample]] = defaultdict(list)
    for example in examples:
        found[len(example)].append(example)
    return found
