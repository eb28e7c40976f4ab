"""Sounds made by formula: a bell, a siren, rain and others, each a little different every time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import soundfile

from openm6.data.made_record import Maker
from openm6.data.records import Record

RATE, SECONDS = 16_000, 1.0
TAU = 2 * math.pi
Wave = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def _bell(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pitch = rng.uniform(500, 900)
    parts = [np.sin(TAU * pitch * ratio * time) / number for number, ratio in enumerate((1, 2.76, 5.4), 1)]
    return np.sum(parts, axis=0) * np.exp(-4 * time)


def _siren(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    speed = rng.uniform(1.5, 3)
    return np.sin(TAU * (800 * time - 250 / (TAU * speed) * np.cos(TAU * speed * time)))


def _rain(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.3 * rng.normal(0, 1, len(time)) * rng.uniform(0.5, 1)


def _knock(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pause = rng.uniform(0.2, 0.35)
    since = time % pause
    return np.sin(TAU * rng.uniform(110, 180) * since) * np.exp(-40 * since)


def _bird(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    since = time % rng.uniform(0.18, 0.3)
    return np.sin(TAU * (2500 + 9000 * since) * since) * np.exp(-12 * since)


def _beep(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.sin(TAU * rng.uniform(900, 1400) * time) * ((time % 0.4) < 0.2)


def _engine(time: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    phase = (time * rng.uniform(40, 80)) % 1
    return 0.6 * (2 * phase - 1) + 0.1 * rng.normal(0, 1, len(time))


WAVES: dict[str, tuple[str, Wave]] = {
    "bell": ("铃声", _bell),
    "siren": ("警报", _siren),
    "rain": ("雨声", _rain),
    "knocking": ("敲门声", _knock),
    "bird": ("鸟叫", _bird),
    "beep": ("哔哔声", _beep),
    "engine": ("发动机声", _engine),
}


class Sounds(Maker):
    """One second of something that sounds."""

    def record(self, rng: np.random.Generator) -> Record:
        name = sorted(WAVES)[int(rng.integers(len(WAVES)))]
        chinese, made = WAVES[name]
        time = np.arange(int(RATE * SECONDS)) / RATE
        samples = made(time, rng) * rng.uniform(0.2, 0.6) + rng.normal(0, 0.005, len(time))
        stream = io.BytesIO()
        soundfile.write(stream, np.clip(samples, -1, 1), RATE, format="FLAC", subtype="PCM_16")
        words = {"text_en": name, "text_zh": chinese, "label": name, "label_zh": chinese}
        return {**words, "audio": stream.getvalue()}
