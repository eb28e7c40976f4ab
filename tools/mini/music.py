"""Notes of the General MIDI instruments, drums, and named recordings of Sonic Pi."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import resample_poly

from tools.mini.corpus import Part, Row, identity, split_of
from tools.mini.packages import Packages
from tools.mini.speech import RATE, SECONDS, flac

# General MIDI: the number of an instrument or the key of a drum, with its names.
NAMES = Path(__file__).with_name("instruments.tsv")
PERCUSSION, DRUM_CHANNEL = 128, 9
# From this instrument on, what is heard is a noise without a pitch.
FIRST_NOISE = 119
NOTE_NAMES = ("C", "C♯", "D", "D♯", "E", "F", "F♯", "G", "G♯", "A", "A♯", "B")
LOW, HIGH, STEP = 40, 84, 2
# Instruments below the others: basses, tuba, timpani.
LOWER = frozenset((*range(32, 40), 43, 47, 58))
VELOCITIES = (70, 110)
HELD = 0.85  # seconds


class Synthesizer:
    """The instruments of FluidR3, one note at a time."""

    def __init__(self, packages: Packages) -> None:
        # Installed by the builder into its cache.
        import tinysoundfont  # noqa: PLC0415

        file = next(packages.folder("fluidr3").rglob("*.sf3"))
        self.synth: Any = tinysoundfont.Synth(gain=-6, samplerate=RATE)
        self.font = self.synth.sfload(str(file))

    def note(self, preset: int, key: int, velocity: int, drums: bool = False) -> np.ndarray:
        """A note, held and released."""
        channel = DRUM_CHANNEL if drums else 0
        self.synth.program_select(channel, self.font, PERCUSSION if drums else 0, preset, drums)
        self.synth.noteon(channel, key, velocity)
        held = self._samples(HELD)
        self.synth.noteoff(channel, key)
        samples = np.concatenate([held, self._samples(SECONDS - HELD)])
        self.synth.sounds_off()
        self._samples(0.05)
        return samples

    def _samples(self, seconds: float) -> np.ndarray:
        stereo = np.frombuffer(bytes(self.synth.generate(round(seconds * RATE))), np.float32)
        return stereo.reshape(-1, 2).mean(axis=1)


def instruments(packages: Packages) -> Iterator[Row]:
    """Notes of 128 instruments at two loudnesses, and drums; a tenth of the pairs of instrument and pitch is tested."""
    synth = Synthesizer(packages)
    for program, english, chinese in _names("instrument"):
        shift = -12 if program in LOWER else 0
        for key in range(LOW + shift, HIGH + shift, STEP + 4 * (program >= FIRST_NOISE)):
            note = f"{NOTE_NAMES[key % 12]}{key // 12 - 1}"
            for velocity in VELOCITIES:
                row = _note_row("instrument", f"{program}/{key}/{velocity}", (english, chinese),
                                synth.note(program, key, velocity))  # fmt: skip
                if row is None:
                    continue
                row["split"] = split_of("note", english, key)
                if program < FIRST_NOISE:
                    row |= {"numbers": {"pitch": float(key)}, "extra": {"note": note},
                            "text_en": f"{english}, {note}", "text_zh": f"{chinese}，{note}"}  # fmt: skip
                yield row
    for key, english, chinese in _names("drum"):
        for velocity in range(60, 127, 11):
            samples = synth.note(0, key, velocity, drums=True)
            drum = _note_row("drum", f"{key}/{velocity}", (english, chinese), samples)
            if drum is not None:
                yield drum | {"split": split_of("drum", english, velocity)}


def _names(kind: str) -> Iterator[tuple[int, str, str]]:
    with NAMES.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file, delimiter="\t"):
            if line["kind"] == kind:
                yield int(line["number"]), line["english"], line["chinese"]


def _note_row(kind: str, name: str, label: tuple[str, str], samples: np.ndarray) -> Row | None:
    if np.abs(samples).max() < 1e-4:
        return None
    english, chinese = label
    return {
        "id": f"{kind}/{name}",
        **identity("fluidr3"),
        "audio": flac(samples, RATE),
        "label": english,
        "label_zh": chinese,
        "text_en": english,
        "text_zh": chinese,
    }


# Beginnings of file names of Sonic Pi -> words.
GROUPS = {
    "ambi": ("ambient", "氛围"), "bass": ("bass", "贝斯"), "bd": ("bass drum", "底鼓"), "drum": ("drum", "鼓"),
    "elec": ("electronic", "电子"),
    "glitch": ("glitch", "故障音"), "guit": ("guitar", "吉他"), "loop": ("loop", "循环"),
    "mehackit": ("toy", "玩具"), "misc": ("", ""), "perc": ("percussion", "打击"), "sn": ("snare", "军鼓"),
    "tabla": ("tabla", "塔布拉鼓"), "vinyl": ("vinyl record", "黑胶唱片"),
}  # fmt: skip
# Offsets in seconds at which a longer recording is cut, and speeds in per cent of a shorter one; one is tested.
CUTS, SPEEDS, TESTED = (0.0, 0.5, 1.0, 1.5, 2.0), (100, 94, 97, 103, 106), 2
FREE = re.compile(r"Files:(?P<files>(?:.|\n)*?)\nCopyright:(?:.|\n)*?License: *(?P<license>\S+)")


def recordings(packages: Packages) -> Iterator[Row]:
    """Recordings of Sonic Pi that its copyright file lists as CC0, each in five variants of which one is tested."""
    root = packages.folder("sonic-pi") / "usr" / "share"
    text = (root / "doc" / "sonic-pi-samples" / "copyright").read_text(encoding="utf-8")
    free = {
        file.rpartition("/")[2]
        for found in FREE.finditer(text)
        if found["license"] == "CC0"
        for file in found["files"].split()
    }
    for file in sorted((root / "sonic-pi" / "samples").glob("*.flac")):
        if file.name not in free:
            continue
        samples, rate = soundfile.read(file, dtype="float64")
        samples = samples if samples.ndim == 1 else samples.mean(axis=1)
        group, _, rest = re.sub(r"\d+$", "", file.stem).partition("_")
        english = " ".join(word for word in (GROUPS[group][0], rest.replace("_", " ")) if word)
        if len(samples) > 3.5 * rate:
            variants = [samples[round(cut * rate) :] for cut in CUTS]
        else:
            variants = [resample_poly(samples, 100, speed) for speed in SPEEDS]
        for number, variant in enumerate(variants):
            yield {
                "id": f"recording/{file.stem}/{number}",
                **identity("sonic-pi"),
                "split": "test" if number == TESTED else "train",
                "audio": flac(variant, rate),
                "label": english,
                "text_en": english,
                "categories": {"group": GROUPS[group][0] or "other"},
            }


PARTS = {
    "instruments": Part(instruments, ("fluidr3",)),
    "recordings": Part(recordings, ("sonic-pi",)),
}
