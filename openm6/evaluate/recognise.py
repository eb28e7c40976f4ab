"""A plain nearest-neighbour classifier of pictures and sounds: an eye and an ear that the model did not train."""

# Letters: N training records, F features

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image as Pillow

from openm6.base.errors import DataError
from openm6.data.source import Source
from openm6.evaluate.results import Answer
from openm6.inference.load import Loaded
from openm6.modalities.image import read_image, to_square
from openm6.modalities.sound import read_sound

SIDE = 16  # pixels; features of a picture
SPANS = 16  # of a sound's length; features of a sound
NEIGHBOURS = 3
MOST_LABELS, FEWEST_EACH, MOST_RECORDS = 50, 5, 2000


class Recogniser:
    """Labels an answer by its nearest training records."""

    def __init__(
        self, features: np.ndarray, labels: list[str], describe: Callable[[object], np.ndarray]
    ) -> None:
        self.features, self.known, self.describe = features, labels, describe

    def labels(self, answers: list[Answer]) -> list[str]:
        """The commonest label among the nearest records of each answer."""
        found = []
        for answer in answers:
            distance = np.square(self.features - self.describe(answer)).sum(1)  # N
            near = np.argsort(distance, kind="stable")[:NEIGHBOURS]
            found.append(Counter(self.known[int(row)] for row in near).most_common(1)[0][0])
        return found


def picture_features(raw: object) -> np.ndarray:
    """A small grey picture with its mean taken out.  # SIDE*SIDE"""
    picture = raw if isinstance(raw, Pillow.Image) else read_image(raw)
    small = to_square(picture, 64).convert("L").resize((SIDE, SIDE), Pillow.Resampling.BOX)
    values = np.asarray(small, dtype=np.float32).reshape(-1) / 255
    return _standard(values)


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-3)


def build_recogniser(loaded: Loaded, source: Source, modality: str) -> Recogniser | None:
    """A classifier of the source's training records by label; None where labels are many, rare or missing."""
    counts = Counter(label for label in source.values("label") if label is not None)
    if not 2 <= len(counts) <= MOST_LABELS or min(counts.values()) < FEWEST_EACH:
        return None
    key = {"image": "image", "sound": "audio"}[modality]
    describe = picture_features if modality == "image" else _sound_describer(loaded)
    features, labels = [], []
    for index in np.linspace(0, len(source) - 1, min(len(source), MOST_RECORDS)).astype(int):
        try:
            record = source[int(index)]
            if record.get(key) and record.get("label"):
                features.append(describe(record[key]))
                labels.append(record["label"])
        except DataError:
            continue
    return Recogniser(np.stack(features), labels, describe) if features else None


def _sound_describer(loaded: Loaded) -> Callable[[object], np.ndarray]:
    """Log-mels of the voiced stretch, brought to a fixed length."""

    def describe(raw: object) -> np.ndarray:
        tokens = loaded.sound.source(read_sound(raw))
        frames = tokens.arrays["patches"].reshape(-1, loaded.sound.num_mels)  # F M
        loud = np.flatnonzero(frames.mean(1) > frames.mean(1).max() - 2.0)
        voiced = frames[loud[0] : loud[-1] + 1] if len(loud) else frames
        places = np.linspace(0, len(voiced) - 1, SPANS).round().astype(int)
        return _standard(voiced[places].reshape(-1))

    return describe
