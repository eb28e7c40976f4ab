"""The audio codec: shapes, lengths, gradients, stages."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.core.errors import DataError

TINY = AudioCodecConfig(
    groups=3,
    levels=(5, 4),
    window=64,
    hop=16,
    num_mels=12,
    width=16,
    encoder_blocks=1,
    decoder_blocks=2,
    latent=6,
)


def make() -> AudioCodec:
    torch.manual_seed(0)
    return AudioCodec(TINY).eval()


def audio_clips(count: int, samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(count, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("samples", "places"), [(64, 1), (640, 10), (650, 11), (1, 1)])
def test_a_started_place_counts_and_audio_comes_back_in_whole_places(samples: int, places: int) -> None:
    codec = make()
    codes = codec.encode(audio_clips(2, samples))
    assert codes.shape == (2, places, 3) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.config.codebook_size == 20
    output = codec.decode(codes)
    assert output.shape == (2, places * 64)
    assert torch.isfinite(output).all() and output.abs().max() <= 1


@pytest.mark.parametrize("shape", [(640,), (1, 0), (1, 2, 640)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="B samples"):
        make().encode(torch.zeros(shape))


def test_first_stages_alone_can_be_decoded() -> None:
    codec = make()
    codes = codec.encode(audio_clips(1, 640))
    coarse, fine = codec.decode(codes[..., :1]), codec.decode(codes)
    assert coarse.shape == fine.shape and not torch.equal(coarse, fine)


def test_autocast_leaves_rounding_and_spectra_in_full_precision() -> None:
    codec, raw = make(), audio_clips(2, 640)
    with torch.autocast("cpu", torch.bfloat16):
        output, quantized = codec.reconstruct(raw)
    assert output.dtype == quantized.latent.dtype == torch.float32
    assert torch.isfinite(output).all()


def test_silence_and_full_scale_stay_finite() -> None:
    codec = make()
    for raw in (torch.zeros(1, 640), torch.ones(1, 640), torch.full((1, 640), 1e-30)):
        assert torch.isfinite(codec.decode(codec.encode(raw))).all()


def test_windows_must_overlap() -> None:
    with pytest.raises(ValidationError, match="multiple of hop"):
        AudioCodecConfig(window=100, hop=64)


def test_the_default_sends_25_places_a_second() -> None:
    assert AudioCodecConfig().rate / AudioCodecConfig().samples_per_position == 25
