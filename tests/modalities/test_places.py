"""Places of tokens within their picture or sound."""

from __future__ import annotations

import numpy as np
import torch

from openm6.modalities.places import PlaceEmbedding, picture_places, sound_places


def test_places_are_the_middles_of_tokens() -> None:
    assert picture_places(2, 4)[[0, 3, 4]].tolist() == [[0.25, 0.125], [0.25, 0.875], [0.75, 0.125]]
    assert np.allclose(sound_places(3, 0.04)[:, 0], [0.02, 0.06, 0.10])


def test_places_are_told_apart() -> None:
    torch.manual_seed(0)
    vectors = PlaceEmbedding(16).requires_grad_(False)(torch.from_numpy(picture_places(8, 8)))
    distance = torch.cdist(vectors, vectors) + torch.eye(64) * 99
    assert vectors.shape == (64, 16) and float(distance.min()) > 1e-2
