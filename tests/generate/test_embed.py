"""Embeddings: of length one, the same alone or in a crowd, and refused by a model that was not taught to make them."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.base.errors import ConfigError, DataError
from openm6.generate.embed import ROW, ROWS, embed, embedding_size, packed
from openm6.modalities.batch import build_sequence
from openm6.modalities.interface import Part
from openm6.modalities.pool import pool_segment
from tests.data.pictures import png, wav
from tests.small_model import embedding_model, loaded, modalities

INPUTS = [
    [Part("text", "seven")],
    [Part("image", png(side=40))],
    [Part("sound", wav(seconds=0.4))],
    [Part("text", "a cup"), Part("image", png(side=24))],
    [Part("numbers", {"mass": 3.0})],
]


def test_every_modality_has_a_vector_of_length_one() -> None:
    model = embedding_model()
    vectors = embed(model, INPUTS)
    assert vectors.shape == (len(INPUTS), embedding_size(model))
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(INPUTS)), abs=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_a_crowd_changes_nothing() -> None:
    crowd = embed(embedding_model(), [*INPUTS, *INPUTS * 3])
    alone = [embed(embedding_model(), [parts])[0] for parts in INPUTS]
    assert crowd[: len(INPUTS)] == pytest.approx(np.stack(alone), abs=1e-5)


def test_nothing_in_gives_nothing_out() -> None:
    assert embed(embedding_model(), []).shape == (0, 16)


def test_inputs_keep_their_order_over_rows_and_passes() -> None:
    text = modalities()["text"]
    lengths = [200, 100, 300, 400, 10, ROW + 50, 1, 500, 500, 500]
    sequences = [build_sequence([text.source("a" * length), pool_segment()]) for length in lengths]
    passes = packed(sequences)
    assert [sequence for part in passes for row in part for sequence in row] == sequences
    assert all(len(part) <= ROWS for part in passes) and len(passes) > 1
    assert all(sum(map(len, row)) <= ROW or len(row) == 1 for part in passes for row in part)


def test_a_model_without_the_lesson_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="needs training on pair_picture"):
        embed(loaded(), INPUTS)


def test_a_broken_picture_is_refused() -> None:
    with pytest.raises(DataError, match="picture is broken"):
        embed(embedding_model(), [[Part("image", b"no picture")]])
