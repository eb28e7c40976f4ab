"""Audio clips: what is read from which files, what is refused, gaps, and lengths."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.codecs.registry import load_codec, load_encoder
from openm6.core.errors import DataError
from openm6.data.prepare import example_sequence
from openm6.modalities.audio import FRAMES, MAX_RATE, RATE, Audio, AudioConfig, random_span, read_audio, span_mask
from openm6.tasks.registry import TASKS
from tests.small_model import modalities


@pytest.fixture(scope="module")
def audio() -> Audio:
    found = modalities()["audio"]
    assert isinstance(found, Audio)
    return found


def sine(seconds: float, rate: int = RATE, pitch: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def file_of(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str = "PCM_16") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def loudest(samples: np.ndarray) -> float:
    """Frequency of the highest peak in Hz."""
    power = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(power.argmax() * RATE / len(samples))


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_sixteen_thousand_with_the_same_pitch(rate: int) -> None:
    found = read_audio(file_of(sine(0.5, rate), rate))
    assert len(found) == RATE // 2 and found.dtype == np.float32
    assert loudest(found) == pytest.approx(440, abs=2.1)
    inner = slice(800, -800)
    assert np.abs(found[inner] - sine(0.5)[inner]).max() < 0.02


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")])
def test_common_formats_are_read(kind: str, subtype: str) -> None:
    found = read_audio(file_of(sine(0.25), RATE, kind, subtype))
    assert len(found) == RATE // 4 and loudest(found) == pytest.approx(440, abs=5)


def test_stereo_is_mixed() -> None:
    both = np.stack([sine(0.1), -sine(0.1)], axis=1)
    assert np.abs(read_audio(file_of(both))).max() < 1e-3


def test_two_hours_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = file_of(np.zeros(7200 * 1000, np.int16), 1000, subtype="PCM_U8")

    def read(*words: object, **named: object) -> None:
        raise AssertionError("decoded, although the header tells the length")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    with pytest.raises(DataError, match="lasts 7200 s, over the bound of 30 s: cut it"):
        read_audio(raw)


def test_the_bound_can_be_set() -> None:
    assert len(read_audio(file_of(sine(1.0)), max_seconds=1.0)) == RATE
    with pytest.raises(DataError, match="over the bound of 0.5 s"):
        read_audio(file_of(sine(1.0)), max_seconds=0.5)
    with pytest.raises(DataError, match="over the bound of 0.5 s"):
        read_audio(sine(1.0), max_seconds=0.5)


@pytest.mark.parametrize("rate", [1, 999, MAX_RATE + 1, 2_000_000_011])
def test_a_rate_that_nobody_records_at_is_refused(rate: int) -> None:
    """A prime rate in the header of a short file would else ask for gigabytes."""
    header = bytearray(file_of(np.zeros(10, np.float32)))
    header[24:28] = rate.to_bytes(4, "little")
    with pytest.raises(DataError, match="samples per second, outside 1,000 to 768,000"):
        read_audio(bytes(header))


@pytest.mark.parametrize(
    "raw",
    [b"", b"hello, I am a text", file_of(np.zeros(500, np.float32))[:20], None, 5],
    ids=["empty", "text", "header", "none", "number"],
)
def test_what_is_no_audio_is_one_sentence(raw: object) -> None:
    with pytest.raises(DataError, match="broken or of an unknown format") as caught:
        read_audio(raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        (np.zeros(0, np.float32), "empty"),
        (np.full(20, np.nan, np.float32), "not finite"),
        (np.zeros((3, 2)), "of one channel"),
    ],
)
def test_samples_that_are_none(samples: np.ndarray, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_audio(samples)


def test_a_file_of_values_that_are_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        read_audio(file_of(np.array([0.1, np.inf, 0.2], np.float32), subtype="FLOAT"))


@pytest.mark.parametrize("seconds", [0.04, 0.5, 1.2])
def test_a_target_is_as_long_as_wanted(audio: Audio, seconds: float) -> None:
    for given in (0.1, 2.0):
        tokens = audio.target(sine(given), options={"seconds": seconds})
        assert len(tokens) == audio.length(seconds) == round(seconds * 25)
    assert len(audio.blank(seconds)) == len(tokens)


def test_what_follows_a_short_audio_clip_is_silence(audio: Audio) -> None:
    short = audio.encode(sine(0.4), 1.2)
    padded = audio.encode(np.pad(sine(0.4), (0, RATE)), 1.2)
    assert np.array_equal(short, padded)
    decoded = audio.decode(torch.from_numpy(short.astype(np.int64)))
    assert np.abs(decoded[RATE:]).mean() < 0.1 * np.abs(decoded[: RATE // 4]).mean()


@pytest.mark.parametrize(
    ("mask_span", "touched"),
    [(None, []), ((0.0, 1.0), [0, 1, 2, 3]), ((0.25, 0.5), [1]), ((0.3, 0.6), [1, 2]), ((0.9, 1.0), [3])],
)
def test_a_gap_takes_all_places_it_touches(mask_span: tuple[float, float] | None, touched: list[int]) -> None:
    assert np.flatnonzero(span_mask(mask_span, 4)).tolist() == touched


@pytest.mark.parametrize("seed", range(10))
def test_a_random_gap_always_hides_something(seed: int) -> None:
    start, end = random_span(np.random.default_rng(seed))
    assert 0 <= start < end <= 0.8
    assert span_mask((start, end), 30).sum() >= 5


def test_a_gap_hides_from_the_source_and_alone_is_learned(audio: Audio) -> None:
    options = {"mask_span": (0.25, 0.5), "seconds": 1.2}
    read, wanted = (method(sine(0.6), options=options) for method in (audio.source, audio.target))
    assert np.array_equal(read.arrays["is_masked"], span_mask((0.25, 0.5), len(read)))
    assert np.array_equal(wanted.learn, span_mask((0.25, 0.5), len(wanted)))
    assert (read.arrays["patches"][read.arrays["is_masked"]] == 0).all() and 0 < wanted.learn.sum() < len(wanted)


def test_augmentation_stays_finite_and_differs(audio: Audio) -> None:
    plain = audio.source(sine(0.6))
    for seed in range(30):
        tokens = audio.source(sine(0.6), np.random.default_rng(seed))
        assert np.isfinite(tokens.arrays["patches"]).all() and len(tokens) > 0
        assert tokens.arrays["patches"].shape != plain.arrays["patches"].shape or not np.array_equal(
            tokens.arrays["patches"], plain.arrays["patches"]
        )


def test_mixed_augmentation_goes_from_none_to_strong(audio: Audio) -> None:
    raw = file_of(sine(0.6))
    plain = audio.patches(raw)
    counts = {}
    for strength in ("slight", "mixed", "strong"):
        one = Audio(audio.codec, AudioConfig(augmentation=strength))
        lengths = [len(one.patches(raw, rng=np.random.default_rng(seed))) - len(plain) for seed in range(60)]
        counts[strength] = float(np.std(lengths))
    assert counts["slight"] < counts["mixed"] < counts["strong"]


@pytest.mark.parametrize(("task", "keeps"), [("audio_regression", True), ("audio_classification", False)])
def test_audio_keeps_its_pitch_and_level_where_a_number_is_asked_for(task: str, keeps: bool) -> None:
    both = modalities()
    audio = both["audio"]
    assert isinstance(audio, Audio)
    plain = audio.source(sine(0.6)).arrays["patches"].reshape(-1, audio.num_mels)
    record = {"id": "1", "audio": file_of(sine(0.6)), "label": "one", "numbers": {"hours": 1.0}}
    bands, levels, lengths = [], [], set()
    for seed in range(40):
        example = TASKS[task].example(record, np.random.default_rng(seed), train=True)
        segments = example_sequence(example, both, np.random.default_rng(seed)).segments
        frames = next(one for one in segments if one.kind == "audio_in").arrays["patches"].reshape(-1, audio.num_mels)
        bands.append(frames.mean(0).argmax() == plain.mean(0).argmax())
        levels.append(frames.max())
        lengths.add(len(frames))
    # The noise that is left has a deviation of 0.08.
    assert bool(np.ptp(np.percentile(levels, [10, 90])) < 0.3) is keeps
    # A hidden band may be that of the tone.
    assert np.mean(bands) > 0.8 if keeps else np.mean(bands) < 0.4
    # Up to 110 ms of silence come before it.
    assert (max(lengths) - min(lengths) <= 2 * FRAMES) is keeps


@pytest.mark.parametrize(("before", "after"), [(0, 8_000), (4_800, 0), (1_600, 6_400)])
def test_an_encoder_of_log_mels_reads_no_silence_around_a_recording(audio: Audio, before: int, after: int) -> None:
    own = Audio(audio.codec, AudioConfig(encoder="audio-mini"), load_encoder("audio-mini", "audio"))
    noise = np.random.default_rng(0).normal(0, 1e-4, before + after).astype(np.float32)
    raw = np.concatenate([noise[:before], sine(0.6), noise[before:]])
    plain, found = own.source(sine(0.6)), own.source(raw)
    # Windows at both ends reach into what is beside the recording.
    assert abs(len(found) - len(plain)) <= 1 and len(own.source(np.zeros(4_000, np.float32))) >= 1
    assert len(audio.source(raw)) > len(audio.source(sine(0.6))) + 1, "log-mels keep the time of what they read"
    timed = own.source(raw, options={"seconds": 1.2})
    assert len(timed) == len(own.source(sine(0.6), options={"seconds": 1.2}))


@pytest.mark.parametrize("samples", [9_600, 9_700])
def test_audio_is_read_after_the_codec_as_often_as_set(audio: Audio, samples: int) -> None:
    raw = sine(0.7)[:samples]
    often = Audio(audio.codec, AudioConfig(codec_probability=0.5))
    heard = audio.decode(torch.from_numpy(audio.encode(raw, -(-samples // audio.hop) * audio.hop / RATE)))[:samples]
    found = []
    for seed in range(20):
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        is_coded = other.random() < 0.5
        found.append(is_coded)
        assert np.array_equal(often.patches(raw, rng=rng), audio.patches(heard if is_coded else raw, rng=other))
    assert 2 < sum(found) < 18
    # Neither what is measured nor what a trained model reads.
    measured = [one.patches(raw, rng=np.random.default_rng(3), measured=True) for one in (often, audio)]
    assert np.array_equal(*measured) and np.array_equal(often.patches(raw), audio.patches(raw))


@pytest.mark.parametrize("count", [1, 10, 159, 161, 641])
def test_very_short_audio_clips_are_read_and_spoken(audio: Audio, count: int) -> None:
    for rng in (None, *(np.random.default_rng(seed) for seed in range(40))):
        assert len(audio.source(np.full(count, 0.1, np.float32), rng)) >= 1
    for rng in (None, np.random.default_rng(0)):
        assert len(audio.target(np.full(count, 0.1, np.float32), rng)) == 30


@pytest.mark.parametrize("shape", [{"hop": 80, "window": 320, "num_mels": 40}, {"hop": 200, "window": 800}])
def test_reading_does_not_depend_on_the_codec(audio: Audio, shape: dict[str, int]) -> None:
    codec = AudioCodec(AudioCodecConfig(**shape, width=16, encoder_blocks=1, decoder_blocks=1)).eval()
    other = Audio(codec, AudioConfig())
    for raw in (sine(0.7), sine(0.33)):
        ours, theirs = audio.source(raw), other.source(raw)
        assert np.array_equal(ours.grid, theirs.grid)
        assert np.array_equal(ours.arrays["patches"], theirs.arrays["patches"])
        assert len(other.source(raw, options={"seconds": 0.6})) == len(audio.source(raw, options={"seconds": 0.6}))
    with pytest.raises(ValidationError, match="16000"):
        AudioCodecConfig(rate=24000)  # type: ignore[arg-type]


def test_a_file_heard_before_gives_the_same(audio: Audio) -> None:
    raw = file_of(sine(0.3))
    first, second = audio.source(raw), audio.source(raw)
    assert np.array_equal(first.arrays["patches"], second.arrays["patches"])
    assert np.array_equal(first.arrays["patches"], audio.source(read_audio(raw)).arrays["patches"])
    assert np.array_equal(audio.encode(raw), audio.encode(read_audio(raw)))
    # A gap must not stick to what is remembered.
    holed = audio.source(raw, options={"mask_span": (0.0, 0.5)})
    assert holed.arrays["is_masked"].any() and not audio.source(raw).arrays["is_masked"].any()


def audio_of(seconds: float) -> Audio:
    """The modality as `modalities.audio.seconds` makes it."""
    return Audio(load_codec("audio"), AudioConfig(seconds=seconds))  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", [0.4, 2.0])
@pytest.mark.parametrize("task", ["text_to_speech", "image_to_audio", "tabular_to_audio", "audio_inpainting"])
def test_the_setting_decides_how_long_every_task_speaks(task: str, seconds: float) -> None:
    """Taught, asked for and read around a gap at one length."""
    record = {"id": "1", "label": "seven", "label_zh": "七", "image": b"p", "numbers": {"mass": 1.0}}
    record["audio"] = file_of(sine(0.8))
    example = TASKS[task].example(record, np.random.default_rng(0), train=True)
    modality = audio_of(seconds)
    for rng in (None, np.random.default_rng(1)):
        assert len(modality.target(example.target.raw, rng, example.target.options)) == seconds * 25
    assert len(modality.blank()) == seconds * 25
    for part in example.source:
        if part.modality == "audio":
            assert len(modality.source(part.raw, options=part.options)) == seconds * 12.5


def test_a_recording_longer_than_the_setting_is_cut_and_says_so() -> None:
    modality = audio_of(0.4)
    cut = {seconds: modality.target(file_of(sine(seconds))).truncated for seconds in (0.1, 0.4, 0.43, 0.45, 2.0)}
    assert cut == {0.1: False, 0.4: False, 0.43: False, 0.45: True, 2.0: True}
    again = [modality.target(file_of(sine(2.0))) for _ in range(2)]
    assert all(tokens.truncated for tokens in again), "also when its codes are remembered"
    assert not modality.source(sine(2.0)).truncated, "what is only heard is heard whole"
    assert modality.source(sine(2.0), options={"mask_span": (0.2, 0.4)}).truncated
    head = modality.encode(sine(0.4))
    assert np.array_equal(modality.encode(sine(2.0))[:-1], head[:-1]), "the beginning is kept"


def test_many_channels_are_not_decoded_at_once() -> None:
    samples, file = np.zeros((400_000, 8), np.float32), io.BytesIO()
    samples[:, 3] = 0.8
    soundfile.write(file, samples, 48_000, format="FLAC")
    tracemalloc.start()
    read = read_audio(file.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read.max() == pytest.approx(0.1, abs=0.02) and len(read) == pytest.approx(400_000 / 3, abs=2)
    assert peak < samples.nbytes


def test_a_recording_to_be_generated_is_played_at_other_speeds_only_if_so_set() -> None:
    raw = file_of(sine(0.4))
    speeds = {}
    for vary_speed in (False, True):
        modality = Audio(load_codec("audio"), AudioConfig(seconds=0.4, vary_speed=vary_speed))  # type: ignore[arg-type]
        for seed in range(8):
            modality.target(raw, np.random.default_rng(seed))
        speeds[vary_speed] = {speed for _, _, speed in modality.code_cache.entries}
    assert speeds[False] == {1.0} and len(speeds[True]) > 2


def test_a_recording_of_unknown_length_is_one_sentence() -> None:
    raw = bytearray(file_of(sine(0.5), kind="FLAC"))
    raw[21] &= 0xF0  # the number of samples in the header, 36 bits
    raw[22:26] = bytes(4)
    with pytest.raises(DataError, match="does not state its length.*: save it again as WAV or FLAC"):
        read_audio(bytes(raw))
