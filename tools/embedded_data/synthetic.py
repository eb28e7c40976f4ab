"""Synthetic records: a synthetic shop, machines whose state follows from their readings, and audio events."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile

from embedded_data.series import HORIZON, seasonal_series
from embedded_data.shop import product_record
from embedded_data.tables import SCHEMA, Row
from openm6.core.seeds import numpy_generator
from openm6.data.records import Record
from openm6.data.source import hash_fraction

SYNTHETIC_SCHEMA = SCHEMA.append(pa.field("series", pa.string()))

HOT, SHAKEN, IDLE = 90.0, 7.0, 15.0  # °C, mm/s, percent of the load
STATES = {  # label, report and advice in English and Chinese
    "worn": (
        ("worn bearing", "轴承磨损"),
        ("Vibration is high: a bearing is worn.", "振动过大，轴承磨损。"),
        ("replace the bearing", "更换轴承"),
    ),
    "hot": (
        ("overheated", "过热"),
        ("Temperature is high: the machine overheats.", "温度过高，机器过热。"),
        ("check the cooling", "检查冷却系统"),
    ),
    "idle": (
        ("idle", "空转"),
        ("Load is low: the machine runs idle.", "负载很低，机器空转。"),
        ("switch it off", "关机"),
    ),
    "normal": (
        ("normal", "正常"),
        ("All readings are normal.", "各项读数正常。"),
        ("nothing to do", "无需处理"),
    ),
}


def machine_record(rng: np.random.Generator) -> Record:
    """Readings of one machine at one hour."""
    kind = sorted(STATES)[int(rng.integers(len(STATES)))]
    readings = {
        "temperature_c": rng.uniform(HOT + 2, HOT + 40) if kind == "hot" else rng.uniform(40, HOT - 5),
        "vibration_mm_s": rng.uniform(SHAKEN + 0.5, 14) if kind == "worn" else rng.uniform(1, SHAKEN - 1),
        "load_percent": rng.uniform(0, IDLE - 2) if kind == "idle" else rng.uniform(IDLE + 10, 100),
        "hours": rng.uniform(100, 20_000),
    }
    label, report, advice = STATES[kind]
    return {
        "text_en": report[0],
        "text_zh": report[1],
        "label": label[0],
        "label_zh": label[1],
        "numbers": {name: float(f"{value:.3g}") for name, value in readings.items()},
        "series": {"vibration_mm_s": seasonal_series(rng, readings["vibration_mm_s"], 16, 0.05)},
        "extra": {"advice_en": advice[0], "advice_zh": advice[1], "horizon": HORIZON},
    }


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


def audio_record(rng: np.random.Generator) -> Record:
    """One second of audio of one kind, as Ogg Opus."""
    name = sorted(WAVES)[int(rng.integers(len(WAVES)))]
    chinese, make = WAVES[name]
    time = np.arange(int(RATE * SECONDS)) / RATE
    samples = make(time, rng) * rng.uniform(0.2, 0.6) + rng.normal(0, 0.005, len(time))
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(samples, -1, 1), RATE, format="OGG", subtype="OPUS", compression_level=0.9)
    return {
        "text_en": name,
        "text_zh": chinese,
        "label": name,
        "label_zh": chinese,
        "audio": stream.getvalue(),
    }


def shop(cache: Path) -> list[Row]:
    """800 products."""
    return _rows("shop", product_record, 800, 0.1)


def machines(cache: Path) -> list[Row]:
    """1,000 machines."""
    return _rows("machines", machine_record, 1000, 0.1)


def events(cache: Path) -> list[Row]:
    """100 audio clips; so few because each is five kilobytes."""
    return _rows("audio_events", audio_record, 100, 0.2, seed_name="sounds")


def _rows(
    name: str,
    make: Callable[[np.random.Generator], Record],
    count: int,
    test_fraction: float,
    seed_name: str | None = None,
) -> list[Row]:
    """Record number n follows from the name and n alone, so more records would change none.

    `seed_name` is the name in seeds and splits if the set was renamed since its files were written.
    """
    rows = []
    seed_name = seed_name or name
    for number in range(count):
        record = {"license": "CC0-1.0", **make(numpy_generator(0, seed_name, number))}
        numbers = record.pop("numbers", {})
        row: Row = {
            "id": f"{name}/{number}",
            "source": "synthetic",
            "split": "test" if hash_fraction(f"{seed_name}/{number}") < test_fraction else "train",
        }
        row |= {"num_names": list(numbers) or None, "num_values": list(numbers.values()) or None}
        for column in ("series", "extra"):
            if column in record:
                row[column] = json.dumps(record.pop(column), ensure_ascii=False, separators=(",", ":"))
        rows.append(row | record)
    return rows
