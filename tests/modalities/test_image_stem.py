"""The convolutional stem of images: patches of whole images, alone or with others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.modalities.batch import Batch, build_sequence, collate, split
from openm6.modalities.image import Image, ImageConfig
from openm6.modalities.image_stem import IMAGES, OF_SIZE, ConvStem
from openm6.modalities.interface import Segment
from openm6.modalities.registry import ModalitiesConfig
from openm6.models.description import CheckpointConfig, build_model, read_description
from openm6.optim.registry import default_groups, set_lr
from tests.small_model import BACKBONE, SCALES, modalities

SIZES = ((48, 48), (48, 64), (32, 48), (48, 48))


def conv_image(patch: int = 16) -> Image:
    image = modalities()["image"]
    assert isinstance(image, Image)
    return Image(image.codec, ImageConfig.model_validate({"stem": "conv", "patch": patch}))


def noise(number: int, *size: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)


def arrays_of(*segments: Segment) -> dict[str, torch.Tensor]:
    """As of a batch of these segments."""
    return batch_of(*segments).groups["image_in"].arrays


def batch_of(*segments: Segment) -> Batch:
    return collate([[build_sequence([segment]) for segment in segments]], sum(map(len, segments)))


def kept_bytes(stem: ConvStem, arrays: dict[str, torch.Tensor], half: bool) -> int:
    """Bytes that torch keeps of a forward pass, weights and their copies in bf16 included."""
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no other tensor gets its memory
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        embedded(stem, arrays)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def embedded(stem: torch.nn.Module, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    tables = [array for name, array in arrays.items() if name.startswith(OF_SIZE)]
    vectors = stem(arrays["patches"], tables)
    assert isinstance(vectors, torch.Tensor)
    return vectors


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
    embedded(stem, arrays).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in stem.parameters())


def test_under_autocast_the_vectors_have_its_dtype() -> None:
    image = conv_image()
    arrays = arrays_of(*(image.source(noise(number, *size)) for number, size in enumerate(SIZES)))
    with torch.autocast("cpu", torch.bfloat16):
        assert embedded(image.stem(24), arrays).dtype == torch.bfloat16


def test_a_batch_its_parts_and_its_copy_in_another_process_have_equal_vectors() -> None:
    torch.manual_seed(0)
    image = conv_image()
    adapter = image.adapters(24)["image_in"]
    # Two by two and one by four are as many patches.
    sizes = (*SIZES, (32, 32), (16, 64))
    batch = batch_of(*(image.source(noise(number, *size)) for number, size in enumerate(sizes)))
    arrays = batch.groups["image_in"].arrays
    shapes = [tuple(array.shape) for name, array in arrays.items() if name.startswith(OF_SIZE)]
    assert shapes == [(1, 1, 4), (1, 2, 2), (1, 2, 3), (2, 3, 3), (1, 3, 4)]
    vectors = adapter.embed(arrays)
    copy = Batch.__new__(Batch)
    copy.__setstate__(batch.__getstate__())
    assert torch.equal(adapter.embed(copy.groups["image_in"].arrays), vectors)
    for part in split(batch, 3):
        group = part.groups["image_in"]
        own = torch.isin(batch.groups["image_in"].example, group.example)
        torch.testing.assert_close(adapter.embed(group.arrays), vectors[own], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("patch", [8, 16])
def test_what_torch_keeps_is_estimated_within_a_tenth(patch: int, half: bool) -> None:
    """Of more images, so that weights do not count; their number is a multiple of IMAGES."""
    image = conv_image(patch)
    stem, segment = image.stem(64), image.source(noise(0, 64, 96))
    assert isinstance(stem, ConvStem)
    few, many = (kept_bytes(stem, arrays_of(*[segment] * count), half) for count in (IMAGES, 3 * IMAGES))
    estimate = image.config.stem_elements * (2 if half else 4)
    assert estimate <= (many - few) / (2 * IMAGES * len(segment)) <= 1.1 * estimate
    assert conv_image(patch).config.stem_elements and not ImageConfig().stem_elements


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


def test_only_the_directions_of_kernels_count() -> None:
    """What training adds to all weights of a kernel, or to their scale, cannot drown colours."""
    torch.manual_seed(0)
    stem, arrays = ConvStem(16, 32), arrays_of(conv_image().source(noise(0, 64, 64)))
    before = embedded(stem, arrays)
    with torch.no_grad():
        for layer in (*stem.halve, *stem.refine):
            layer.weight.mul_(50).add_(0 if layer.first else 3)
    torch.testing.assert_close(embedded(stem, arrays), before, atol=1e-3, rtol=1e-3)


def test_white_is_zero() -> None:
    arrays = arrays_of(conv_image().source(np.full((64, 64, 3), 255, np.uint8)))
    assert embedded(ConvStem(16, 32), arrays).abs().max() == 0


def test_the_stem_learns_more_slowly() -> None:
    stem = ConvStem(16, 32)
    model = torch.nn.ModuleList([stem, torch.nn.Linear(32, 4)])
    optimizer = torch.optim.SGD(default_groups(model))
    set_lr(optimizer, 1.0)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert all(rates[id(one)] == (0.2 if name.startswith("0.") else 1.0) for name, one in model.named_parameters())
