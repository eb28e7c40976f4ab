"""Audio: log-mel patches in, residual codes of a neural codec out, filled in masked-parallel; 16 kHz mono."""

# Letters: S samples, N tokens, F frames of 10 ms, M mels, T positions of 40 ms, G codes per position

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from torch import Tensor

from openm6.codecs.audio import AudioCodec
from openm6.core.errors import DataError
from openm6.core.seeds import content_key
from openm6.modalities.codes import (
    ArrayCache,
    CodesAdapter,
    FourierPositionEmbedding,
    audio_positions,
    inpainting_masks,
    masked_arrays,
    sample_mask,
)
from openm6.modalities.image import PatchAdapter
from openm6.modalities.interface import NO_OPTIONS, OWN_ORIGIN, Adapter, Modality, Options, Segment, track
from openm6.ops.audio import resample

RATE = 16_000
FRAMES = 8  # of 10 ms in one source token
UNIT = 320  # samples (20 ms) in one unit of rotary time, so that patches and codes have whole middles
MAX_SECONDS = 30.0
# Target audio clips are sped up or slowed down while training, which changes the voice (Ko et al., Interspeech 2015); a
# few fixed speeds, so that the codes can be remembered.
SPEEDS = (0.78, 0.84, 0.9, 0.95, 1.0, 1.06, 1.12, 1.2, 1.28)
MIN_RATE, MAX_RATE = (
    1_000,
    768_000,
)  # a header may claim any: resampling takes memory in step with the rate


def read_audio(raw: Any, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Mono samples in [-1, 1] at 16 kHz from the bytes of a WAV, FLAC, Ogg or MP3 file, or from such samples.  # S

    Raises:
        DataError: not an audio clip, broken, empty, of an unusual sampling rate, or longer than `max_seconds`, which
            is read from the header before decoding.
    """
    if isinstance(raw, np.ndarray):
        samples, rate = raw.astype(np.float32), RATE
    else:
        samples, rate = _decode(raw, max_seconds)
    if samples.ndim != 1 or not len(samples):
        raise DataError("the audio is empty: record it again")
    if len(samples) > max_seconds * rate:
        raise DataError(
            f"the audio lasts {len(samples) / rate:.0f} s, over the bound of {max_seconds:g} s: cut it"
        )
    if not np.isfinite(samples).all():
        raise DataError("the audio holds values that are not finite: export it again")
    return np.clip(resample(torch.from_numpy(samples), rate, RATE).numpy(), -1, 1)


def duration(raw: Any) -> float:
    """Seconds of an audio clip that `read_audio` accepts; of a file, as stated in its header."""
    if isinstance(raw, np.ndarray):
        return len(raw) / RATE
    with soundfile.SoundFile(io.BytesIO(raw)) as file:
        return float(file.frames / file.samplerate)


def _decode(raw: Any, max_seconds: float) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            if not MIN_RATE <= file.samplerate <= MAX_RATE:
                raise DataError(
                    f"the audio has {file.samplerate:,} samples a second, outside {MIN_RATE:,} to "
                    f"{MAX_RATE:,}: export it again at 16,000"
                )
            seconds = file.frames / file.samplerate
            if seconds > max_seconds:
                raise DataError(
                    f"the audio lasts {seconds:.0f} s, over the bound of {max_seconds:g} s: cut it"
                )
            # A header may lie about the length: never decode more than the bound.
            samples = file.read(int(max_seconds * file.samplerate) + 1, dtype="float32", always_2d=True)
            return samples.mean(1), file.samplerate
    except (soundfile.LibsndfileError, TypeError, ZeroDivisionError, RuntimeError) as error:
        # Not the library's prefix, which names an object in memory.
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise DataError(
            f"the audio is broken or of an unknown format ({reason}): save it again as WAV or FLAC"
        ) from None


class Audio(Modality):
    """Audio as patches of 8 log-mel frames in, and up to a number of seconds in positions of 40 ms out."""

    name: ClassVar[str] = "audio"

    def __init__(self, codec: AudioCodec, seconds: float = 1.2, max_seconds: float = MAX_SECONDS) -> None:
        self.codec = codec
        self.seconds = seconds
        self.max_seconds = max_seconds
        self.hop = codec.quantizer_config.samples_per_position
        self.num_mels = codec.quantizer_config.num_mels
        self.code_cache = ArrayCache()
        self.mel_cache = ArrayCache()
        self.duration_cache = ArrayCache(2**20)

    def source(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """Log-mel patches of all of it, or, with `mask_span`, of as much as a target holds.

        A gap is given as shares of the length, so what is read must be as long as what will be filled in.
        """
        seconds = options.get("seconds")
        if options.get("mask_span") is not None:
            seconds = seconds or self.seconds
        frames = self._frames(raw, seconds, options.get("speed", 1.0))  # F M
        if (
            rng is not None and options.get("mask_span") is None
        ):  # an inpainted part must keep time with its source
            frames = _augmented(frames, rng)
        count = -(-len(frames) // FRAMES)
        padded = np.full((count * FRAMES, self.num_mels), frames.min(), np.float32)
        padded[: len(frames)] = frames
        is_masked = span_mask(options.get("mask_span"), count)
        patches = np.where(is_masked[:, None], 0, padded.reshape(count, -1)).astype(np.float32)
        arrays = {
            "patches": patches,
            "is_masked": is_masked,
            "positions": audio_positions(count, FRAMES / 100),
        }
        grid = track(count, FRAMES * RATE // 100 // UNIT)
        truncated = seconds is not None and self.is_longer(raw, seconds)
        return Segment(
            "audio_in", arrays, grid, count, np.zeros(count, bool), moves=OWN_ORIGIN, truncated=truncated
        )

    def _frames(self, raw: Any, seconds: float | None, speed: float = 1.0) -> np.ndarray:
        """Log-mels of the audio, cut or padded to `seconds` where given.  # F M"""
        key = _key(raw, seconds, speed)
        known = self.mel_cache.get(key)
        if known is not None:
            return known
        samples = self._samples(raw, seconds, speed)
        whole = np.pad(samples, (0, -len(samples) % (self.hop // 4)))
        with torch.no_grad():
            return self.mel_cache.put(key, self.codec.mels(torch.from_numpy(whole)[None])[0].numpy())

    def _samples(self, raw: Any, seconds: float | None, speed: float = 1.0) -> np.ndarray:
        samples = read_audio(raw, self.max_seconds)
        if speed != 1.0:
            samples = resample(torch.from_numpy(samples), round(RATE * speed), RATE).numpy()
        if seconds is None:
            return samples
        length = self.length(seconds) * self.hop
        return np.pad(samples[:length], (0, max(0, length - len(samples))))

    def length(self, seconds: float | None) -> int:
        """Return the number of positions of a generated recording."""
        return max(1, round((seconds or self.seconds) * RATE / self.hop))

    def is_longer(self, raw: Any, seconds: float | None = None) -> bool:
        """Whether a recording, at its own speed, has a position of 40 ms or more beyond `seconds`: it is lost."""
        key = _key(raw, None)
        known = self.duration_cache.get(key)
        if known is None:
            known = self.duration_cache.put(key, np.asarray(duration(raw)))
        return float(known) >= (self.length(seconds) + 1) * self.hop / RATE

    def target(
        self, raw: Any, rng: np.random.Generator | None = None, options: Options = NO_OPTIONS
    ) -> Segment:
        """Codes of `seconds` of audio, masked by the training pattern, or, with `mask_span`, in the gap alone.

        A longer recording is cut at its end, a shorter one is followed by silence.
        `mask_context` masks the codes around the gap as well; without a generator only those in it carry a loss.
        """
        speed = options.get("speed", 1.0)
        if rng is not None and "speed" not in options:
            speed = random_speed(rng)
        codes = self.encode(raw, options.get("seconds"), speed)
        count = len(codes)
        if options.get("mask_span") is None:
            mask = sample_mask(1, count, rng)
            tokens = self._masked(codes, mask, mask, rng)
        else:
            mask_span = span_mask(options["mask_span"], count)
            tokens = self._masked(
                codes, *inpainting_masks(mask_span, bool(options.get("mask_context")), rng), rng
            )
        return replace(tokens, truncated=self.is_longer(raw, options.get("seconds")))

    def blank(self, seconds: float | None = None) -> Segment:
        """Return a target of which every position is masked."""
        count = self.length(seconds)
        mask = sample_mask(1, count, None)
        return self._masked(np.zeros((count, self.codec.groups), np.int64), mask, mask, None)

    def _masked(
        self, codes: np.ndarray, mask: np.ndarray, learn: np.ndarray, rng: np.random.Generator | None
    ) -> Segment:
        positions = audio_positions(len(codes), self.hop / RATE)
        arrays, learn = masked_arrays(codes, mask, learn, positions, self.codec.codebook_size, rng)
        grid = track(len(codes), self.hop // UNIT)
        return Segment("audio_out", arrays, grid, len(codes), learn, "block", OWN_ORIGIN)

    def encode(self, raw: Any, seconds: float | None = None, speed: float = 1.0) -> np.ndarray:
        """Codes of the audio, cut or padded with silence; cached by the bytes of the file.  # T G"""
        seconds = seconds or self.seconds
        key = _key(raw, seconds, speed)
        known = self.code_cache.get(key)
        if known is not None:
            return known
        codes = self.codec.encode(torch.from_numpy(self._samples(raw, seconds, speed))[None])[0]
        return self.code_cache.put(key, codes.numpy().astype(np.int16))

    def decode(self, codes: Tensor) -> np.ndarray:
        """Samples at 16 kHz of one run of codes.  # T G -> S"""
        return self.codec.decode(codes.cpu()[None])[0].numpy()

    def adapters(self, width: int) -> dict[str, Adapter]:
        position = FourierPositionEmbedding(width)
        out = CodesAdapter(position, width, self.codec.quantizer_config.levels, self.codec.groups)
        return {"audio_in": PatchAdapter(position, FRAMES * self.num_mels, width), "audio_out": out}

    def examples(self) -> list[Any]:
        time = np.arange(RATE // 2) / RATE
        return [0.3 * np.sin(2 * np.pi * 440 * time).astype(np.float32), np.zeros(4000, np.float32)]


def _key(raw: Any, seconds: float | None, speed: float = 1.0) -> bytes | None:
    if not isinstance(raw, bytes):
        return None
    return content_key(raw) + f"{seconds} {speed}".encode()


def span_mask(mask_span: tuple[float, float] | None, count: int) -> np.ndarray:
    """Positions that a gap (start and end as fractions of the length) touches.  # N bool"""
    if mask_span is None:
        return np.zeros(count, bool)
    position = np.arange(count)
    return (position + 1 > mask_span[0] * count + 1e-6) & (position < mask_span[1] * count - 1e-6)


def random_span(rng: np.random.Generator) -> tuple[float, float]:
    """A gap of a fifth to a half of the length within the first four fifths, where most clips are not yet over."""
    share = rng.uniform(0.2, 0.5)
    start = rng.uniform(0.0, 0.8 - share)
    return float(start), float(start + share)


def random_speed(rng: np.random.Generator) -> float:
    """One of the speeds at which target audio clips are played while training."""
    return SPEEDS[int(rng.integers(len(SPEEDS)))]


def _augmented(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another speaker in another room: mel axis stretched, tempo, level, start and a few bands changed.  # F M"""
    count, mels = frames.shape
    warp = rng.uniform(0.85, 1.18)
    tempo = rng.uniform(0.8, 1.25)
    rows = np.clip(np.arange(max(1, int(count / tempo))) * tempo, 0, count - 1)
    columns = np.clip(np.arange(mels) * warp, 0, mels - 1)
    changed = _sampled(_sampled(frames, rows).T, columns).T
    changed = changed + rng.normal(0, 0.25) + rng.normal(0, 0.08, changed.shape)
    changed = changed + np.linspace(rng.normal(0, 0.3), rng.normal(0, 0.3), mels)  # another microphone
    quiet = np.full((int(rng.integers(0, 12)), mels), changed.min())
    changed = np.concatenate([quiet, changed])
    for axis, max_width in ((0, 12), (1, 14)):  # SpecAugment, arXiv 1904.08779
        width = int(rng.integers(0, max_width))
        start = int(rng.integers(0, max(1, changed.shape[axis] - width)))
        np.moveaxis(changed, axis, 0)[start : start + width] = changed.mean()
    return changed.astype(np.float32)


def _sampled(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of `values` at fractional positions, linear in between.  # F M, R -> R M"""
    below = np.floor(positions).astype(int)
    above = np.minimum(below + 1, len(values) - 1)
    share = (positions - below)[:, None]
    return values[below] * (1 - share) + values[above] * share
