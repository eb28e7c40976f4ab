"""The convolutional stem of images: patches of whole images, alone or with others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.modalities.image import Image, ImageConfig
from openm6.modalities.image_stem import ConvStem
from openm6.modalities.interface import Segment
from openm6.modalities.registry import ModalitiesConfig
from openm6.models.description import CheckpointConfig, build_model, read_description
from tests.small_model import BACKBONE, SCALES, modalities

SIZES = ((48, 48), (48, 64), (32, 48), (48, 48))


def conv_image(patch: int = 16) -> Image:
    image = modalities()["image"]
    assert isinstance(image, Image)
    return Image(image.codec, ImageConfig.model_validate({"stem": "conv", "patch": patch}))


def noise(number: int, *size: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def arrays_of(*segments: Segment) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.concatenate([np.array(segment.arrays[name]) for segment in segments]))
        for name in segments[0].arrays
    }


@pytest.mark.parametrize("patch", [8, 16])
def test_images_of_several_sizes_are_embedded_as_if_alone(patch: int) -> None:
    torch.manual_seed(0)
    image = conv_image(patch)
    adapter = image.adapters(24)["image_in"]
    segments = [image.source(noise(number, *size)) for number, size in enumerate(SIZES)]
    together = adapter.embed(arrays_of(*segments))
    assert together.shape == (sum(map(len, segments)), 24)
    alone = torch.cat([adapter.embed(arrays_of(segment)) for segment in segments])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.equal(together, adapter.embed(arrays_of(*segments)))


def test_patches_are_read_with_their_neighbours_alone() -> None:
    torch.manual_seed(0)
    image = conv_image()
    adapter, first = image.adapters(24)["image_in"], noise(0, 80, 80)
    other = first.copy()
    other[:16, :16] = 255
    before, after = (adapter.embed(arrays_of(image.source(values))).view(5, 5, -1) for values in (first, other))
    changed = (before - after).abs().amax(-1) > 1e-6
    assert changed[:2, :2].all() and not changed[4].any() and not changed[:, 4].any()


def test_masked_pixels_do_not_show_in_the_patches_beside() -> None:
    image, first = conv_image(), noise(0, 64, 64)
    adapter, other = image.adapters(24)["image_in"], first.copy()
    other[32:, 16:48] = 0
    options = {"mask_box": (0.25, 0.5, 0.75, 1.0)}
    embedded = [adapter.embed(arrays_of(image.source(values, options=options))) for values in (first, other)]
    assert torch.equal(*embedded)


def test_every_weight_learns() -> None:
    image = conv_image()
    stem = image.stem(24)
    assert isinstance(stem, ConvStem)
    arrays = arrays_of(*(image.source(noise(number, *size)) for number, size in enumerate(SIZES)))
    stem(arrays["patches"], arrays["shapes"]).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in stem.parameters())


def test_under_autocast_the_vectors_have_its_dtype() -> None:
    image = conv_image()
    arrays = arrays_of(*(image.source(noise(number, *size)) for number, size in enumerate(SIZES)))
    with torch.autocast("cpu", torch.bfloat16):
        assert image.stem(24)(arrays["patches"], arrays["shapes"]).dtype == torch.bfloat16


def test_a_model_with_this_stem_is_rebuilt_from_its_description() -> None:
    config = ModalitiesConfig.model_validate({"image": {"stem": "conv", "patch": 16}})
    description = CheckpointConfig(backbone=BACKBONE, modalities=config, scales=SCALES, trained_tasks=[])
    tokenizer = modalities()["text"].tokenizer.to_str()  # type: ignore[attr-defined]
    torch.manual_seed(0)
    first, _ = build_model(description, tokenizer, "the tokenizer")
    second, found = build_model(read_description(description.to_json(), "model.json"), tokenizer, "the tokenizer")
    second.load_state_dict(first.state_dict())
    arrays = arrays_of(found["image"].source(noise(0, 48, 64)))
    embedded = [model.adapter("image_in").embed(arrays) for model in (first, second)]
    assert torch.equal(*embedded) and len(embedded[0]) == 12
