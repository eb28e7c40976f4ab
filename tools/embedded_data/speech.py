"""The ten digits spoken by a synthesiser, in English and Mandarin."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from embedded_data.images import DIGITS_EN, DIGITS_ZH
from embedded_data.tables import Row
from tools.mini.packages import Packages
from tools.mini.speech import Espeak

VOICES = ("en-us+m1", "en-us+m3", "en-us+f2", "en-gb+m1", "cmn+m1", "cmn+m3", "cmn+f2", "en-us+f4", "cmn+f4")
TEST_VOICE = "+f4"  # never heard in training
MANNERS = ((130, 40), (160, 55), (190, 70))  # words a minute, pitch
# A voice never heard needs many to learn from, each a little: more voices help where more takes of three do not.
MORE_VOICES = (
    *(f"{tongue}+{voice}" for tongue in ("en-us", "cmn") for voice in ("m2", "m4", "m5", "m7", "f1", "f3", "f5")),
    *("en-gb+m3", "en-gb+f3"),
)
MORE_MANNERS = ((145, 35), (175, 65))
RATE = 16_000


def espeak_digits(cache: Path) -> list[Row]:
    """Each digit by each voice in each manner."""
    espeak = Espeak(Packages(cache))
    return [
        _spoken(voice, speed, pitch, digit, espeak)
        for voices, manners in ((VOICES, MANNERS), (MORE_VOICES, MORE_MANNERS))
        for voice in voices
        for speed, pitch in manners
        for digit in range(10)
    ]


def _spoken(voice: str, speed: int, pitch: int, digit: int, espeak: Espeak) -> Row:
    chinese = voice.startswith("cmn")
    word = DIGITS_ZH[digit] if chinese else DIGITS_EN[digit]
    arguments = [espeak.program, "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    said = subprocess.run(arguments, env=espeak.environment, capture_output=True, check=True).stdout
    samples = _at_16_khz(said)
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC", subtype="PCM_16")
    return {
        "id": f"espeak/{voice.replace('+', '_')}_{speed}_{pitch}_{digit}",
        "source": "synthesised with deb:espeak-ng@1.52.0",
        "license": "CC0-1.0 (our synthetic output; the tool is GPL-3+)",
        "split": "test" if voice.endswith(TEST_VOICE) else "train",
        "kind": "audio_text",
        "audio": file.getvalue(),
        "audio_sr": RATE,
        "audio_sec": len(samples) / RATE,
        "text_en": DIGITS_EN[digit],
        "text_zh": DIGITS_ZH[digit],
        "label": DIGITS_EN[digit],
        "label_zh": DIGITS_ZH[digit],
        "label_id": digit,
        "num_names": ["digit"],
        "num_values": [float(digit)],
        "extra": json.dumps({"spoken_language": "zh" if chinese else "en", "voice": voice}),
    }


def _at_16_khz(wav: bytes) -> np.ndarray:
    """Samples at 16 kHz of what the synthesiser gives at 22.05 kHz."""
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert rate == 22_050, rate
    return np.asarray(resample_poly(samples, 320, 441))
