"""Audio: log-mel patches in, residual codes of a neural codec out, decoded masked-parallel; 16 kHz mono."""

# Letters: S samples, N tokens, F frames of 10 ms, M mels, T positions of 40 ms, G codes per position

import functools
import io
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import soundfile
import torch
from pydantic import Field
from torch import Tensor

from openm6.codecs.audio import AudioCodecConfig, LogMels
from openm6.codecs.base import Codec
from openm6.codecs.external import Encoder, EncoderName
from openm6.codecs.mel_encoder import FRAMES, MelEncoder
from openm6.core.config import Config
from openm6.core.errors import DataError
from openm6.core.lru_cache import LRUCache
from openm6.modalities.codes import CACHE_BYTES, FEATURE_BYTES, CodesModality, Input, TokenGrid, key_of
from openm6.modalities.interface import NO_OPTIONS, Options, Rng, Segment
from openm6.ops.audio import resample

RATE = 16_000
UNIT = 320  # samples (20 ms) in one unit of rotary time, so that patches and codes have whole middles
MAX_SECONDS = 30.0
REACH = {"strong": (1.0, 1.0), "slight": (0.35, 0.35), "mixed": (0.0, 1.0)}  # of augmentation, drawn between both
# Of targets while training, which changes the voice (Ko et al., Interspeech 2015); few, so that codes can be cached.
SPEEDS = (0.78, 0.84, 0.9, 0.95, 1.0, 1.06, 1.12, 1.2, 1.28)
# 60 dB in log-mels of `LogMels`: at both ends, frames that are quieter than the loudest by more are silence.
QUIET = 2.3
UNKNOWN_FRAMES = 2**53  # or more: a FLAC from a pipe, in which libsndfile cannot seek
BLOCK = 2**16  # samples of each channel that are decoded at once
MIN_RATE, MAX_RATE = 1_000, 768_000  # a header may contain any rate, and the memory of resampling grows with it


def read_audio(raw: Any, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Mono samples in [-1, 1] at 16 kHz from the bytes of a WAV, FLAC, Ogg or MP3 file, or from such samples.  # S

    DataError: not an audio clip, broken, empty, of an unusual rate, or longer than `max_seconds`, by its header.
    """
    samples, rate = (raw.astype(np.float32), RATE) if isinstance(raw, np.ndarray) else _decode(raw, max_seconds)
    if samples.ndim != 1:
        raise DataError("samples of audio must be of one channel: give their mean over the channels")
    if not len(samples):
        raise DataError("the audio is empty: record it again")
    _check_duration(len(samples) / rate, max_seconds)
    if not np.isfinite(samples).all():
        raise DataError("the audio holds values that are not finite: export it again")
    return np.clip(resample(samples, rate, RATE), -1, 1)


def _check_duration(seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise DataError(f"the audio lasts {seconds:.0f} s, over the bound of {max_seconds:g} s: cut it")


def _decode(raw: Any, max_seconds: float) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise DataError(
                    f"the audio has {file.samplerate:,} samples per second, outside {MIN_RATE:,} to "
                    f"{MAX_RATE:,}: export it again at 16,000"
                )
            if file.frames >= UNKNOWN_FRAMES:
                raise DataError("the audio does not state its length, as a stream: save it again as WAV or FLAC")
            _check_duration(file.frames / file.samplerate, max_seconds)
            # A header may state a wrong length: never decode more than the bound, nor many channels of it at once.
            frames = min(file.frames, int(max_seconds * file.samplerate) + 1)
            blocks = file.blocks(BLOCK, frames=frames, dtype="float32", always_2d=True)
            return np.concatenate([block.mean(1) for block in blocks] or [np.zeros(0, np.float32)]), file.samplerate
    except (soundfile.LibsndfileError, TypeError, ZeroDivisionError, RuntimeError) as error:
        # Not the library's prefix, which names an object in memory.
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise DataError(
            f"the audio is broken or of an unknown format ({reason}): save it again as WAV or FLAC"
        ) from None


@functools.lru_cache(256)
def audio_grid(count: int, samples: int) -> TokenGrid:
    """The grid of `count` tokens of so many samples: number and twice the middle; middles in seconds."""
    index = np.arange(count, dtype=np.int32)
    middle = (2 * index + 1) * samples // (2 * UNIT)
    seconds = (np.arange(count) + 0.5) * (samples / RATE)
    positions = np.stack([seconds, np.zeros(count)], axis=1).astype(np.float32)
    return TokenGrid(np.stack([index, middle, middle], axis=1), positions, (1, count))


class AudioConfig(Config):
    """`codec` is a shipped name, a file or a model as transformers:NAME; a generated recording lasts `seconds`.

    `codebooks`: how many of such a model are used, all by default. `encoder`: a shipped name, a file, or a model as
    transformers:NAME or openm6:NAME, of which frozen features replace log-mels. Longer targets are cut, shorter ones
    padded; `max_seconds` bounds the inputs.
    `augmentation` of audio that is read in training: strong for few voices, slight if tone and timbre matter, mixed
    from none to strong if both do. `codec_probability`: how often a recording is read after the codec in training, so
    that the model understands what it says; its pitch may suffer, so one of which a number is asked never is.
    `vary_speed`: in training, a recording to be generated is played at one of nine speeds. Few recordings of many
    voices are then not memorized, but a word of one voice has nine answers.
    """

    codec: str = "audio"
    codebooks: int | None = Field(default=None, ge=1)
    encoder: EncoderName = None
    seconds: float = Field(default=1.2, gt=0)
    max_seconds: float = Field(default=MAX_SECONDS, gt=0)
    augmentation: Literal["slight", "mixed", "strong"] = "strong"
    codec_probability: float = Field(default=0.0, ge=0, le=1)
    vary_speed: bool = False


class Audio(CodesModality):
    """Audio as patches of 8 log-mel frames in, and up to a number of seconds in positions of 40 ms out."""

    name: ClassVar[str] = "audio"

    def __init__(self, codec: Codec, config: AudioConfig, encoder: Encoder | None = None) -> None:
        self.codec, self.config, self.has_encoder = codec, config, config.encoder is not None
        self.mel_encoder = encoder if isinstance(encoder, MelEncoder) else None
        self.encoder = None if isinstance(encoder, MelEncoder) else encoder  # of samples
        self.seconds, self.max_seconds = config.seconds, config.max_seconds
        self.hop = codec.step
        self.mels = LogMels(AudioCodecConfig())  # whatever the codec: what is read stays as it is with another one
        self.num_mels = self.mels.config.num_mels
        self.patch_size = FRAMES * self.num_mels if encoder is None else encoder.width
        self.step = FRAMES * RATE // 100 if self.encoder is None else self.encoder.step  # samples of a token
        self.mel_cache = LRUCache[np.ndarray](CACHE_BYTES if self.encoder is None else FEATURE_BYTES)
        self.code_cache, self._sample_cache = (LRUCache[np.ndarray](CACHE_BYTES // 2) for _ in range(2))
        self.duration_cache = LRUCache[np.ndarray](2**20)  # entries of a few bytes: a bound on their number

    def source(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Log-mel patches of all, or with `mask_span`, in fractions of the length, of as much as a target holds."""
        seconds, mask_span, speed = options.get("seconds"), options.get("mask_span"), options.get("speed", 1.0)
        if mask_span is not None:
            seconds = seconds or self.seconds
        # The source of an inpainted part must keep time with it.
        drawn = rng if mask_span is None else None
        if self.encoder is None:
            patches = self.patches(raw, seconds, speed, drawn, options.get("measured", False))
        else:
            # What is measured stays as it is.
            drawn = None if options.get("measured") else drawn
            patches = self._encoded(raw, self.encoder, seconds, speed, mask_span, drawn, self._draws_codes(drawn))
        is_masked = span_mask(mask_span, len(patches))
        if self.mel_encoder is not None:
            # Its convolutions would carry a masked span to tokens beside it.
            patches = self.mel_encoder(np.where(is_masked[:, None], patches.min(), patches))
            is_masked = np.pad(is_masked, (0, len(patches) - len(is_masked)))  # its summaries are of all that is heard
        grid = audio_grid(len(patches), self.step)
        truncated = seconds is not None and self.is_longer(raw, seconds)
        return self._source(patches, is_masked, grid, truncated)

    def _draws_codes(self, rng: Rng) -> bool:
        """Whether a recording is read after the codec; nothing is drawn unless the setting asks for it."""
        probability = self.config.codec_probability
        return rng is not None and probability > 0 and bool(rng.random() < probability)

    def _encoded(
        self, raw: Any, encoder: Encoder, seconds: Any, speed: float, mask_span: Any, rng: Rng, is_coded: bool
    ) -> np.ndarray:
        """Features of the audio, in which a masked span is silent; cached without one and augmentation.  # N F"""
        drawn = rng if encoder.augments else None

        def compute() -> np.ndarray:
            samples = self._samples(raw, speed, is_coded)
            if seconds:
                samples = _fitted(samples, self.length(seconds) * self.hop)
            is_masked = span_mask(mask_span, -(-len(samples) // encoder.step)).repeat(encoder.step)[: len(samples)]
            samples = np.where(is_masked, np.float32(0), samples)
            return encoder(samples) if drawn is None else encoder(samples, drawn)

        key = key_of(raw) if mask_span is None and drawn is None else None
        return self.mel_cache.get_or_compute(key and (key, seconds, speed, is_coded), compute)

    def patches(
        self, raw: Any, seconds: float | None = None, speed: float = 1.0, rng: Rng = None, measured: bool = False
    ) -> np.ndarray:
        """Log-mels of 8 frames each; a generator asks for augmentation, see `_augmented`.  # N F"""
        frames = self._frames(raw, seconds, speed, self._draws_codes(None if measured else rng))
        if self.mel_encoder is not None and seconds is None:
            # The encoder adds silence of its own. Tokens of silence of which none were trained lead to wrong words.
            frames = _trimmed(frames)
        if rng is not None:
            low, high = REACH[self.config.augmentation]
            frames = _augmented(frames, rng, low if low == high else rng.uniform(low, high), measured)
        silence = np.full((-len(frames) % FRAMES, self.num_mels), frames.min(), np.float32)
        return np.concatenate([frames, silence]).reshape(-1, FRAMES * self.num_mels)

    def _frames(self, raw: Any, seconds: float | None, speed: float, is_coded: bool) -> np.ndarray:
        """Log-mels of the audio, cut or padded to `seconds`; cached without the silence at the end.  # F M"""
        hop = self.mels.config.hop

        def compute() -> np.ndarray:
            samples = self._samples(raw, speed, is_coded)
            length = self.length(seconds) * self.hop if seconds else len(samples)
            with torch.no_grad():
                frames = self.mels(torch.from_numpy(_fitted(samples, length + -length % hop))[None])[0].numpy()
            heard = -(-(len(samples) + self.mels.config.window) // hop)  # a frame reads samples beyond its own
            return frames[:heard].copy()

        key = key_of(raw)
        frames = self.mel_cache.get_or_compute(key and (key, seconds, speed, is_coded), compute)
        missing = -(-self.length(seconds) * self.hop // hop) - len(frames) if seconds else 0
        return np.concatenate([frames, np.full((missing, self.num_mels), frames[-1:])]) if missing else frames

    def _samples(self, raw: Any, speed: float, is_coded: bool = False) -> np.ndarray:
        """The audio at a speed, or that after the codec; as it is recorded, it is cached.  # S"""
        samples = self._sample_cache.get_or_compute(key_of(raw), lambda: read_audio(raw, self.max_seconds))
        samples = samples if speed == 1.0 else resample(samples, round(RATE * speed), RATE)
        if not is_coded:
            return samples
        codes = self.encode_values([_fitted(samples, -(-len(samples) // self.hop) * self.hop)])[0]
        return self.decode(torch.from_numpy(codes))[: len(samples)]

    def length(self, seconds: float | None) -> int:
        return max(1, round((seconds or self.seconds) * RATE / self.hop))

    def is_longer(self, raw: Any, seconds: float | None = None) -> bool:
        """Whether a recording, at its own speed, has a position of 40 ms or more beyond `seconds`: it is lost."""
        known = self.duration_cache.get_or_compute(key_of(raw), lambda: np.asarray(len(self._samples(raw, 1.0)) / RATE))
        return float(known) >= (self.length(seconds) + 1) * self.hop / RATE

    def target(self, raw: Any, rng: Rng = None, options: Options = NO_OPTIONS) -> Segment:
        """Codes of `seconds` of audio, cut or padded with silence; masked as in training, or in `mask_span` alone."""
        speed = options.get("speed", 1.0)
        if rng is not None and self.config.vary_speed and "speed" not in options:
            speed = random_speed(rng)
        seconds, mask_span = options.get("seconds") or self.seconds, options.get("mask_span")
        length = self.length(seconds)
        region = None if mask_span is None else span_mask(mask_span, length)
        segment = self._target(audio_grid(length, self.hop), self._input(raw, seconds, speed), region, options, rng)
        return replace(segment, truncated=self.is_longer(raw, seconds))

    def blank(self, seconds: float | None = None) -> Segment:
        return self._target(audio_grid(self.length(seconds), self.hop), None)

    def encode(self, raw: Any, seconds: float | None = None, speed: float = 1.0) -> np.ndarray:
        """Codes of the audio, cut or padded with silence; cached by the bytes of the file.  # T G"""
        return self._encode(*self._input(raw, seconds or self.seconds, speed))

    def _input(self, raw: Any, seconds: float, speed: float) -> Input:
        """The key of some seconds of audio at a speed, and the function that reads its samples."""
        key, length = key_of(raw), self.length(seconds) * self.hop
        return key and (key, seconds, speed), lambda: _fitted(self._samples(raw, speed), length)

    def decode(self, codes: Tensor) -> np.ndarray:
        """Samples at 16 kHz of one sequence of codes.  # T G -> S"""
        return self.codec.decode(codes.cpu()[None])[0].numpy()


def _fitted(samples: np.ndarray, length: int) -> np.ndarray:
    """The samples, cut or followed by silence.  # S -> length"""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _trimmed(frames: np.ndarray) -> np.ndarray:
    """Log-mels without the silence at both ends.  # F M -> <=F M"""
    heard = np.flatnonzero(frames.max(1) > frames.max() - QUIET)
    return frames[heard[0] : heard[-1] + 1]


def span_mask(mask_span: tuple[float, float] | None, count: int) -> np.ndarray:
    """Positions touched by a span (start and end as fractions of the length).  # N bool"""
    if mask_span is None:
        return np.zeros(count, bool)
    position = np.arange(count)
    return (position + 1 > mask_span[0] * count + 1e-6) & (position < mask_span[1] * count - 1e-6)


def random_span(rng: np.random.Generator) -> tuple[float, float]:
    """A span of a fifth to a half of the length within the first four fifths, before most clips end."""
    length = rng.uniform(0.2, 0.5)
    start = rng.uniform(0.0, 0.8 - length)
    return float(start), float(start + length)


def random_speed(rng: np.random.Generator) -> float:
    return SPEEDS[int(rng.integers(len(SPEEDS)))]


def _augmented(frames: np.ndarray, rng: np.random.Generator, reach: float, measured: bool) -> np.ndarray:
    """Imitate other speakers and microphones: stretch mels and time, change level, start and a few bands.  # F M

    `reach` is a factor on the changes, 1 for strong ones. Audio that is `measured`, whose number is asked for, is
    neither stretched nor changed in level, as the number may be its pitch, tempo or loudness.
    """
    count, mels = frames.shape
    warp, tempo, level = rng.uniform(0.85, 1.18) ** reach, rng.uniform(0.8, 1.25) ** reach, reach * rng.normal(0, 0.25)
    lowest, highest = reach * rng.normal(0, 0.3), reach * rng.normal(0, 0.3)
    if measured:
        warp, tempo, level, lowest, highest = 1.0, 1.0, 0.0, 0.0, 0.0
    rows = np.minimum(np.arange(max(1, int(count / tempo))) * tempo, count - 1)
    columns = np.minimum(np.arange(mels) * warp, mels - 1)
    stretched = _sampled(_sampled(frames.astype(np.float64), rows, 0), columns, 1)
    stretched += level
    stretched += rng.normal(0, 0.08, stretched.shape)
    stretched += np.linspace(lowest, highest, mels)
    silence = int(rng.integers(0, 12))
    changed = np.empty((silence + len(stretched), mels))
    changed[:silence], changed[silence:] = stretched.min(), stretched
    for axis, max_width in ((0, 12), (1, 14)):  # SpecAugment, arXiv 1904.08779
        width = int(reach * rng.integers(0, max_width))
        start = int(rng.integers(0, max(1, changed.shape[axis] - width)))
        here = slice(start, start + width)
        changed[here if axis == 0 else (slice(None), here)] = changed.mean()
    return changed.astype(np.float32)


def _sampled(values: np.ndarray, positions: np.ndarray, axis: int) -> np.ndarray:
    """Rows (axis 0) or columns (axis 1) of `values` at fractional positions, linear in between.  # F M -> R M or F R"""
    below = positions.astype(int)
    above = np.minimum(below + 1, values.shape[axis] - 1)
    weight = positions - below
    weight = weight if axis else weight[:, None]
    found = values.take(below, axis)
    found *= 1 - weight
    found += values.take(above, axis) * weight
    return found
