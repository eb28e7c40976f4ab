"""Pieces laid out by the sequence rule, and examples gathered into rows."""

from __future__ import annotations

from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from openm6.data.prepare import example_sequence
from openm6.modalities.batch import Batch, build_sequence, collate, count, split
from openm6.modalities.image import image_grid
from openm6.modalities.interface import OWN_ORIGIN, Placement, Segment, line
from openm6.ops.matmul import ROWS
from openm6.ops.sequence import visible
from openm6.tasks.registry import TASKS
from tests.sequences import meta_of
from tests.small_model import demo_sources, loaded, modalities


def segment(length: int, placement: Placement = "source", kind: str = "a", learn: list[int] | None = None) -> Segment:
    learned = np.zeros(length, bool)
    learned[[] if learn is None else learn] = True
    return Segment(kind, {"number": np.arange(length)}, line(length), length, learned, placement)


def test_sources_causal_text_and_blocks() -> None:
    grid, learned = image_grid(2, 2).cells, np.ones(4, bool)
    square = Segment("c", {"number": np.arange(4)}, grid, 2, learned, "block", OWN_ORIGIN)
    found = build_sequence([segment(2), segment(1), segment(3, "causal"), square, segment(2, "block")])
    assert meta_of(found).attn_order[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 5, 5]
    assert meta_of(found).block_id[0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert meta_of(found).positions[0][:6, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert meta_of(found).positions[0][6:10].tolist() == [[6, 8, 8], [6, 8, 24], [6, 24, 8], [6, 24, 24]]
    assert meta_of(found).positions[0][10].tolist() == [8, 8, 8], "an image moves on by its longer side"
    assert len(found) == 12


def test_parts_see_themselves_and_what_stands_before_them() -> None:
    found = build_sequence(
        [segment(2, "part"), segment(1, "part"), segment(2, "causal"), segment(2, "block")], position=3
    )
    assert meta_of(found).attn_order[0].tolist() == [1, 1, 2, 3, 4, 5, 5]
    assert meta_of(found).block_id[0].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert meta_of(found).positions[0][:, 0].tolist() == [3, 4, 5, 6, 7, 8, 9]
    alone, pair = build_sequence([segment(2, "part")]), [segment(2, "part"), segment(1, "part")]
    rows = collate([[alone, build_sequence(pair)]], 5)
    seen = visible(rows.meta, rows.meta)[0, 0]
    assert seen[2:4, 2:4].all() and not seen[2:4, 4].any() and seen[4, 2:].all() and not seen[:2, 2:].any()


def test_text_stands_on_one_place_on_all_axes() -> None:
    assert (meta_of(build_sequence([segment(5)])).positions[0] == np.arange(5)[:, None]).all()


def test_an_empty_piece_changes_nothing() -> None:
    with_it, without = (
        build_sequence([segment(2), segment(0), segment(2, "causal")]),
        build_sequence([segment(2), segment(2, "causal")]),
    )
    with_it, without = meta_of(with_it), meta_of(without)
    assert np.array_equal(with_it.attn_order, without.attn_order)
    assert np.array_equal(with_it.positions, without.positions)


def test_rows_tokens_and_padding() -> None:
    first, second, third = (
        build_sequence([segment(n), segment(2, "causal", learn=[0, 1])], f"t{n}") for n in (1, 2, 3)
    )
    batch = collate([[first, second], [third], []], 8, {"serial": 3})
    assert batch.meta.example_id.tolist() == [[0] * 3 + [1] * 4 + [-1], [0] * 5 + [-1] * 3, [-1] * 8]
    assert batch.meta.attn_order[0].tolist() == [0, 1, 2, 0, 0, 1, 2, 0]
    assert batch.meta.positions[0, :, 0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0], "each example begins at 0"
    assert batch.tokens == 12 and batch.tasks == ["t1", "t2", "t3"] and batch.num_examples == 3
    assert batch.cursor == {"serial": 3}


def test_each_token_is_found_at_its_index() -> None:
    rows = [
        [
            build_sequence([segment(2, kind="x"), segment(3, "causal", "y", [0])]),
            build_sequence([segment(1, "causal", "x", [0])]),
        ],
        [build_sequence([segment(2, kind="y"), segment(2, "block", "x", [1])])],
    ]
    batch = collate(rows, 7)
    place = torch.full((14,), -1)
    for kind in batch.groups.values():
        assert (place[kind.index] == -1).all(), "two tokens at one place"
        place[kind.index] = kind.arrays["number"]
        assert len(kind.index) == len(kind.example) == len(kind.weight)
    assert place.tolist() == [0, 1, 0, 1, 2, 0, -1, 0, 1, 0, 1, -1, -1, -1]
    assert batch.groups["x"].example.tolist() == [0, 0, 1, 2, 2]
    assert batch.groups["y"].index.tolist() == [2, 3, 4, 7, 8]


def test_each_example_weighs_the_same_whatever_its_length() -> None:
    short = build_sequence([segment(1), segment(2, "causal", learn=[0, 1])])
    long = build_sequence([segment(1), segment(9, "causal", learn=list(range(9)))], weight=0.5)
    mixed = build_sequence([segment(3, "causal", "x", [2]), segment(4, "block", "y", [0, 1, 2])])
    batch = collate([[short, long], [mixed]], 16)
    total = torch.zeros(3)
    for kind in batch.groups.values():
        total.index_add_(0, kind.example, kind.weight)
    assert total.tolist() == pytest.approx([1.0, 0.5, 1.0])
    assert batch.groups["a"].weight[:3].tolist() == pytest.approx([0.0, 0.5, 0.5])


def test_an_example_that_learns_nothing_weighs_nothing() -> None:
    batch = collate([[build_sequence([segment(3)])]], 4)
    assert batch.groups["a"].weight.tolist() == [0, 0, 0]


def mixed_batch() -> Batch:
    rows = [
        [build_sequence([segment(n, kind="x"), segment(3, "causal", "y", [0, 2])], f"t{n}") for n in (2, 5)],
        [
            build_sequence([segment(4, kind="y"), segment(3, "block", "x", [1])], "t4"),
            build_sequence([segment(1, "causal", "x", [0])]),
        ],
    ]
    return collate(rows, 14, {"serial": 9})


def test_parts_hold_every_token_once_and_keep_examples_whole() -> None:
    batch = mixed_batch()
    parts = split(batch, 2)
    assert sum(part.tokens for part in parts) == batch.tokens
    assert all(part.whole == count(batch) for part in parts)
    assert [part.cursor for part in parts] == [{"serial": 9}, {}]
    examples = [{n for kind in part.groups.values() for n in kind.example.tolist()} for part in parts]
    assert examples[0] | examples[1] == {0, 1, 2, 3} and not examples[0] & examples[1]
    for name, kind in batch.groups.items():
        found = [part.groups[name] for part in parts if name in part.groups]
        joined = torch.cat([part.example * 100 + part.arrays["number"] for part in found])
        assert sorted(joined.tolist()) == sorted((kind.example * 100 + kind.arrays["number"]).tolist())
        assert torch.cat([part.weight for part in found]).sum() == pytest.approx(float(kind.weight.sum()))
    assert max(part.tokens for part in parts) <= 14


def test_more_parts_than_examples() -> None:
    """Some parts are padding alone, which a model computes, and the others have all of the loss."""
    omni = loaded().omni
    record = demo_sources()["questions"][0]
    example = TASKS["question_answering"].example(record, np.random.default_rng(0))
    batch = collate([[example_sequence(example, modalities())]], 512)
    (whole, _), parts = omni.compute_loss(batch), split(batch, 3)
    assert sorted(part.tokens for part in parts) == [0, 0, batch.tokens]
    found = [omni.compute_loss(part)[0] for part in parts]
    assert [len(losses) for losses in found] == [1, 0, 0]
    torch.testing.assert_close(found[0]["text"].nll.sum(), whole["text"].nll.sum())


def test_parts_see_what_the_whole_saw() -> None:
    """The tokens of an example keep their order, their rule and their places in a part."""
    batch = mixed_batch()
    mask = visible(batch.meta, batch.meta)
    for part in split(batch, 3):
        seen = visible(part.meta, part.meta)[0, 0]
        assert part.meta.batch == 1 and part.meta.length % ROWS == 0
        assert int(part.meta.valid.sum()) == part.tokens > part.meta.length - ROWS
        for name, kind in part.groups.items():
            whole = batch.groups[name]
            for example in kind.example.unique():
                there, here = whole.index[whole.example == example], kind.index[kind.example == example]
                row = there[0] // 14
                assert torch.equal(mask[row, 0][there % 14][:, there % 14], seen[here][:, here])
                positions = batch.meta.positions.flatten(0, 1)
                assert torch.equal(positions[there], part.meta.positions[0][here])


def test_a_batch_survives_the_way_to_another_process() -> None:
    batch = mixed_batch()
    ours, theirs = Pipe()
    ours.send(batch)
    copy = theirs.recv()
    assert copy.tasks == batch.tasks and copy.cursor == batch.cursor
    for one, other in zip(batch.meta.parts(), copy.meta.parts(), strict=True):
        assert torch.equal(one, other)
    for name, kind in batch.groups.items():
        assert torch.equal(kind.index, copy.groups[name].index)
        assert torch.equal(kind.arrays["number"], copy.groups[name].arrays["number"])


def test_learned_lists_the_tokens_with_a_weight_wherever_a_batch_goes() -> None:
    sequences = [
        build_sequence([segment(3, kind="a"), segment(4, "causal", kind="b", learn=[0, 2])]),
        build_sequence([segment(2, "causal", kind="a", learn=[1])]),
        build_sequence([segment(5, kind="a"), segment(2, "block", kind="b", learn=[0, 1])], weight=0.0),
    ]
    batch = collate([sequences[:2], sequences[2:]], 16)
    assert {name: kind.learned.tolist() for name, kind in batch.groups.items()} == {"a": [4], "b": [0, 2]}
    reader, writer = Pipe(duplex=False)
    writer.send(batch)
    moved = [batch, batch.to("cpu"), reader.recv(), *split(batch, 2)]
    for kind in (kind for one in moved for kind in one.groups.values()):
        assert torch.equal(kind.learned, kind.weight.nonzero()[:, 0])
    assert sum(count(part).learned.get("b", 0) for part in split(batch, 2)) == 2
