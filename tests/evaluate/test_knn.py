"""The kNN classifier labels real images and audio right, and exists only if labels allow it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from openm6.evaluate.metrics import fit_knn, image_features
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.image import read_image
from tests.data.lists import ListSource
from tests.data.sample_images import png
from tests.small_model import demo_sources, loaded

MODEL = loaded()


def test_written_digits_are_classified() -> None:
    knn = fit_knn(MODEL, demo_sources()["digits"], "image")
    assert knn is not None
    test = demo_sources("test")["digits"]
    answers = [read_image(test[n]["image"]) for n in range(0, 179, 3)]
    right = [found == test[n]["label"] for found, n in zip(knn.predict(answers), range(0, 179, 3), strict=True)]
    assert np.mean(right) > 0.9
    blank = knn.predict([Image.new("RGB", (64, 64), "white")])
    assert blank[0] in set(demo_sources()["digits"].values("label"))


def test_spoken_digits_are_classified_far_above_chance() -> None:
    knn = fit_knn(MODEL, demo_sources()["spoken"], "audio")
    assert knn is not None
    source = demo_sources("test")["spoken"]
    answers = [read_audio(source[n]["audio"]) for n in range(len(source))]
    right = [found == source[n]["label"] for n, found in enumerate(knn.predict(answers))]
    assert np.mean(right) > 0.4, "chance is 0.1"
    longer_than_an_input = np.pad(answers[0], (0, int(31 * RATE)))
    assert knn.predict([longer_than_an_input])[0] in knn.labels


@pytest.mark.parametrize(
    "labels",
    [["only"] * 30, [None] * 30, [f"rare {n}" for n in range(30)], ["a"] * 29 + ["b"]],
    ids=["one label", "none", "each its own", "one is rare"],
)
def test_labels_that_cannot_be_learned_have_no_classifier(labels: list[str | None]) -> None:
    records = [{"id": str(n), "label": label, "image": png()} for n, label in enumerate(labels)]
    assert fit_knn(MODEL, ListSource("s", records), "image") is None


def test_broken_records_are_passed_over() -> None:
    records = [
        {"id": str(n), "label": "ab"[n % 2], "image": b"broken" if n == 4 else png(side=8 + 8 * (n % 2))}
        for n in range(20)
    ]
    knn = fit_knn(MODEL, ListSource("s", records), "image")
    assert knn is not None and len(knn.labels) == 19


def test_features_do_not_depend_on_brightness_or_size() -> None:
    values = np.random.default_rng(0).integers(60, 120, (8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = Image.fromarray(np.stack([values] * 3, -1))
    brighter = Image.fromarray(np.stack([values + 60] * 3, -1))
    np.testing.assert_allclose(image_features(image), image_features(brighter), atol=0.05)
    assert np.abs(image_features(image)).mean() > 0.3
