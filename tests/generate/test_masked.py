"""Codes filled in parallel: given ones stay, all is settled in the steps given, each row is its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openm6.base.errors import ConfigError
from openm6.generate import masked
from openm6.generate.load import Loaded
from openm6.generate.masked import MaskedSampling, fill_codes
from openm6.generate.prompt import Prompt, Reading
from openm6.generate.run import read_decoding
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import source_segments
from tests.small_model import demo_sources, loaded, modalities

HOLES = ((0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.25, 1.0), (0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.625, 0.625))


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(5)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    words = ("draw the digit seven", "a", "a picture of something long and wide and high", "x")
    return [source_segments([Part("text", found)], modalities()) for found in words]


@pytest.fixture(scope="module")
def wanted(model: Loaded) -> list[Segment]:
    """Pictures with holes of several sizes."""
    return [
        model.image.target(demo_sources()["digits"][row]["image"], options={"hole": hole})
        for row, hole in enumerate(HOLES)
    ]


class Watch:
    """Notes which places were still unknown in each pass, and how many rows were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unknown: list[Tensor] = []
        self.rows: list[int] = []
        original = Reading.run

        def run(reading: Reading, kind: str, arrays: dict[str, Tensor], layout: Any) -> Tensor:
            self.unknown.append(arrays["hidden"].view(reading.batch, -1).clone())
            self.rows.append(reading.batch)
            return original(reading, kind, arrays, layout)

        monkeypatch.setattr(masked.Reading, "run", run)


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_given_codes_stay_and_all_is_settled_in_time(
    model: Loaded,
    prompts: list[Prompt],
    wanted: list[Segment],
    steps: int,
    order: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    found = fill_codes(model.omni, prompts, wanted, MaskedSampling(steps=steps, order=order))
    size = model.image.codec.codebook_size
    assert (
        found.shape == (4, 64, model.image.codec.groups) and 0 <= int(found.min()) <= int(found.max()) < size
    )
    for row, tokens in enumerate(wanted):
        hidden = tokens.arrays["hidden"]
        assert np.array_equal(found[row].numpy()[~hidden], tokens.arrays["codes"][~hidden])
    assert 1 <= len(watch.unknown) <= steps
    counts = torch.stack([unknown[:4].sum(1) for unknown in watch.unknown])
    assert counts[0].tolist() == [int(tokens.arrays["hidden"].sum()) for tokens in wanted]
    assert bool((counts.diff(dim=0)[counts[:-1] > 0] < 0).all()), "every step settles something"
    for before, after in zip(watch.unknown, watch.unknown[1:], strict=False):
        assert not bool((after & ~before).any()), "what is settled stays settled"


def test_the_true_codes_of_a_hole_are_never_read(
    model: Loaded, prompts: list[Prompt], wanted: list[Segment]
) -> None:
    other = [
        replace(t, arrays={**t.arrays, "codes": np.where(t.arrays["hidden"][:, None], 7, t.arrays["codes"])})
        for t in wanted
    ]
    settings = MaskedSampling(steps=3)
    assert torch.equal(
        fill_codes(model.omni, prompts, wanted, settings), fill_codes(model.omni, prompts, other, settings)
    )


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_a_row_alone_equals_the_row_in_a_crowd(
    model: Loaded, prompts: list[Prompt], wanted: list[Segment], guidance: float
) -> None:
    settings = MaskedSampling(steps=4, guidance=guidance, seed=11)
    crowd = fill_codes(model.omni, prompts, wanted, settings)
    for row in range(len(prompts)):
        own = settings.model_copy(update={"seed": 11 + row})
        assert torch.equal(fill_codes(model.omni, [prompts[row]], [wanted[row]], own)[0], crowd[row])


def test_without_guidance_there_is_no_empty_prompt(
    model: Loaded, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    blanks = [model.image.blank() for _ in prompts]
    fill_codes(model.omni, prompts, blanks, MaskedSampling(steps=2, guidance=0.0))
    assert set(watch.rows) == {len(prompts)}
    fill_codes(model.omni, prompts, blanks, MaskedSampling(steps=2, guidance=1.0))
    assert watch.rows[-1] == 2 * len(prompts)


def test_guidance_towards_an_empty_prompt_changes_nothing(model: Loaded) -> None:
    """With the empty prompt on both sides, s + g (s - s) = s."""
    blank = [model.image.blank()]
    without, guided = (
        fill_codes(model.omni, [[]], blank, MaskedSampling(steps=3, guidance=guidance))
        for guidance in (0.0, 3.0)
    )
    assert torch.equal(without, guided)


def test_the_prompt_and_the_seed_matter(model: Loaded, prompts: list[Prompt]) -> None:
    def answer(prompt: Prompt, seed: int) -> Tensor:
        return fill_codes(model.omni, [prompt], [model.image.blank()], MaskedSampling(steps=3, seed=seed))

    assert torch.equal(answer(prompts[0], 1), answer(prompts[0], 1))
    assert not torch.equal(answer(prompts[0], 1), answer(prompts[0], 2))
    assert not torch.equal(answer(prompts[0], 1), answer(prompts[2], 1))


def test_sounds_are_filled_likewise(model: Loaded, prompts: list[Prompt]) -> None:
    raw = demo_sources()["spoken"][0]["audio"]
    tokens = model.sound.target(raw, options={"gap": (0.2, 0.5), "seconds": 1.2})
    found = fill_codes(model.omni, prompts[:1], [tokens], MaskedSampling(steps=4))[0].numpy()
    hidden = tokens.arrays["hidden"]
    assert np.array_equal(found[~hidden], tokens.arrays["codes"][~hidden])
    assert np.isfinite(model.sound.decode(torch.from_numpy(found))).all()


def test_temperature_zero_and_no_noise_need_no_seed(model: Loaded, prompts: list[Prompt]) -> None:
    found = [
        fill_codes(
            model.omni,
            prompts[:1],
            [model.image.blank()],
            MaskedSampling(steps=3, temperature=0, noise=0, seed=seed),
        )
        for seed in (1, 2)
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "words", ["masked.steps=0", "masked.step=3", "text.top_p=2", "masked.order=best", "masked"]
)
def test_settings_that_cannot_be_are_one_sentence(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_decoding([words])
    assert "\n" not in str(caught.value)
