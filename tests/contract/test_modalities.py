"""What every registered modality must do, and those with models of `transformers`, on a few raw inputs of each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openm6.core.errors import DataError
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import MODALITIES, Modalities, source_segments, target_segment
from openm6.modalities.series import NumberSeries
from openm6.models.omni import Omni
from openm6.nn.config import ModalityExpertsConfig
from tests.external_models import external_modalities
from tests.small_model import BACKBONE, modalities, omni

RNG = np.random.default_rng(0)
COLUMNS: dict[str, Any] = modalities()["numbers"].scales  # type: ignore[attr-defined]
EXAMPLES: dict[str, list[Any]] = {
    "text": ["seven red apples", "七个红苹果", "", "naïve 🙂 \u0000 <end>"],
    "image": [RNG.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (32, 32, 3), (20, 50, 3))],
    "audio": [0.3 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16_000).astype(np.float32), np.zeros(4000, np.float32)],
    "numbers": [
        {next(iter(COLUMNS)): 1.0},
        dict.fromkeys(COLUMNS),
        NumberSeries(next(iter(COLUMNS)), [1.0, None, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]),
        NumberSeries(next(iter(COLUMNS)), [3.0, None, 5.0], [1.0, 2.0, None, 4.0] * 5, ([0.0], 86_400.0)),
    ],
}
EXTERNAL = ("image by name", "audio by name")
NAMES = (*MODALITIES, *EXTERNAL)
CASES = [(name, number) for name in NAMES for number in range(len(EXAMPLES[name.split()[0]]))]


def example(name: str, number: int) -> Any:
    return EXAMPLES[name.split()[0]][number]


def all_of(name: str) -> Modalities:
    return external_modalities() if name in EXTERNAL else modalities()


def modality(name: str) -> Any:
    return all_of(name)[name.split()[0]]


def tensors(tokens: Segment) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in tokens.arrays.items()}


def check_shapes(tokens: Segment) -> None:
    count = len(tokens)
    assert tokens.grid.shape == (count, 3) and tokens.grid.min(initial=0) >= 0
    assert tokens.learn.shape == (count,) and tokens.learn.dtype == bool
    assert {len(array) for array in tokens.arrays.values()} == {count}
    along = (tokens.grid * np.asarray(tokens.moves)).max(initial=-1)
    assert tokens.span > along, "the next segment would stand on this one's places"
    for name, array in tokens.arrays.items():
        assert array.dtype.kind in "biuf" and np.isfinite(array).all(), name


def test_the_model_is_made_of_every_registered_modality() -> None:
    assert set(modalities()) == set(MODALITIES)
    assert all(modalities()[name].name == name for name in MODALITIES)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_source_is_read_and_never_learned(name: str, number: int) -> None:
    tokens = modality(name).source(example(name, number))
    check_shapes(tokens)
    assert tokens.placement == "source" and not tokens.learn.any()
    again = modality(name).source(example(name, number))
    for key, array in tokens.arrays.items():
        assert np.array_equal(array, again.arrays[key]), "without a generator a source must repeat exactly"


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_target_is_learned_and_never_read_as_a_source(name: str, number: int) -> None:
    for rng in (None, np.random.default_rng(3)):
        tokens = modality(name).target(example(name, number), rng)
        check_shapes(tokens)
        assert tokens.placement in ("causal", "block")
        if "is_masked" in tokens.arrays:
            assert tokens.arrays["is_masked"].any() and tokens.learn[tokens.arrays["is_masked"]].all()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_without_a_generator_all_there_is_to_hide_is_hidden(name: str, number: int) -> None:
    tokens = modality(name).target(example(name, number))
    if "is_masked" in tokens.arrays:
        assert tokens.arrays["is_masked"].all() and tokens.learn.all()
    elif "observed" in tokens.arrays:
        observed = tokens.arrays["observed"]
        assert np.array_equal(tokens.learn, observed.reshape(len(tokens), -1).any(1))
    else:
        assert tokens.learn.all()


@pytest.mark.parametrize(("name", "number"), CASES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_augmentation_follows_the_generator(name: str, number: int, seed: int) -> None:
    for method in (modality(name).source, modality(name).target):
        first, second = (method(example(name, number), np.random.default_rng(seed)) for _ in range(2))
        for key, array in first.arrays.items():
            assert np.array_equal(array, second.arrays[key])


@pytest.mark.parametrize(("name", "number"), CASES)
def test_adapters_embed_and_judge(name: str, number: int) -> None:
    torch.manual_seed(0)
    adapters = modality(name).adapters(64)
    for tokens in (
        modality(name).source(example(name, number)),
        modality(name).target(example(name, number), np.random.default_rng(0)),
    ):
        vectors = adapters[tokens.kind].embed(tensors(tokens))
        assert vectors.shape == (len(tokens), 64) and bool(vectors.isfinite().all())
    hidden = torch.randn(len(tokens), 64, requires_grad=True)
    for loss in (adapters[tokens.kind].nll, adapters[tokens.kind].training_loss):
        nll = loss(hidden, tensors(tokens))
        assert nll.shape == (len(tokens),) and bool((nll >= 0).all()) and bool(nll.isfinite().all())
    learned = torch.from_numpy(tokens.learn)
    (gradient,) = torch.autograd.grad(nll[learned].sum(), hidden)
    assert bool((gradient[learned].abs().sum(-1) > 0).all()), "a token without a gradient learns nothing"


@pytest.mark.parametrize("name", MODALITIES)
def test_kinds_of_token_belong_to_one_modality_alone(name: str) -> None:
    others = {kind for other in MODALITIES if other != name for kind in modalities()[other].adapters(64)}
    assert modality(name).adapters(64) and not set(modality(name).adapters(64)) & others


@pytest.mark.parametrize("reads", NAMES)
@pytest.mark.parametrize("gives", NAMES)
def test_any_modality_can_follow_from_any(reads: str, gives: str) -> None:
    external = {reads, gives} & set(EXTERNAL)
    whole = external_modalities() if external else modalities()
    source = source_segments([Part(reads.split()[0], example(reads, 0))], whole)
    target = target_segment(Part(gives.split()[0], example(gives, 0)), whole, np.random.default_rng(0))
    batch = collate([[build_sequence([*source, target], "x")]], len(source[0]) + len(target) + 3)
    model = Omni(BACKBONE, whole).eval().requires_grad_(False) if external else omni()
    losses, _ = model.compute_loss(batch)
    assert list(losses) == [target.kind]
    assert len(losses[target.kind].nll) == target.learn.sum()
    assert bool(losses[target.kind].nll.isfinite().all())
    assert float(losses[target.kind].weight.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("raw", [object(), 3.5, b"", b"\x00\x01 nonsense"])
def test_nonsense_is_a_data_error_of_one_sentence(name: str, raw: object) -> None:
    for method in (modality(name).source, modality(name).target):
        with pytest.raises(DataError) as caught:
            method(raw)
        assert 10 < len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_text_is_given_back_by_decode() -> None:
    text: Any = modalities()["text"]
    for raw in EXAMPLES["text"]:
        labels = text.target(raw).arrays["labels"]
        assert text.decode(labels.tolist()) == raw


@pytest.mark.parametrize("name", ["image", "audio", *EXTERNAL])
def test_codes_are_given_back_by_decode(name: str) -> None:
    own = modality(name)
    for raw in EXAMPLES[name.split()[0]]:
        tokens = own.target(raw)
        codes = torch.from_numpy(tokens.arrays["codes"])
        assert 0 <= int(codes.min()) and int(codes.max()) < own.codec.config.codebook_size
        decoded = own.decode(codes)
        if name.startswith("image"):
            assert decoded.size == (own.side, own.side) and decoded.mode == "RGB"
        else:
            assert decoded.shape == (len(tokens) * own.hop,) and np.isfinite(decoded).all()


def test_numbers_are_given_back_by_their_scale() -> None:
    numbers: Any = modalities()["numbers"]
    arrays = numbers.target({"mass": 12.5}).arrays
    centre, spread, *_ = arrays["units"][0]
    assert centre + spread * arrays["values"][0] == pytest.approx(12.5, rel=1e-5)


FOR_IMAGES = {"modalities": ["image_out"], "intermediate_size": 48, "num_experts": 4, "top_k": 2, "balance": "none"}
FOR_AUDIO = {**FOR_IMAGES, "modalities": ["audio"], "num_experts": 2, "top_k": 1}


@pytest.mark.parametrize("lora", [None, {"r": 8}, {"r": 4, "targets": ["q_proj", "o_proj"]}])
@pytest.mark.parametrize("added", [[], [FOR_IMAGES], [FOR_IMAGES, FOR_AUDIO]])
def test_all_parameters_are_counted(added: list[dict[str, Any]], lora: dict[str, Any] | None) -> None:
    experts = [ModalityExpertsConfig(**one, lora=lora) for one in added]
    with torch.device("meta"):
        model = Omni(BACKBONE.model_copy(update={"modality_experts": experts}), modalities())
    total, active = model.count_parameters()
    assert total == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < active < total
