"""Codecs and encoders of `transformers`: they compute what the library does, and are refused in one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from openm6.codecs.base import bits_per_code
from openm6.codecs.external import PREFIX, load_external, weights_sha256
from openm6.codecs.registry import load_codec
from openm6.core.errors import DataError, OpenM6Error
from openm6.modalities.codes import CodesAdapter, FourierPositionEmbedding
from openm6.modalities.registry import ModalitiesConfig, build_modalities, load_networks
from openm6.modalities.text import train_tokenizer
from openm6.ops.audio import resample
from tests.external_models import NAMES, external_modalities, published
from tests.external_models import publish as save
from tests.small_model import WORDS

RNG = np.random.default_rng(0)
PHOTO = PIL.Image.fromarray(RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8))
VOICE = RNG.normal(0, 0.1, 40_000).astype(np.float32)


def folder_of(name: str) -> str:
    return published(name).removeprefix(PREFIX)


def role_of(name: str) -> str:
    if name.startswith(("janus", "mimi")):
        return "codec"
    return "image encoder" if name.startswith("siglip") else "audio encoder"


@torch.no_grad()
def test_images_become_the_codes_of_janus_and_back() -> None:
    codec = load_codec(published("janus part"))
    theirs = transformers.JanusVQVAE.from_pretrained(folder_of("janus part"))
    raw = torch.rand(2, 3, 64, 64) * 2 - 1
    codes, tokens = codec.encode(raw), theirs.encode(raw).image_tokens.view(2, -1)
    assert codes.shape == (2, 8, 8, 1) and torch.equal(codes.flatten(1), tokens) and len(tokens.unique()) > 8
    assert torch.allclose(codec.decode(codes), theirs.decode(tokens).clamp(-1, 1), atol=1e-5)
    assert 3 < bits_per_code(codes.flatten(0, 2), codec) <= 6
    assert codec.decode(codes[:, :4, :2]).shape == (2, 3, 32, 16), "the library knows squares of one size alone"
    with pytest.raises(DataError, match="multiples of 8"):
        codec.encode(raw[:, :, :60])


@torch.no_grad()
@pytest.mark.parametrize("codebooks", [1, 3, None])
def test_audio_becomes_the_codes_of_mimi_and_back(codebooks: int | None) -> None:
    codec, theirs = load_codec(published("mimi"), codebooks), transformers.MimiModel.from_pretrained(folder_of("mimi"))
    raw = torch.from_numpy(np.stack([VOICE[:19_200], VOICE[-19_200:]]))
    at_24k = torch.from_numpy(np.stack([resample(one, 16_000, 24_000) for one in raw.numpy()]))
    codes, tokens = codec.encode(raw), theirs.encode(at_24k[:, None], num_quantizers=codebooks).audio_codes
    assert codes.shape == (2, 15, codebooks or 4) and torch.equal(codes.mT, tokens) and len(tokens.unique()) > 8
    samples = theirs.decode(tokens).audio_values[:, 0].numpy()
    expected = torch.from_numpy(np.stack([resample(one, 24_000, 16_000) for one in samples])).clamp(-1, 1)
    assert torch.allclose(codec.decode(codes), expected, atol=1e-5) and expected.shape == raw.shape


@pytest.mark.parametrize("name", ["janus", "mimi"])
def test_the_vectors_of_codes_have_one_scale_and_keep_their_distances(name: str) -> None:
    codec: Any = load_codec(published(name))
    vectors = codec.vectors()
    assert vectors.shape[:2] == (codec.config.groups, codec.config.codebook_size)
    assert torch.allclose(vectors.mean((1, 2)), torch.zeros(()), atol=1e-5)
    assert torch.allclose(vectors.square().mean((1, 2)), torch.ones(()), atol=1e-3)
    ours, theirs = torch.cdist(vectors, vectors), torch.cdist(codec.tables, codec.tables)
    assert torch.allclose(ours / ours.amax((1, 2), True), theirs / theirs.amax((1, 2), True), atol=1e-3)
    adapter = CodesAdapter(FourierPositionEmbedding(16), 16, vectors)
    codes = codec.encode(torch.randn(1, 3, 16, 16) if name == "janus" else torch.randn(1, 3840)).flatten(0, -2)
    found = adapter.vectors(codes).view(len(codes), codec.config.groups, -1)
    assert torch.equal(found, torch.stack([vectors[group, codes[:, group]] for group in range(len(vectors))], 1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["siglip", "siglip part", "siglip2"])
def test_an_image_becomes_the_features_of_siglip(name: str) -> None:
    encoder = load_external(published(name), "image encoder")
    features = encoder(PHOTO)
    processor = transformers.AutoImageProcessor.from_pretrained(folder_of(name), backend="pil")
    inputs = processor(images=PHOTO, return_tensors="pt")
    theirs = encoder.model(**inputs).last_hidden_state[0]
    assert features.shape == ((3, 5, 32) if name == "siglip2" else (4, 4, 32))
    assert np.allclose(features.reshape(-1, 32), theirs[: features.size // 32], rtol=1e-3, atol=1e-3)
    assert np.array_equal(features, encoder(PHOTO)) and features.std() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["whisper", "whisper part", "qwen3_asr part"])
def test_audio_becomes_the_features_of_its_encoder(name: str) -> None:
    encoder = load_external(published(name), "audio encoder")
    features, extractor = encoder(VOICE), transformers.AutoFeatureExtractor.from_pretrained(folder_of(name))
    if name.startswith("whisper"):
        # 2 s at once, of which tokens last 80 ms
        inputs = [extractor(one, sampling_rate=16_000, return_tensors="pt") for one in (VOICE[:32_000], VOICE[32_000:])]
        hidden = [encoder.model(one["input_features"]).last_hidden_state[0] for one in inputs]
        theirs = torch.cat([hidden[0], hidden[1][:28]]).view(-1, 4 * 32)
    else:
        shape = {"padding": True, "return_attention_mask": True, "return_tensors": "pt"}
        inputs = extractor(VOICE, sampling_rate=16_000, **shape)
        theirs = encoder.model(inputs["input_features"], inputs["attention_mask"]).last_hidden_state
    assert abs(len(features) * encoder.step - len(VOICE)) < encoder.step and features.shape[1] == encoder.width
    assert np.allclose(features, theirs, rtol=1e-3, atol=1e-3)
    assert len(encoder(VOICE[:100])) >= 1


@pytest.mark.parametrize("whole", ["siglip", "whisper", "janus"])
def test_a_part_of_a_model_is_read_alone(whole: str, tmp_path: Path) -> None:
    model = load_external(published(whole), role_of(whole)).model
    same = type(model)(model.config)
    same.load_state_dict(model.state_dict())
    same.save_pretrained(tmp_path / "part")
    for file in Path(folder_of(whole)).glob("preprocessor_config.json"):
        shutil.copy(file, tmp_path / "part")
    part = load_external(f"{PREFIX}{tmp_path / 'part'}", role_of(whole))
    assert weights_sha256(part.model) == weights_sha256(model)
    assert weights_sha256(load_external(published(f"{whole} part"), role_of(whole)).model) != weights_sha256(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_is_frozen_in_fp32(name: str) -> None:
    network = load_external(published(name), role_of(name))
    assert not network.model.training and not any(one.requires_grad for one in network.parameters())
    assert all(one.dtype == torch.float32 for one in network.parameters())


def test_a_masked_region_is_hidden_from_an_encoder() -> None:
    modalities: Any = external_modalities()
    first, second = np.asarray(PHOTO).copy(), np.asarray(PHOTO).copy()
    second[:30, :45] = 7
    box = {"mask_box": (0, 0, 0.5, 0.5)}
    ours = [modalities["image"].source(one, options=box).arrays for one in (first, second)]
    assert np.array_equal(ours[0]["patches"], ours[1]["patches"]) and 0 < ours[0]["is_masked"].sum() < 15
    plain = modalities["image"].source(first).arrays["patches"]
    assert not np.array_equal(plain[~ours[0]["is_masked"]], ours[0]["patches"][~ours[0]["is_masked"]])
    voice = VOICE[:19_200].copy()
    voice[:9_600] = 0.5
    span = {"mask_span": (0.0, 0.5)}
    ours = [modalities["audio"].source(one, options=span).arrays for one in (VOICE[:19_200], voice)]
    assert np.array_equal(ours[0]["patches"], ours[1]["patches"]) and ours[0]["is_masked"].sum() == 8


def changed(name: str, folder: Path, change: Any) -> str:
    save(name, folder)
    change(folder)
    return f"{PREFIX}{folder}"


def without_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("quant_conv.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def renamed_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}), encoding="utf-8")


BAD: dict[str, tuple[str, Any, str, str]] = {
    "no safetensors": ("janus part", as_pickle, "image.codec", "cannot be loaded .*model.safetensors"),
    "no tensor": ("janus part", without_tensor, "image.codec", "lacks the tensor quant_conv.weight"),
    "truncated": ("mimi", truncated, "audio.codec", "cannot be loaded"),
    "no config": ("mimi", lambda folder: (folder / "config.json").unlink(), "audio.codec", "is of type None"),
    "other type": ("mimi", renamed_type, "audio.codec", "of type llama, .* no codec: name a model of type janus, mimi"),
    "no processor": (
        "siglip", lambda folder: (folder / "preprocessor_config.json").unlink(), "image.encoder", "cannot be loaded",
    ),
    "codec that reads": ("mimi", lambda folder: None, "audio.encoder", "is no audio encoder: name .* whisper"),
    "codec of audio": ("mimi", lambda folder: None, "image.codec", "is no image codec: name one, as image-64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_is_one_sentence(case: str, tmp_path: Path) -> None:
    name, change, setting, sentence = BAD[case]
    modality, key = setting.split(".")
    config = {modality: {key: changed(name, tmp_path / "model", change)}}
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        load_networks(ModalitiesConfig.model_validate(config))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"image": {"encoder": "transformers:/none"}}, "there is no folder /none: name one with a model"),
        ({"image": {"encoder": "image-64"}}, "no encoder 'image-64', .*; a model is named as transformers:NAME"),
        ({"audio": {"codec": "mimi", "codebooks": 5}}, "codebooks=5 must be from 1 to 4"),
        ({"audio": {"codebooks": 5}}, "codebooks=5 is for a codec from transformers, which audio is not"),
        ({"image": {"codec": "janus", "side": 20}}, "side=20 must be a multiple of the codec's stride, 8"),
    ],
)
def test_a_bad_setting_is_one_sentence(config: dict[str, Any], sentence: str) -> None:
    for values in config.values():
        values |= {key: published(value) for key, value in values.items() if value in NAMES}
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        load_networks(ModalitiesConfig.model_validate(config))
    assert "\n" not in str(caught.value)


def test_an_encoder_replaces_patches_and_their_settings() -> None:
    values = {"image": {"encoder": published("siglip part"), "stem": "conv", "flips": True, "max_patches": 4}}
    modalities = build_modalities(ModalitiesConfig.model_validate(values), train_tokenizer(WORDS, 320), {})
    image: Any = modalities["image"]
    assert image.config.stem_elements == 0 and isinstance(image.adapters(16)["image_in"].inner, torch.nn.Linear)
    assert len(image.source(np.asarray(PHOTO), np.random.default_rng(0))) == 16
    assert set(modalities.external) == {"image.codec", "image.encoder", "audio.codec"}


def test_a_name_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(OpenM6Error, match=r"needs the package transformers: pip install '.\[hub\]'"):
        load_codec("transformers:kyutai/mimi")
