"""Spoken Mandarin syllables, and words in English and Mandarin, by a human voice and several synthetic ones."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from scipy.signal import resample_poly

from tools.mini.corpus import Part, Row, identity, split_of
from tools.mini.names import emoji_data
from tools.mini.packages import Packages

RATE = 16_000
SECONDS = 1.2  # the default length of audio in a recipe
QUIET = 0.02  # of the peak: what is cut off before and after
LOUDNESS = 0.7
ESPEAK = ("espeak", "espeak-data", "espeak-library", "pcaudio", "sonic")
ESPEAK_VOICES = ("m1", "m3", "m4", "m7", "f1", "f2", "f5")
MORE_ESPEAK_VOICES = ("m2", "m5", "m6", "f3", "Annie", "Denis", "john", "max")  # of syllables
FLITE_VOICES = ("kal16", "awb", "slt", "rms")
# Other pitches in Hz, and durations as multiples, of the voices of flite that are trained.
FLITE_CHANGES = ((85, 1.15), (125, 0.9), (190, 1.0))
KOKORO = ("kokoro-1", "kokoro-2", "kokoro-3", "kokoro-4", "kokoro-words", "kokoro-voices")
KOKORO_VOICES = {
    "en": ("af_heart", "am_fenrir", "bf_emma", "am_michael", "af_bella"),
    "zh": ("zf_xiaoxiao", "zm_yunxi", "zf_xiaoyi", "zm_yunyang"),
}
KOKORO_RATE = 24_000
# No record of these voices is trained.
TEST_VOICES = frozenset({"espeak-f4", "flite-rms", "kokoro-af_bella", "kokoro-zm_yunyang"})
# Speeds at which the one human voice is heard: its pitch changes with it.
HUMAN_SPEEDS = (100, 92, 108)
WORDS = 300
DIGITS = (("zero", "零"), ("one", "一"), ("two", "二"), ("three", "三"), ("four", "四"), ("five", "五"), ("six", "六"),
          ("seven", "七"), ("eight", "八"), ("nine", "九"))  # fmt: skip


def flac(samples: np.ndarray, rate: int) -> bytes:
    """A recording at 16 kHz without silence at its ends, of one loudness, as FLAC."""
    if rate != RATE:
        divisor = int(np.gcd(rate, RATE))
        samples = resample_poly(samples, RATE // divisor, rate // divisor)
    samples = np.asarray(samples, np.float64)
    peak = float(np.abs(samples).max(initial=0.0))
    heard = np.flatnonzero(np.abs(samples) > QUIET * peak)
    if peak == 0 or len(heard) == 0:
        raise ValueError("a recording is silent")
    margin = RATE // 100
    samples = samples[max(0, heard[0] - margin) : heard[-1] + margin][: int(SECONDS * RATE)] * (LOUDNESS / peak)
    fade = np.linspace(0, 1, margin // 2)
    samples[: len(fade)] *= fade
    samples[-len(fade) :] *= fade[::-1]
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def spoken_row(kind: str, voice: str, label: tuple[str, str], language: str, audio: bytes, source: Row) -> Row:
    """The row of a spoken word or syllable; `label` is its English and its Chinese text."""
    english, chinese = label
    text = english if language == "en" else chinese
    split = "test" if voice in TEST_VOICES else split_of(voice, text, test=0.0, validation=0.02)
    return {
        "id": f"{kind}/{voice}/{language}/{english}",
        **source,
        "split": split,
        "audio": audio,
        "label": english,
        "label_zh": chinese,
        "extra": {"spoken_language": language, "voice": voice} if kind == "word" else {"voice": voice},
    }


class Espeak:
    """espeak-ng out of its Debian packages, without installing it."""

    def __init__(self, packages: Packages) -> None:
        trees = [packages.folder(key) for key in ESPEAK]
        libraries = [library.parent for tree in trees for library in tree.rglob("*.so.*")]
        voices = next(data for tree in trees for data in tree.rglob("espeak-ng-data") if (data / "phondata").is_file())
        paths = {"LD_LIBRARY_PATH": ":".join(map(str, dict.fromkeys(libraries))), "ESPEAK_DATA_PATH": str(voices)}
        self.program, self.environment = str(trees[0] / "usr" / "bin" / "espeak-ng"), {**os.environ, **paths}

    def speak(self, voice: str, text: str, speed: int = 150) -> bytes:
        """The text in a voice, as FLAC."""
        said = self._run("-v", voice, "-s", str(speed), "--stdout", text)
        samples, rate = soundfile.read(io.BytesIO(said), dtype="float64")
        return flac(samples, rate)

    def phonemes(self, voice: str, text: str) -> str:
        """The text in the international phonetic alphabet."""
        return self._run("-v", voice, "-q", "--ipa", text).decode().strip()

    def _run(self, *arguments: str) -> bytes:
        return subprocess.run([self.program, *arguments], env=self.environment, capture_output=True, check=True).stdout


def zhuyin_syllables() -> dict[str, str]:
    """Zhuyin with its tone as gcin-voice writes it (none, 2, 3, 4) -> pinyin with the number of its tone."""
    # Installed by the builder into its cache.
    from pypinyin import Style, pinyin_dict  # noqa: PLC0415
    from pypinyin.style import convert  # noqa: PLC0415

    marks = {"ˊ": "2", "ˇ": "3", "ˋ": "4"}
    found = {}
    for readings in pinyin_dict.pinyin_dict.values():
        for marked in readings.split(","):
            numbered = convert(marked, Style.TONE3, strict=True)
            zhuyin = convert(marked, Style.BOPOMOFO, strict=True)
            if numbered[-1:].isdigit() and numbered[-1] != "5":
                found["".join(marks.get(letter, letter) for letter in zhuyin)] = numbered.replace("v", "ü")
    return found


def syllables(packages: Packages) -> Iterator[Row]:
    """Mandarin syllables with tones by the human voice of gcin-voice and by espeak-ng; one voice is only tested.

    A tenth of the human recordings is tested too: of them, the syllable was trained in other voices only.
    """
    known = human_syllables(packages)
    for syllable, file in known.items():
        tested = split_of("human", syllable, validation=0.0)
        for speed in HUMAN_SPEEDS if tested == "train" else HUMAN_SPEEDS[:1]:
            yield human_row(syllable, file, speed) | {"split": tested}
    espeak = Espeak(packages)
    for voice in (*ESPEAK_VOICES, "f4"):
        for syllable in known:
            yield espeak_syllable(espeak, voice, syllable)


def more_syllables(packages: Packages) -> Iterator[Row]:
    """The same syllables in more voices of espeak-ng, to be read."""
    espeak, known = Espeak(packages), human_syllables(packages)
    for voice in MORE_ESPEAK_VOICES:
        for syllable in known:
            yield espeak_syllable(espeak, voice, syllable)


def espeak_syllable(espeak: Espeak, voice: str, syllable: str) -> Row:
    """The row of a syllable in a voice of espeak-ng."""
    source = identity("espeak") | {"license": "CC0-1.0 (our synthetic output)"}
    audio = espeak.speak(f"cmn-latn-pinyin+{voice}", syllable.replace("ü", "v"))
    return spoken_row("syllable", f"espeak-{voice}", (syllable, syllable), "zh", audio, source)


def human_syllables(packages: Packages) -> dict[str, Path]:
    """The file of each syllable by the human voice, by its pinyin, in order."""
    root = packages.folder("gcin") / "usr" / "share" / "gcin-voice" / "ogg"
    pinyin = zhuyin_syllables()
    return dict(sorted((pinyin[file.parent.name], file) for file in root.glob("*/5.ogg") if file.parent.name in pinyin))


def human_row(syllable: str, file: Path, speed: int) -> Row:
    """The row of a syllable by the human voice at a speed in percent."""
    samples, rate = soundfile.read(file, dtype="float64")
    samples = samples if samples.ndim == 1 else samples.mean(axis=1)
    audio = flac(resample_poly(samples, 100, speed), rate)
    return spoken_row("syllable", f"gcin-{speed}", (syllable, syllable), "zh", audio, identity("gcin"))


def word_list(packages: Packages) -> list[tuple[str, str]]:
    """Digits and names of emoji that are one English word and one to four Chinese characters."""
    english, chinese = emoji_data(packages)
    labels = {entry["hexcode"]: entry["label"] for entry in chinese}
    pairs = [(entry["label"], labels.get(entry["hexcode"], "")) for entry in english if "group" in entry]
    fit = [(en, zh) for en, zh in pairs if re.fullmatch("[a-z]{3,10}", en) and re.fullmatch("[\u4e00-\u9fff]{1,4}", zh)]
    return list(dict([*DIGITS, *fit]).items())[:WORDS]


def words(packages: Packages) -> Iterator[Row]:
    """Words in English and Mandarin by espeak-ng, and in English by flite; a voice of each is only tested."""
    pairs, espeak = word_list(packages), Espeak(packages)
    source = identity("espeak") | {"license": "CC0-1.0 (our synthetic output)"}
    for voice in (*ESPEAK_VOICES, "f4"):
        for english, chinese in pairs:
            for language, tongue, text in (("en", "en-us", english), ("zh", "cmn", chinese)):
                audio = espeak.speak(f"{tongue}+{voice}", text, 160)
                yield spoken_row("word", f"espeak-{voice}", (english, chinese), language, audio, source)
    yield from words_by_flite(packages, [(f"flite-{voice}", ("-voice", voice)) for voice in FLITE_VOICES])


def more_words(packages: Packages) -> Iterator[Row]:
    """The English words by flite at other pitches and speeds, to be read."""
    voices = [
        (
            f"flite-{voice}-{pitch}",
            ("-voice", voice, "--setf", f"int_f0_target_mean={pitch}", "--setf", f"duration_stretch={stretch}"),
        )
        for voice in FLITE_VOICES
        if f"flite-{voice}" not in TEST_VOICES
        for pitch, stretch in FLITE_CHANGES
    ]
    yield from words_by_flite(packages, voices)


def words_by_flite(packages: Packages, voices: Sequence[tuple[str, Sequence[str]]]) -> Iterator[Row]:
    """The English words in voices of flite: the name of each and the arguments of the program."""
    flite, library = packages.folder("flite"), packages.folder("flite-library")
    folder = next(library.rglob("libflite.so.1")).parent
    source = identity("flite-library") | {"license": "CC0-1.0 (our synthetic output)"}
    with tempfile.TemporaryDirectory() as work:
        file = str(Path(work) / "word.wav")
        for voice, arguments in voices:
            for english, chinese in word_list(packages):
                command = [str(flite / "usr" / "bin" / "flite"), *arguments, "-t", english, "-o", file]
                subprocess.run(command, env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, check=True)
                samples, rate = soundfile.read(file, dtype="float64")
                yield spoken_row("word", voice, (english, chinese), "en", flac(samples, rate), source)


# Pinyin -> the phonemes that Kokoro was trained with.
INITIALS = {
    "zh": "ꭧ", "ch": "ꭧʰ", "sh": "ʂ", "b": "p", "p": "pʰ", "m": "m", "f": "f", "d": "t", "t": "tʰ", "n": "n", "l": "l",
    "g": "k", "k": "kʰ", "h": "x", "j": "ʨ", "q": "ʨʰ", "x": "ɕ", "r": "ɻ", "z": "ʦ", "c": "ʦʰ", "s": "s",
}  # fmt: skip
FINALS = {
    "a": "a", "o": "wo", "e": "ɤ", "ai": "ai", "ei": "ei", "ao": "au", "ou": "ou", "an": "an", "en": "ən", "ang": "aŋ",
    "eng": "əŋ", "er": "ɚ", "ong": "ʊŋ", "i": "i", "ia": "ja", "ie": "je", "iao": "jau", "iou": "jou", "ian": "jɛn",
    "in": "in", "iang": "jaŋ", "ing": "iŋ", "iong": "jʊŋ", "u": "u", "ua": "wa", "uo": "wo", "uai": "wai",
    "uei": "wei", "uan": "wan", "uen": "wən", "uang": "waŋ", "ueng": "wəŋ", "v": "y", "ve": "ɥe", "van": "ɥɛn",
    "vn": "yn", "ê": "ɛ", "io": "jo",
}  # fmt: skip
TONES = {"1": "→", "2": "↗", "3": "↓", "4": "↘"}
# Of the phonemes of espeak-ng, those that Kokoro writes otherwise.
ENGLISH_PHONEMES = (("tʃ", "ʧ"), ("dʒ", "ʤ"), ("eɪ", "A"), ("aɪ", "I"), ("aʊ", "W"), ("ɔɪ", "Y"), ("oʊ", "O"),
                    ("əʊ", "Q"), ("ɚ", "əɹ"), ("ɜː", "ɜɹ"), ("ɐ", "ə"), ("r", "ɹ"), ("ː", ""), ("e", "ɛ"))  # fmt: skip


def mandarin_phonemes(text: str) -> str:
    """Chinese characters as Kokoro's phonemes with arrows for tones."""
    # Installed by the builder into its cache.
    from pypinyin import Style, lazy_pinyin  # noqa: PLC0415

    initials = lazy_pinyin(text, Style.INITIALS, strict=True)
    finals = lazy_pinyin(text, Style.FINALS_TONE3, strict=True)
    found = []
    for initial, final in zip(initials, finals, strict=True):
        tone = final[-1] if final[-1:].isdigit() else ""
        bare = final.removesuffix(tone).replace("ü", "v")
        sibilant = bare == "i" and initial in ("z", "c", "s", "zh", "ch", "sh", "r")
        found.append(INITIALS.get(initial, "") + ("ɨ" if sibilant else FINALS[bare]) + TONES.get(tone, ""))
    return "".join(found)


class Kokoro:
    """Kokoro-82M, out of the packages that hold parts of its weights."""

    def __init__(self, packages: Packages) -> None:
        # Installed by the builder into its cache.
        import onnxruntime  # noqa: PLC0415

        parts = [next(packages.folder(key).rglob("part.bin")).read_bytes() for key in KOKORO[:4]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self.session: Any = onnxruntime.InferenceSession(b"".join(parts), options, providers=providers)
        file = next(packages.folder("kokoro-words").rglob("vocab.json"))
        self.vocabulary: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))["vocab"]
        self.voices = packages.folder("kokoro-voices") / "voices"

    def speak(self, voice: str, phonemes: str) -> bytes:
        """The phonemes in a voice, as FLAC."""
        styles = np.fromfile(self.voices / f"{voice}.bin", np.float32).reshape(-1, 1, 256)
        ids = [self.vocabulary[letter] for letter in phonemes if letter in self.vocabulary]
        tokens, _, speed = self.session.get_inputs()
        inputs = {
            tokens.name: np.array([[0, *ids, 0]], np.int64),
            "style": styles[len(ids)],
            "speed": np.ones(1, np.int32 if "int" in speed.type else np.float32),
        }
        return flac(np.asarray(self.session.run(None, inputs)[0]).reshape(-1), KOKORO_RATE)


def kokoro_words(packages: Packages) -> Iterator[Row]:
    """The same words by Kokoro-82M, the most natural and the slowest voices; one of each language is tested."""
    yield from words_by_kokoro(packages, KOKORO_VOICES)


def said_syllables(packages: Packages) -> Iterator[Row]:
    """The syllables in the human voice alone, to be said; those whose recordings `syllables` tests are tested here."""
    for syllable, file in human_syllables(packages).items():
        yield human_row(syllable, file, 100) | {"split": split_of("human", syllable, validation=0.0)}


def said_words(packages: Packages) -> Iterator[Row]:
    """The words in one voice of each language, to be said, since a prompt names none; a second take is tested."""
    voices_of = {language: voices[:1] for language, voices in KOKORO_VOICES.items()}
    for row in words_by_kokoro(packages, voices_of):
        yield row | {"split": "train"}
    # With a full stop at its end, Kokoro says a word in another way.
    for row in words_by_kokoro(packages, voices_of, ending="."):
        yield row | {"id": f"{row['id']}/second", "split": "test"}


def words_by_kokoro(packages: Packages, voices_of: Mapping[str, Sequence[str]], ending: str = "") -> Iterator[Row]:
    """The words in some voices of Kokoro-82M, by language; `ending` follows the phonemes of each."""
    kokoro, espeak, pairs = Kokoro(packages), Espeak(packages), word_list(packages)
    source = identity("kokoro-voices") | {"license": "Apache-2.0 (output of Kokoro-82M)"}
    for language, voices in voices_of.items():
        for voice in voices:
            for english, chinese in pairs:
                said = _english_phonemes(espeak, english) if language == "en" else mandarin_phonemes(chinese)
                audio = kokoro.speak(voice, said + ending)
                yield spoken_row("word", f"kokoro-{voice}", (english, chinese), language, audio, source)


def _english_phonemes(espeak: Espeak, word: str) -> str:
    said = espeak.phonemes("en-us", word)
    for theirs, ours in ENGLISH_PHONEMES:
        said = said.replace(theirs, ours)
    return said


PARTS = {
    "syllables": Part(syllables, ("gcin", *ESPEAK)),
    "words": Part(words, ("emojibase", *ESPEAK, "flite", "flite-library")),
    "more_syllables": Part(more_syllables, ("gcin", *ESPEAK)),
    "more_words": Part(more_words, ("emojibase", "flite", "flite-library")),
    "kokoro_words": Part(kokoro_words, ("emojibase", *ESPEAK, *KOKORO)),
    "said_syllables": Part(said_syllables, ("gcin",)),
    "said_words": Part(said_words, ("emojibase", *ESPEAK, *KOKORO)),
}
