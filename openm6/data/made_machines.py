"""Machines made by formula: readings whose state, report and advice follow by rule, and the vibration over time."""

from __future__ import annotations

import numpy as np

from openm6.data.made_record import AHEAD, Maker, wave
from openm6.data.records import Record

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


class Machines(Maker):
    """Readings of one machine at one hour."""

    def record(self, rng: np.random.Generator) -> Record:
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
            "series": {"vibration_mm_s": wave(rng, readings["vibration_mm_s"], 16, 0.05)},
            "extra": {"advice_en": advice[0], "advice_zh": advice[1], "horizon": AHEAD},
        }
