"""Packing: nothing is lost or seen twice, any batch can be made again, what is broken or too long is counted."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from openm6.core.errors import TrainingError
from openm6.data.mixture import Component, MixtureSampler, SampleIndex
from openm6.data.packing import Packer, PackingConfig, merge_cursors
from openm6.data.prepare import ExampleTransform, example_sequence
from openm6.data.quarantine import Quarantine
from openm6.modalities.batch import Batch, PackedExample, shortened
from openm6.modalities.text import Text
from openm6.tasks.registry import TASKS
from tests.data.lists import ListSource
from tests.data.sample_images import png
from tests.sequences import meta_of
from tests.small_model import modalities

CONFIG = PackingConfig(batch_size=2, seq_len=64, buffer_size=3)


def texts(count: int, broken: tuple[int, ...] = (), longest: int = 30) -> list[dict | None]:
    """Records of all lengths; the answer tells which one it is."""
    return [
        None
        if n in broken
        else {"id": f"r{n}", "text_en": "x" * (1 + n * 7 % longest), "question": "?", "answer": f"{n}."}
        for n in range(count)
    ]


def packer(
    records: list[dict | None],
    config: PackingConfig = CONFIG,
    quarantine: Quarantine | None = None,
    second: list[dict | None] | None = None,
) -> Packer:
    parts = [Component(source=ListSource("first", records), task="question_answering")]
    if second is not None:
        parts.append(Component(source=ListSource("second", second), task="question_answering", weight=2.0))
    transform = ExampleTransform(MixtureSampler(parts, 5), modalities(), 5, {})
    return Packer(transform, config, quarantine or Quarantine(limit=1.0))


def buffered(made: Packer) -> list[SampleIndex]:
    """The samples that did not fit a row yet."""
    return [sample for shard in made.sampler.shards for sample in shard.buffer]


def batches(made: Packer, count: int) -> list[Batch]:
    return list(itertools.islice(made.batches(), count))


def answers(batch: Batch) -> list[str]:
    """The answers of all examples of a batch, in order."""
    text = modalities()["text"]
    assert isinstance(text, Text)
    kind = batch.groups["text"]
    return [
        text.decode([i for i in kind.arrays["labels"][kind.example == e].tolist() if i >= 0])
        for e in range(batch.num_examples)
    ]


def same(first: Batch, second: Batch) -> bool:
    metas = zip(first.meta.parts(), second.meta.parts(), strict=True)
    return (
        first.cursor == second.cursor
        and first.groups.keys() == second.groups.keys()
        and all(torch.equal(a, b) for a, b in metas)
        and all(
            torch.equal(a, second.groups[k].arrays[n])
            for k, kind in first.groups.items()
            for n, a in kind.arrays.items()
        )
    )


@pytest.mark.parametrize("after", [0, 1, 4, 9])
def test_the_cursor_gives_the_very_next_batches(after: int) -> None:
    records = texts(23, broken=(4,))
    unbroken = batches(packer(records, second=texts(7)), after + 5)
    resumed = packer(records, second=texts(7))
    if after:
        resumed.restore(json.loads(json.dumps(unbroken[after - 1].cursor)))
    for wanted, found in zip(unbroken[after:], batches(resumed, 5), strict=True):
        assert same(wanted, found)


def test_no_example_is_lost_or_seen_twice() -> None:
    """Every draw up to the last batch is in a batch, waits, or was broken: each once."""
    made = packer(texts(17, broken=(3, 11)))
    seen = Counter(answer for batch in batches(made, 12) for answer in answers(batch))
    drawn = made.sampler.state()["mixture"]["global_index"]
    plan = MixtureSampler(list(made.sampler.components), 5)
    wanted = Counter(f"{plan.draw().index}." for _ in range(drawn))
    del wanted["3."], wanted["11."]
    waiting = Counter(f"{draw.index}." for draw in buffered(made))
    assert seen + waiting == wanted and sum(seen.values()) > 60


def test_each_record_is_seen_about_once_an_epoch() -> None:
    seen = Counter(answer for batch in batches(packer(texts(20)), 20) for answer in answers(batch))
    assert set(seen) == {f"{n}." for n in range(20)}
    assert max(seen.values()) - min(seen.values()) <= 2, "the longest may wait, but not starve"


def test_rows_are_full_and_hold_whole_examples() -> None:
    for batch in batches(packer(texts(30)), 8):
        assert batch.meta.example_id.shape == (2, 64)
        assert int(batch.meta.valid.sum()) == batch.tokens > 0.75 * 2 * 64
        for row in batch.meta.example_id.tolist():
            numbers = [number for number, _ in itertools.groupby(row)]
            assert numbers in (list(range(len(numbers))), [*range(len(numbers) - 1), -1])


def test_what_is_broken_is_counted_once_for_each_draw(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=1.0)
    made = packer(texts(10, broken=(2, 7)), quarantine=quarantine)
    placed = sum(batch.num_examples for batch in batches(made, 10))
    drawn = made.sampler.state()["mixture"]["global_index"]
    broken = quarantine.counts["broken"].total()
    assert broken == drawn - placed - len(buffered(made))
    assert quarantine.seen == placed + broken, "an example that waits is counted when it is placed"
    listed = [json.loads(line)["id"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["row 2", "row 7"], "each is listed once"
    assert quarantine.broken_fraction == pytest.approx(0.2, abs=0.05)


def drawing(records: list[dict | None], length: int, quarantine: Quarantine, beside: bool = False) -> Packer:
    """Images to be drawn, whose 64 codes cannot be cut, and texts beside them."""
    parts = [Component(source=ListSource("images", records), task="text_to_image")]
    parts += [Component(source=ListSource("texts", texts(9)), task="question_answering")] if beside else []
    transform = ExampleTransform(MixtureSampler(parts, 5), modalities(), 5, {})
    return Packer(transform, PackingConfig(batch_size=1, seq_len=length), quarantine)


IMAGES: list[dict | None] = [{"id": f"i{n}", "image": png(), "text_en": "red"} for n in range(4)]


def test_what_is_too_long_is_set_aside_with_advice_and_is_not_broken(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.0, minimum=1)
    made = drawing(IMAGES, 48, quarantine, beside=True)
    found = batches(made, 20)
    assert all(batch.num_examples and "image_out" not in batch.groups for batch in found)
    assert not quarantine.counts["broken"] and quarantine.counts["too_long"]["images"] > 10
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == ["i0", "i1", "i2", "i3"]
    assert all(line["kind"] == "too long" and "raise packing.seq_len" in line["reason"] for line in lines)
    fresh = drawing(IMAGES, 48, Quarantine(limit=0.0), beside=True)
    fresh.restore(json.loads(json.dumps(found[-1].cursor)))
    assert fresh.quarantine.counts["too_long"] == Counter(found[-1].cursor["quarantine"]["too_long"])


def test_records_that_are_all_too_long_end_the_search() -> None:
    with pytest.raises(
        TrainingError, match=r"no record of images/text_to_image can be used; .* do not fit a row of 48: raise"
    ):
        batches(drawing(IMAGES, 48, Quarantine(limit=1.0)), 1)


def test_long_texts_are_cut_to_a_row_and_counted_apart(tmp_path: Path) -> None:
    long = "word " * 200
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.0, minimum=1)
    records = [*texts(6), {"id": "long", "text_en": long, "question": "How many words?", "answer": "many"}]
    found = batches(packer(records, quarantine=quarantine), 12)
    number = sum("many" in answers(batch) for batch in found)
    assert number > 1 and 0 < quarantine.counts["truncated"]["first"] <= number, (
        "an example without its input needs no cut"
    )
    assert not quarantine.counts["broken"] and not quarantine.counts["too_long"]
    assert not (tmp_path / "q.jsonl").exists()
    merged = merge_cursors([found[-1].cursor, found[-1].cursor])["quarantine"]
    assert merged["truncated"] == {"first": 2 * found[-1].cursor["quarantine"]["truncated"]["first"]}


def test_a_shortened_example_is_laid_out_as_one_of_that_text(tmp_path: Path) -> None:
    long, short = ("word " * count for count in (200, 30))
    made = [example_of({"id": "1", "text_en": words, "question": "?", "answer": "7"}) for words in (long, short)]
    cut = shortened(made[0], 64)
    assert len(cut) == 64 and cut.truncated and not made[1].truncated
    text = modalities()["text"]
    assert isinstance(text, Text)
    read = text.decode(cut.segments[0].arrays["ids"].tolist())
    assert read.startswith("word word") and read.endswith("?")
    meta = meta_of(cut)
    assert meta.attn_order[0].tolist() == [0] * len(cut.segments[0]) + list(range(1, 1 + len(cut.segments[1])))
    assert meta.positions[0][:, 0].tolist() == list(range(64))
    kept = shortened(made[1], len(made[1]))
    assert torch.equal(meta_of(kept).positions, meta_of(made[1]).positions)


def test_both_sides_of_a_pair_are_cut() -> None:
    record = {"id": "1", "text_en": "word " * 200, "image": png(), "label": "red"}
    whole = example_of(record, "image_text_retrieval")
    cut = shortened(whole, 100)
    assert whole.left and len(whole) > 200 and len(cut) == 100
    assert (
        cut.left == whole.left
        and set(meta_of(cut).attn_order[0].tolist()) == {0}
        and set(meta_of(cut).block_id[0].tolist()) == {1, 2}
    )


def example_of(record: dict, task: str = "question_answering") -> PackedExample:
    return example_sequence(TASKS[task].example(record, np.random.default_rng(0)), modalities())


def test_only_broken_records_stop_instead_of_searching_forever() -> None:
    made = packer([None, None], quarantine=Quarantine(limit=0.05, minimum=20))
    with pytest.raises(TrainingError, match="100.0% of the records are broken"):
        batches(made, 1)


def test_a_record_that_lacks_a_field_is_skipped_not_broken(tmp_path: Path) -> None:
    """A third has no answer: that would be far above the limit of broken records."""
    records = texts(30)
    for record in records[::3]:
        assert record is not None
        del record["answer"]
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.05, minimum=20)
    made = packer(records, quarantine=quarantine)
    found = batches(made, 20)
    assert {answer for batch in found for answer in answers(batch)} == {f"{n}." for n in range(30) if n % 3}
    skipped = quarantine.counts["not_applicable"]["first/question_answering"]
    assert not quarantine.counts["broken"] and not (tmp_path / "q.jsonl").exists()
    assert made.sampler.state()["mixture"]["global_index"] == quarantine.seen + skipped + len(buffered(made))
    assert skipped == pytest.approx(quarantine.seen / 2, abs=8)
    fresh = packer(records)
    fresh.restore(json.loads(json.dumps(found[-1].cursor)))
    assert fresh.quarantine.counts["not_applicable"] == quarantine.counts["not_applicable"]


def test_counts_of_ranks_are_added_up() -> None:
    one = packer(texts(9, broken=(1,)))
    list(itertools.islice(one.batches(), 3))
    one.quarantine.count("not_applicable", "first/question_answering")
    merged = merge_cursors([one.state(), one.state()])["quarantine"]
    assert merged["not_applicable"] == {"first/question_answering": 2}
    assert merged["broken"] == {"first": 2 * one.quarantine.counts["broken"]["first"]}
    assert merged["seen"] == 2 * one.quarantine.seen


@pytest.mark.parametrize("record", [None, {"id": "r", "text_en": "no question"}], ids=["broken", "lacking"])
def test_records_of_which_none_can_be_used_end_the_search(record: dict | None) -> None:
    made = packer([record] * 3, quarantine=Quarantine(limit=1.0), second=[record])
    with pytest.raises(
        TrainingError,
        match="no record of first/question_answering, second/question_answering can be used; the last one: ",
    ):
        batches(made, 1)


def test_one_usable_source_beside_an_unusable_one_goes_on() -> None:
    made = packer([None] * 3, quarantine=Quarantine(limit=1.0), second=texts(5))
    assert len(batches(made, 60)) == 60


def test_counts_survive_a_restart() -> None:
    made = packer(texts(9, broken=(1,)), quarantine=Quarantine(limit=1.0))
    last = batches(made, 6)[-1]
    fresh = packer(texts(9, broken=(1,)), quarantine=Quarantine(limit=1.0))
    fresh.restore(json.loads(json.dumps(last.cursor)))
    assert fresh.state() == last.cursor and fresh.quarantine.counts["broken"]


class Watched(Packer):
    """Notes which draws become sequences."""

    made: list[SampleIndex]

    def _example(self, draw: SampleIndex) -> PackedExample | None:
        self.made.append(draw)
        return super()._example(draw)


def test_one_that_waits_comes_first_in_the_next_batch_and_is_made_once() -> None:
    plain = packer(texts(23))
    watched = Watched(plain.transform, CONFIG, Quarantine(limit=1.0))
    watched.made = []
    for _ in itertools.islice(watched.batches(), 5):
        waiting, before = list(buffered(watched)), len(watched.made)
        batch = next(iter(watched.batches()))
        assert batch.samples[0] == waiting[0], "the first fills the first row"
        assert not set(waiting) & set(watched.made[before:])


def test_those_still_waiting_when_the_rows_are_full_wait_on() -> None:
    """Examples as long as a row: the first that waited fills it, and the others must not be forgotten."""
    long = [{"id": f"l{n}", "text_en": "x" * 30, "question": "?", "answer": f"{n}."} for n in range(5)]
    records = [*long, {"id": "short", "text_en": "x", "question": "?", "answer": "5."}]
    length = max(len(packer(long).transform(SampleIndex(0, 0, n, 0))) for n in range(5))
    made = packer(records, PackingConfig(batch_size=1, seq_len=length, buffer_size=3))
    seen = Counter(answer for batch in batches(made, 24) for answer in answers(batch))
    plan = MixtureSampler(list(made.sampler.components), 5)
    drawn = Counter(f"{plan.draw().index}." for _ in range(made.sampler.state()["mixture"]["global_index"]))
    assert seen + Counter(f"{draw.index}." for draw in buffered(made)) == drawn
