"""Codec files: round trip, names, and one sentence for every way they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.codecs.base import TrainableCodec
from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.codecs.registry import CODECS, METADATA_KEY, load_codec, save_codec
from openm6.core.errors import CheckpointError, ConfigError


def example(kind: str) -> tuple[TrainableCodec, torch.Tensor]:
    torch.manual_seed(0)
    if kind == "image":
        config = ImageCodecConfig(groups=2, levels=(8, 5), widths=(16,), encoder_blocks=(1,), decoder_blocks=(1,))
        return ImageCodec(config).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    small = AudioCodecConfig(groups=2, window=64, hop=16, num_mels=8, width=16, encoder_blocks=1, decoder_blocks=1)
    return AudioCodec(small).eval(), 0.1 * torch.randn(2, 640)


@pytest.mark.parametrize("kind", list(CODECS))
def test_encode_and_decode_agree_with_reconstruct_and_a_gradient_reaches_every_parameter(kind: str) -> None:
    codec, raw = example(kind)
    # The last convolutions begin at zero: change them, or a wrong block would not show.
    for parameter in codec.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    output, quantized = codec.reconstruct(raw)
    assert torch.equal(codec.encode(raw), quantized.codes)
    assert torch.allclose(codec.decode(quantized.codes), output.clamp(-1, 1), atol=1e-5)
    output, _ = codec.train().reconstruct(torch.cat([raw] * 4))
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())


@pytest.mark.parametrize("kind", list(CODECS))
def test_a_saved_codec_does_the_same(kind: str, tmp_path: Path) -> None:
    codec, raw = example(kind)
    codec.latent_norms()[0].mean.fill_(0.3)
    save_codec(codec, tmp_path / "a.safetensors", dtype=torch.float32)
    loaded = load_codec(tmp_path / "a.safetensors")
    assert type(loaded) is type(codec) and loaded.config == codec.config
    assert torch.equal(loaded.encode(raw), codec.encode(raw))
    assert torch.equal(loaded.decode(codec.encode(raw)), codec.decode(codec.encode(raw)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("kind", list(CODECS))
def test_half_precision_halves_the_file_and_keeps_nearly_all_codes(kind: str, tmp_path: Path) -> None:
    codec, raw = example(kind)
    save_codec(codec, tmp_path / "half.safetensors")
    save_codec(codec, tmp_path / "full.safetensors", dtype=torch.float32)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.65 * (tmp_path / "full.safetensors").stat().st_size
    loaded = load_codec(str(tmp_path / "half.safetensors"))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert (loaded.encode(raw) == codec.encode(raw)).float().mean() > 0.97


def test_an_unknown_name_says_what_is_known() -> None:
    with pytest.raises(ConfigError, match="no codec 'imagee-64'"):
        load_codec("imagee-64")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no codec at all, only a few words")
    with pytest.raises(CheckpointError, match="cannot be read as a codec"):
        load_codec(path)


@pytest.mark.parametrize("about", [{"kind": "video", "config": {}}, {"kind": "image"}, {}])
def test_another_safetensors_file_is_no_codec(tmp_path: Path, about: dict[str, object]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, str(path), {METADATA_KEY: json.dumps(about)})
    with pytest.raises(CheckpointError, match="holds no codec"):
        load_codec(path)


def test_weights_that_do_not_fit_their_config_are_refused(tmp_path: Path) -> None:
    codec, _ = example("image")
    path = tmp_path / "a.safetensors"
    save_codec(codec, path)
    tensors = load_file(str(path))
    config = json.loads(codec.config.model_dump_json()) | {"widths": [24]}
    save_file(tensors, str(path), {METADATA_KEY: json.dumps({"kind": "image", "config": config})})
    with pytest.raises(CheckpointError, match="do not fit its config"):
        load_codec(path)


def test_an_unknown_key_in_the_config_is_refused(tmp_path: Path) -> None:
    codec, _ = example("image")
    config = json.loads(codec.config.model_dump_json()) | {"colour": 1}
    save_file(
        dict(codec.state_dict()),
        str(tmp_path / "a.safetensors"),
        {METADATA_KEY: json.dumps({"kind": "image", "config": config})},
    )
    with pytest.raises(ConfigError, match="colour"):
        load_codec(tmp_path / "a.safetensors")
