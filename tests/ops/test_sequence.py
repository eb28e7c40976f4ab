"""The sequence rule: a brute-force reading of it, and its three written forms held equal."""

from __future__ import annotations

from multiprocessing import Pipe

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from openm6.ops.sequence import (
    SequenceMeta,
    additive_mask,
    block_kinds,
    block_mask,
    causal_meta,
    join,
    pad_to_multiple,
    visible,
)
from tests.sequences import narrow, padding_meta


def random_meta(batch: int, length: int, seed: int) -> SequenceMeta:
    """Rows of a few examples with a source, text, private blocks and padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randint(0, 3, (batch, length), generator=generator, dtype=torch.int32).sort(dim=1).values
    order = torch.randint(0, 4, (batch, length), generator=generator, dtype=torch.int32)
    private = torch.randint(-3, 3, (batch, length), generator=generator, dtype=torch.int32).clamp(min=0)
    meta = SequenceMeta(sample, order, private, torch.zeros(batch, length, 3))
    return join([narrow(meta, 0, length - length // 5), padding_meta(batch, length // 5)])


def test_visible_reads_as_the_rule():
    query, key = random_meta(2, 11, 0), random_meta(2, 23, 1)
    mask = visible(query, key)
    assert mask.shape == (2, 1, 11, 23)
    for b in range(2):
        for q in range(11):
            for k in range(23):
                same = query.example_id[b, q] == key.example_id[b, k]
                not_later = key.attn_order[b, k] <= query.attn_order[b, q]
                open_to = key.block_id[b, k] == 0 or key.block_id[b, k] == query.block_id[b, q]
                assert mask[b, 0, q, k].item() == bool(same and not_later and open_to)


def test_every_token_sees_itself():
    meta = random_meta(3, 40, 2)
    assert visible(meta, meta).diagonal(dim1=-2, dim2=-1).all()


def test_source_text_and_private_block():
    """Two source tokens, one word, then a private image of two codes, then another word."""
    order = torch.tensor([[0, 0, 1, 2, 2, 3]], dtype=torch.int32)
    private = torch.tensor([[0, 0, 0, 1, 1, 0]], dtype=torch.int32)
    meta = SequenceMeta(torch.zeros_like(order), order, private, torch.zeros(1, 6, 3))
    expected = torch.tensor(
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 0],
            [1, 1, 1, 0, 0, 1],
        ]
    )
    assert torch.equal(visible(meta, meta)[0, 0].int(), expected.int())


def test_causal_meta_is_lower_triangular():
    meta = causal_meta(2, 7, start=5)
    assert torch.equal(visible(meta, meta)[1, 0], torch.ones(7, 7).tril().bool())
    assert meta.positions[0, :, 2].tolist() == list(range(5, 12))


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_of_a_block_mask_equals_the_boolean_mask(seed):
    meta = random_meta(2, 40, seed)
    flex = create_mask(block_mask(meta, block=8).mask_mod, 2, 1, 40, 40, device="cpu")
    assert torch.equal(flex, visible(meta, meta))


@pytest.mark.parametrize("seed", range(4))
def test_block_kinds_never_contradict_the_rule(seed):
    packed = random_meta(2, 160, seed)
    order = packed.attn_order.sort(dim=1).values  # long runs, so that some blocks are whole and some empty
    meta = SequenceMeta(packed.example_id, order, packed.block_id * (seed % 2), packed.positions)
    some, whole = block_kinds(meta, block=8)
    pairs = visible(meta, meta)[:, 0].unflatten(2, (-1, 8)).unflatten(1, (-1, 8)).transpose(2, 3)
    assert pairs.flatten(3).all(-1)[whole].all()
    assert not pairs.flatten(3).any(-1)[~some].any()
    assert (~some).any(), "nothing is skipped: the summary is of no use"
    if seed % 2 == 0:
        assert whole.any(), "nothing is whole: the summary is of no use"


def test_block_mask_lists_the_blocks():
    meta = random_meta(2, 160, 3)
    some, _ = block_kinds(meta, block=8)
    assert torch.equal(block_mask(meta, block=8).to_dense()[:, 0].bool(), some)


def test_padded_rows_see_what_they_saw():
    meta = random_meta(2, 13, 3)
    padded = pad_to_multiple(meta, 8)
    assert padded.length == 16 and pad_to_multiple(padded, 8) is padded
    mask = visible(padded, padded)
    assert torch.equal(mask[..., :13, :13], visible(meta, meta))
    assert mask.any(-1).all() and not padded.valid[:, 13:].any()


def test_additive_mask_is_the_boolean_mask_in_logs():
    meta = random_meta(1, 20, 5)
    mask = visible(meta, meta)
    assert torch.equal(additive_mask(mask, torch.float32).exp(), mask.float())


def test_meta_refuses_unequal_shapes():
    good = causal_meta(2, 5)
    with pytest.raises(ValueError, match="positions B S 3"):
        SequenceMeta(good.example_id, good.attn_order, good.block_id, good.positions[..., :2])
    with pytest.raises(ValueError, match="one shape"):
        SequenceMeta(good.example_id, good.attn_order[:, :3], good.block_id, good.positions)


@pytest.mark.parametrize("meta", [causal_meta(2, 5), padding_meta(2, 5)], ids=["causal", "padding"])
def test_meta_goes_to_another_process_whole(meta: SequenceMeta) -> None:
    reader, writer = Pipe(duplex=False)
    writer.send(meta)
    found = reader.recv()
    assert all(torch.equal(a, b) for a, b in zip(found.parts(), meta.parts(), strict=True))
