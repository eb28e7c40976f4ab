"""kNN classification of generated images and audio by the real ones of the training split."""

# Shapes: N training records, F features

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from openm6.core.errors import DataError
from openm6.data.source import Source
from openm6.evaluate.answers import evenly_spaced
from openm6.inference.load import LoadedModel
from openm6.inference.run import Answer
from openm6.modalities.audio import Audio, read_audio
from openm6.modalities.image import read_image, to_square

IMAGE_SIDE = 16  # pixels; features of an image
AUDIO_FRAMES = 16  # features of audio, times the mel bands
NEIGHBOURS = 3
MAX_LABELS, MIN_RECORDS_PER_LABEL, MAX_RECORDS = 50, 5, 2000


@dataclass(frozen=True)
class KNNClassifier:
    """Labels an answer by its nearest training records.  # N F, N"""

    features: np.ndarray
    labels: list[str]
    extract: Callable[[object], np.ndarray]

    def predict(self, answers: list[Answer]) -> list[str]:
        """The most frequent label among the nearest records of each answer."""
        found = []
        for answer in answers:
            distance = np.square(self.features - self.extract(answer)).sum(1)  # N
            nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
            found.append(Counter(self.labels[int(row)] for row in nearest).most_common(1)[0][0])
        return found


def fit_knn(loaded: LoadedModel, source: Source, modality: str) -> KNNClassifier | None:
    """A classifier of the source's training records; None if labels are missing, rare or too many."""
    counts = Counter(label for label in source.values("label") if label is not None)
    if not 2 <= len(counts) <= MAX_LABELS or min(counts.values()) < MIN_RECORDS_PER_LABEL:
        return None
    extract = image_features if modality == "image" else partial(_audio_features, loaded.audio)
    features, labels = [], []
    for index in evenly_spaced(len(source), MAX_RECORDS):
        try:
            record = source[index]
            if record.get(modality) and record.get("label"):
                features.append(extract(record[modality]))
                labels.append(record["label"])
        except DataError:
            continue
    return KNNClassifier(np.stack(features), labels, extract) if features else None


def image_features(raw: object) -> np.ndarray:
    """A small grey image, standardized.  # IMAGE_SIDE*IMAGE_SIDE"""
    small = to_square(read_image(raw), 64).convert("L").resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BOX)
    return _standardized(np.asarray(small, dtype=np.float32).reshape(-1) / 255)


def _audio_features(audio: Audio, raw: object) -> np.ndarray:
    """The log-mels of the voiced span, resampled to AUDIO_FRAMES and standardized."""
    frames = audio.source(read_audio(raw)).arrays["patches"].reshape(-1, audio.num_mels)  # time, mels
    loud = np.flatnonzero(frames.mean(1) > frames.mean(1).max() - 2.0)
    voiced = frames[loud[0] : loud[-1] + 1] if len(loud) else frames
    positions = np.linspace(0, len(voiced) - 1, AUDIO_FRAMES).round().astype(int)
    return _standardized(voiced[positions].reshape(-1))


def _standardized(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-3)
