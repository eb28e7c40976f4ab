"""The image codec: shapes, sizes, gradients, precision."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.core.errors import DataError

TINY = ImageCodecConfig(groups=2, levels=(8, 5), widths=(16, 24), encoder_blocks=(1, 1), decoder_blocks=(1, 1))


def make(config: ImageCodecConfig = TINY) -> ImageCodec:
    torch.manual_seed(0)
    codec = ImageCodec(config)
    # The last convolutions begin at zero; stir them, or a wrong block would not show.
    for parameter in codec.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return codec.eval()


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 32), (8, 8), (24, 40)])
def test_any_size_that_the_stride_divides_goes_there_and_back(height: int, width: int) -> None:
    codec = make()
    codes = codec.encode(images(2, height, width))
    assert codes.shape == (2, height // 8, width // 8, 2) and codes.dtype == torch.int64
    assert codes.min() >= 0 and codes.max() < codec.config.codebook_size == 40
    output = codec.decode(codes)
    assert output.shape == (2, 3, height, width) and output.dtype == torch.float32
    assert output.abs().max() <= 1


def test_one_scale_means_places_of_four_pixels() -> None:
    codec = make(ImageCodecConfig(groups=1, widths=(16,), encoder_blocks=(1,), decoder_blocks=(1,)))
    assert codec.encode(images(1, 64, 64)).shape == (1, 16, 16, 1)


def test_a_codec_with_codebooks_has_one_code_for_each_and_their_vectors() -> None:
    codec = make(TINY.model_copy(update={"codebook": 12, "latent": 6}))
    codes = codec.encode(images(2, 32, 16))
    assert codes.shape == (2, 4, 2, 2) and codes.max() < codec.config.codebook_size == 12
    assert codec.decode(codes).shape == (2, 3, 32, 16)
    assert codec.vectors().shape == (2, 12, 6)


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 1, 64, 64), (3, 64, 64), (1, 3, 0, 8)])
def test_other_shapes_are_refused_with_the_stride(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="multiples of 8"):
        make().encode(torch.zeros(shape))


def test_codes_depend_on_what_is_near_and_not_on_the_batch() -> None:
    codec, raw = make(), images(3, 64, 64)
    alone = codec.encode(raw[1:2])
    assert torch.equal(codec.encode(raw)[1:2], alone)
    changed = raw[1:2].clone()
    changed[..., -1, -1] = 1.0
    assert torch.equal(codec.encode(changed)[:, 0, 0], alone[:, 0, 0])


def test_autocast_leaves_the_quantizer_in_full_precision() -> None:
    codec = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        output, quantized = codec.reconstruct(images(2, 32, 32))
    assert output.dtype == quantized.latent.dtype == torch.float32
    values = codec.quantizer.latent_of(quantized.codes)
    assert torch.allclose(values, quantized.latent, atol=1e-6)


def test_scales_must_agree() -> None:
    with pytest.raises(ValidationError, match="one entry per scale"):
        ImageCodecConfig(widths=(16, 32), encoder_blocks=(1,), decoder_blocks=(1, 1))
    with pytest.raises(ValidationError, match="multiples of 8"):
        ImageCodecConfig(widths=(20,), encoder_blocks=(1,), decoder_blocks=(1,))
