"""The whole model: packing changes nothing, hidden codes do not leak, padding does not matter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openm6.data.prepare import example_sequence
from openm6.evaluate.likelihood import sequence_nll
from openm6.modalities.batch import PackedExample, build_sequence, collate
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import source_segments, target_segment
from openm6.models.omni import Omni
from openm6.tasks.registry import TASKS
from tests.small_model import demo_sources, modalities, omni

PICKED = (
    ("text_to_image", "digits"),
    ("image_classification", "digits"),
    ("image_inpainting", "emoji"),
    ("audio_inpainting", "spoken"),
    ("image_to_audio", "spoken_digits"),
    ("speech_recognition", "spoken"),
    ("tabular_regression", "penguins"),
    ("time_series_forecasting", "weather"),
    ("audio_regression", "spoken"),
    ("text_generation", "poems"),
)


@pytest.fixture(scope="module")
def model() -> Omni:
    return omni()


@pytest.fixture(scope="module")
def sequences() -> list[PackedExample]:
    return examples()


def examples(stem: str = "linear") -> list[PackedExample]:
    """One training example of every kind of target."""
    found = []
    for number, (task, source) in enumerate(PICKED):
        rng = np.random.default_rng(number)
        example = TASKS[task].example(demo_sources()[source][number], rng, train=True)
        found.append(example_sequence(example, modalities(stem=stem), rng))
    return found


def nll(model: Omni, rows: list[list[PackedExample]], length: int) -> torch.Tensor:
    batch = collate(rows, length)
    found = torch.zeros(batch.num_examples)
    for part in model.compute_loss(batch)[0].values():
        found.index_add_(0, part.example, part.nll)
    return found


def test_a_packed_example_is_judged_as_alone(model: Omni, sequences: list[PackedExample]) -> None:
    alone = torch.cat([nll(model, [[sequence]], len(sequence)) for sequence in sequences])
    packed = nll(model, [sequences[:4], sequences[4:7], sequences[7:]], 512)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-3)
    assert float(alone.min()) > 1, "each example must have something to be wrong about"


def test_order_and_neighbours_do_not_matter(model: Omni, sequences: list[PackedExample]) -> None:
    forth, back = (sequence_nll(model, found) for found in (sequences, sequences[::-1]))
    np.testing.assert_allclose(forth, back[::-1], rtol=1e-5)


def test_padding_does_not_matter(model: Omni, sequences: list[PackedExample]) -> None:
    short = nll(model, [[sequences[0]]], len(sequences[0]))
    for length in (len(sequences[0]) + 1, 300):
        torch.testing.assert_close(nll(model, [[sequences[0]], []], length), short, rtol=1e-5, atol=1e-3)


def image_target(seed: int) -> Segment:
    values = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return target_segment(Part("image", values), modalities(), np.random.default_rng(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hidden_codes_do_not_leak(model: Omni, seed: int) -> None:
    """Codes of hidden places, and the truth of all places, change no hidden state; shown ones do."""
    source = source_segments([Part("text", "draw it")], modalities())
    target = image_target(seed)
    hidden = target.arrays["is_masked"]
    size = modalities()["image"].codec.config.codebook_size  # type: ignore[attr-defined]

    def states(arrays: dict[str, np.ndarray]) -> torch.Tensor:
        sequence = build_sequence([*source, replace(target, arrays={**target.arrays, **arrays})])
        batch = collate([[sequence]], len(sequence))
        return model(batch.groups, batch.meta)[0]

    plain = states({})
    other = (target.arrays["shown"] + 1) % size
    unseen = np.where(hidden[:, None], other, target.arrays["shown"])
    assert torch.equal(states({"shown": unseen, "codes": other}), plain)
    if not hidden.all():
        seen = np.where(hidden[:, None], target.arrays["shown"], other)
        assert not torch.equal(states({"shown": seen}), plain)


def test_nothing_to_learn_gives_no_loss(model: Omni) -> None:
    sequence = build_sequence(source_segments([Part("text", "hello")], modalities()))
    assert model.compute_loss(collate([[sequence]], 16))[0] == {}


def test_the_wanted_number_does_not_leak(model: Omni) -> None:
    found = []
    for value in (1.0, 9.0):
        segments = source_segments([Part("text", "what is the mass?")], modalities())
        target = target_segment(Part("numbers", {"mass": value}), modalities())
        batch = collate([[build_sequence([*segments, target])]], 64)
        found.append(model(batch.groups, batch.meta)[0])
    assert torch.equal(found[0], found[1])


def test_later_words_do_not_leak(model: Omni) -> None:
    segments = source_segments([Part("text", "say")], modalities())
    found, ids = [], []
    for words in ("seven apples", "seven pears!"):
        target = target_segment(Part("text", words), modalities())
        batch = collate([[build_sequence([*segments, target])]], 48)
        found.append(model(batch.groups, batch.meta)[0])
        ids.append(target.arrays["ids"].tolist())
    alike = next(place for place, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
    same = len(segments[0]) + alike
    assert alike > 2
    # Rows of other lengths are summed in another order: equal to rounding, where a leak would differ by tenths.
    torch.testing.assert_close(found[0][:, :same], found[1][:, :same], rtol=0, atol=1e-5)
    assert not torch.allclose(found[0][:, same], found[1][:, same])


def test_a_name_carries_its_words(model: Omni) -> None:
    found = []
    for column in ("mass", "length"):
        tokens = modalities()["numbers"].source({column: None})
        batch = collate([[build_sequence([tokens])]], 1)
        found.append(model.embed(batch.groups, 1, 1))
    assert not torch.equal(found[0], found[1])


def test_training_minimises_the_training_loss_and_judging_the_likelihood(
    sequences: list[PackedExample],
) -> None:
    model = omni()
    batch = collate([[sequences[0]]], 256)
    likelihood = model.compute_loss(batch)[0]["image_out"].nll
    model.train()
    trained = model.compute_loss(batch)[0]["image_out"].nll
    groups = modalities()["image"].codec.config.groups  # type: ignore[attr-defined]
    assert float(trained.mean()) < float(likelihood.mean()) / (groups - 1), "a mean over groups, not their sum"


def test_gradients_reach_every_adapter(sequences: list[PackedExample]) -> None:
    model = omni().requires_grad_(True).train()
    images = (image_target(seed) for seed in range(20))
    partly = next(tokens for tokens in images if not tokens.arrays["is_masked"].all())
    sequences = [build_sequence([partly]), *sequences]
    losses, _ = model.compute_loss(collate([sequences[:4], sequences[4:7], sequences[7:]], 512))
    sum(part.total for part in losses.values()).backward()
    silent = [name for name, p in model.adapters.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # No column has simple predictors here: tests/modalities/test_numbers.py.
    predicted = ("numbers_out.features", "numbers_out.weights", "numbers_out.direct")
    assert [name for name in silent if not name.startswith(predicted)] == []


HOST_READS = ("nonzero", "_local_scalar_dense", "lift_fresh", "unique", "masked_select")


class HostReads(TorchDispatchMode):
    """Notes operations for which a GPU would make the host wait, and tensors made from numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        masks = args[1] if name == "aten.index.Tensor" else []
        if any(word in name for word in HOST_READS) or any(m is not None and m.dtype == torch.bool for m in masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stem", ["linear", "conv"])
def test_a_loss_makes_no_gpu_wait(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters, forward and backward; the backbone, which has paths of its own on a GPU, is tested there."""
    model, sequences = omni(stem=stem).requires_grad_(True).train(), examples(stem)
    batch = collate([sequences[:4], sequences[4:7], sequences[7:]], 512)
    hidden, loads = model(batch.groups, batch.meta)

    def no_list(tensor: torch.Tensor) -> None:
        raise AssertionError("a tensor became a list")

    with monkeypatch.context() as patched, HostReads() as reads:
        patched.setattr(torch.Tensor, "tolist", no_list)
        embedded = model.embed(batch.groups, batch.meta.batch, batch.meta.length)
        patched.setattr(model, "forward", lambda groups, meta: (hidden + 0 * embedded, loads))
        losses, _ = model.compute_loss(batch)
        total = sum((part.total for part in losses.values()), start=embedded.new_zeros(()))
        total.backward()
    assert reads.found == [] and len(losses) == 5


def test_the_tokens_judged_are_those_with_a_weight(model: Omni, sequences: list[PackedExample]) -> None:
    batch = collate([sequences[:4], sequences[4:7], sequences[7:]], 512)
    losses, _ = model.compute_loss(batch)
    for name, kind in batch.groups.items():
        chosen = kind.weight != 0
        if name in losses:
            assert torch.equal(losses[name].weight, kind.weight[chosen])
            assert torch.equal(losses[name].example, kind.example[chosen])
        else:
            assert not chosen.any()
