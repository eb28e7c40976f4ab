"""Grids of codes as a target: masks, losses and the head that predicts a position's codes; positions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from openm6.codecs.base import cell_values, pack, unpack
from openm6.codecs.registry import load_codec
from openm6.core.errors import DataError
from openm6.modalities.audio import audio_grid
from openm6.modalities.codes import (
    GROUP,
    SMOOTHING,
    CodesAdapter,
    FourierPositionEmbedding,
    encode_together,
    random_rectangle,
    sample_mask,
)
from openm6.modalities.image import Image, image_grid, read_image
from tests.data.sample_images import png
from tests.small_model import modalities

LEVELS, GROUPS, WIDTH = (4, 3), 3, 16


def vectors_of(levels: tuple[int, ...], groups: int) -> Tensor:
    """Those of all codes of each group."""
    sizes = torch.tensor(levels)
    return cell_values(unpack(torch.arange(math.prod(levels)), sizes), sizes).expand(groups, -1, -1)


IMAGE: Any = modalities()["image"]


@pytest.fixture
def adapter() -> CodesAdapter:
    torch.manual_seed(0)
    return CodesAdapter(FourierPositionEmbedding(WIDTH), WIDTH, vectors_of(LEVELS, GROUPS))


@pytest.fixture
def codes() -> Tensor:
    return torch.randint(0, 12, (20, GROUPS), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_something_is_always_hidden(height: int, width: int, seed: int) -> None:
    hidden = sample_mask(height, width, np.random.default_rng(seed))
    assert hidden.shape == (height * width,) and hidden.dtype == bool and hidden.any()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
def test_a_rectangle_is_one(height: int, width: int, seed: int) -> None:
    inside = random_rectangle(height, width, np.random.default_rng(seed)).reshape(height, width)
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    assert inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert inside.sum() == len(rows) * len(columns) > 0
    assert len(rows) <= math.ceil(height * 3 / 4) and len(columns) <= math.ceil(width * 3 / 4)


def test_all_is_hidden_without_a_generator() -> None:
    assert sample_mask(5, 4, None).all()


def test_all_patterns_occur() -> None:
    rng = np.random.default_rng(0)
    shares = np.array([sample_mask(8, 8, rng).mean() for _ in range(600)])
    assert 0.42 < (shares == 1).mean() < 0.62, "all hidden in about half"
    assert (shares < 0.1).any() and ((shares > 0.4) & (shares < 0.6)).any()


def test_wrong_codes_are_shown_and_learned() -> None:
    visible, wrong, learned = 0, 0, 0
    for seed in range(100):
        target = IMAGE.target(png(), np.random.default_rng(seed))
        mask = target.arrays["is_masked"]
        changed = (target.arrays["shown"] != target.arrays["codes"]).any(1)
        assert np.array_equal(target.arrays["codes"], IMAGE.encode(png())), "the truth stays the truth"
        assert not changed[mask].any() and target.learn[mask].all() and target.learn[changed].all()
        visible, wrong, learned = visible + (~mask).sum(), wrong + changed.sum(), learned + target.learn[~mask].sum()
    # A wrong code may be right by chance; beyond those nothing visible is learned.
    assert 0.03 < wrong / visible <= learned / visible < 0.07


def test_without_a_generator_nothing_wrong_is_shown() -> None:
    target = IMAGE.target(png(), options={"mask_box": (0.0, 0.0, 0.5, 1.0)})
    assert np.array_equal(target.arrays["shown"], target.arrays["codes"])
    assert np.array_equal(target.learn, target.arrays["is_masked"]) and 0 < target.learn.mean() < 1


def test_codes_computed_together_are_those_computed_alone() -> None:
    fresh = Image(IMAGE.codec, IMAGE.config)
    # One of them twice, and one that is no file.
    inputs = [png(f"hsl({30 * index}, 100%, 50%)") for index in range(GROUP + 2)]
    inputs += [inputs[0], np.asarray(read_image(inputs[1]))]
    with encode_together():
        targets = [fresh.target(raw, np.random.default_rng(index)) for index, raw in enumerate(inputs)]
        with pytest.raises(DataError):
            fresh.target(b"no image", np.random.default_rng(0))
    alone = [IMAGE.target(raw, np.random.default_rng(index)) for index, raw in enumerate(inputs)]
    for one, other in zip(targets, alone, strict=True):
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in ("codes", "shown", "is_masked"))
    cache = fresh.code_cache
    assert (cache.lookups, cache.misses, len(cache.entries)) == (GROUP + 5, GROUP + 3, GROUP + 2)


def all_logits(adapter: CodesAdapter, hidden: Tensor, codes: Tensor) -> Tensor:
    """Logits of all groups at once, from the states that the loss uses.  # N D, N G -> N G C"""
    return torch.einsum("ngb,gbc->ngc", adapter.group_states(hidden, codes), adapter.to_codes)


def test_inpainting_masks() -> None:
    box = {"mask_box": (0.0, 0.0, 0.5, 1.0)}
    region = IMAGE.target(png(), options=box).arrays["is_masked"]
    target = IMAGE.target(png(), options={**box, "mask_context": True})
    assert target.arrays["is_masked"].all() and np.array_equal(target.learn, region), "the box alone is scored"
    masks = []
    for seed in range(40):
        target = IMAGE.target(png(), np.random.default_rng(seed), box)
        masks.append(target.arrays["is_masked"])
        assert np.array_equal(masks[-1], region) or masks[-1].all()
        assert target.learn[masks[-1]].all() and (masks[-1].all() or target.learn[~region].mean() < 0.5)
    assert 8 < sum(mask.all() for mask in masks) < 32


def test_all_groups_at_once_equal_one_after_the_other(adapter: CodesAdapter, codes: Tensor, hidden: Tensor) -> None:
    together = all_logits(adapter, hidden, codes)
    known = torch.zeros_like(codes)
    for group in range(GROUPS):
        alone = adapter.group_logits(hidden, known, group)
        torch.testing.assert_close(alone, together[:, group])
        known[:, group] = codes[:, group]


def test_one_group_costs_what_one_group_needs(adapter: CodesAdapter, codes: Tensor, hidden: Tensor) -> None:
    """Decoding asks for one group after the other: together they must not cost more than all at once."""
    with FlopCounterMode(display=False) as at_once:
        all_logits(adapter, hidden, codes)
    with FlopCounterMode(display=False) as in_turn:
        for group in range(GROUPS):
            adapter.group_logits(hidden, codes, group)
    assert 0 < in_turn.get_total_flops() <= at_once.get_total_flops()


@pytest.mark.parametrize("changed", range(GROUPS))
def test_a_group_sees_only_the_groups_before_it(
    adapter: CodesAdapter, codes: Tensor, hidden: Tensor, changed: int
) -> None:
    other = codes.clone()
    other[:, changed] = (other[:, changed] + 5) % 12
    before, after = all_logits(adapter, hidden, codes), all_logits(adapter, hidden, other)
    torch.testing.assert_close(before[:, : changed + 1], after[:, : changed + 1], rtol=0, atol=0)
    for later in range(changed + 1, GROUPS):
        assert (before[:, later] - after[:, later]).abs().max() > 1e-4, "later groups must depend on it"


def test_the_likelihood_of_a_place_is_the_product_over_its_groups(
    adapter: CodesAdapter, codes: Tensor, hidden: Tensor
) -> None:
    arrays = {"codes": codes, "shown": codes, "is_masked": torch.ones(20, dtype=torch.bool)}
    direct, blurred = torch.zeros(20), torch.zeros(20)
    for group in range(GROUPS):
        log_probability = adapter.group_logits(hidden, codes, group).log_softmax(-1)
        direct -= log_probability[torch.arange(20), codes[:, group]]
        blurred -= log_probability.mean(-1)
    torch.testing.assert_close(adapter.nll(hidden, arrays), direct)
    smoothed = (1 - SMOOTHING) * direct + SMOOTHING * blurred
    torch.testing.assert_close(adapter.training_loss(hidden, arrays), smoothed / GROUPS)


def test_the_probabilities_of_all_codes_of_a_place_sum_to_one() -> None:
    torch.manual_seed(0)
    adapter = CodesAdapter(FourierPositionEmbedding(WIDTH), WIDTH, vectors_of((2, 2), 2))
    every = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    hidden = torch.randn(1, WIDTH).expand(16, -1)
    arrays = {"codes": every, "shown": every, "is_masked": torch.ones(16, dtype=torch.bool)}
    assert float((-adapter.nll(hidden, arrays)).exp().sum().detach()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", ["image-64", "image-256", "audio"])
def test_vectors_are_the_coordinates_of_the_codec(name: str) -> None:
    codec: Any = load_codec(name)
    adapter = CodesAdapter(FourierPositionEmbedding(WIDTH), WIDTH, codec.vectors())
    codes = torch.randint(
        0, codec.config.codebook_size, (50, codec.config.groups), generator=torch.Generator().manual_seed(0)
    )
    levels = torch.tensor(codec.config.levels)
    assert torch.equal(adapter.vectors(codes), cell_values(unpack(codes, levels), levels).flatten(-2))
    assert adapter.to_codes.shape[-1] == codec.config.codebook_size


def test_vectors_are_coordinates(adapter: CodesAdapter) -> None:
    cells = torch.tensor([[0, 0], [3, 2], [1, 1]])
    codes = pack(cells, torch.tensor(LEVELS))[:, None].expand(-1, GROUPS)
    found = adapter.vectors(codes).view(3, GROUPS, 2)[:, 0]
    assert float(found.min()) >= -1 and float(found.max()) <= 1
    assert (found[1] > found[0]).all(), "a higher cell lies at a higher coordinate"


def test_hidden_codes_do_not_show(adapter: CodesAdapter, codes: Tensor) -> None:
    hidden = torch.arange(20) < 10
    other = torch.where(hidden[:, None], (codes + 1) % 12, codes)
    grid_cells = torch.rand(20, 2)
    first, second = (
        adapter.embed({"shown": shown, "is_masked": hidden, "positions": grid_cells}) for shown in (codes, other)
    )
    assert torch.equal(first, second)
    visible = adapter.embed({"shown": (codes + 1) % 12, "is_masked": hidden, "positions": grid_cells})
    assert not torch.equal(visible[10:], first[10:])


def test_positions_are_the_centers_of_tokens() -> None:
    image, audio = image_grid(2, 4), audio_grid(3, 640)
    assert image.positions[[0, 3, 4]].tolist() == [[0.25, 0.125], [0.25, 0.875], [0.75, 0.125]]
    assert np.allclose(audio.positions[:, 0], [0.02, 0.06, 0.10])
    assert audio.cells.tolist() == [[0, 1, 1], [1, 3, 3], [2, 5, 5]], "number, and twice the middle in units of 20 ms"
    assert (image.span, audio.span) == (4, 3)


def test_positions_have_different_embeddings() -> None:
    torch.manual_seed(0)
    vectors = FourierPositionEmbedding(16).requires_grad_(False)(torch.from_numpy(image_grid(8, 8).positions))
    distance = torch.cdist(vectors, vectors) + torch.eye(64) * 99
    assert vectors.shape == (64, 16) and float(distance.min()) > 1e-2
