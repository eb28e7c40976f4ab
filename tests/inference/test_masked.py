"""Masked-parallel decoding: given codes stay, all is settled in the steps given, each of a batch is as alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openm6.core.errors import ConfigError
from openm6.inference import masked
from openm6.inference.load import LoadedModel
from openm6.inference.masked import MaskedDecodeState, decode_masked
from openm6.inference.prefill import Prompt, prefill
from openm6.inference.sampling import MaskedSampling, read_decoding
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import source_segments
from tests.inference.reference import decode_masked_reference
from tests.small_model import demo_sources, loaded, modalities

BOXES = ((0.25, 0.25, 0.75, 0.75), (0.0, 0.0, 0.25, 1.0), (0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.625, 0.625))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(5)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    words = ("draw the digit seven", "a", "an image of something long and wide and high", "x")
    return [source_segments([Part("text", found)], modalities()) for found in words]


@pytest.fixture(scope="module")
def targets(model: LoadedModel) -> list[Segment]:
    """Images with masks of several sizes."""
    return [
        model.image.target(demo_sources()["digits"][row]["image"], options={"mask_box": mask_box})
        for row, mask_box in enumerate(BOXES)
    ]


class Watch:
    """Notes which positions were still masked in each pass, and how many rows it had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unknown: list[dict[int, Tensor]] = []
        self.rows: list[int] = []
        masked_step, run_block = masked.masked_step, masked.run_block

        def watched(omni: Any, cache: Any, states: list[MaskedDecodeState]) -> list[MaskedDecodeState]:
            self.unknown.append({state.key: state.unknown for state in states})
            return masked_step(omni, cache, states)

        def run(omni: Any, cache: Any, slots: list[int | None], *rest: Any) -> Tensor:
            self.rows.append(len(slots))
            return run_block(omni, cache, slots, *rest)

        monkeypatch.setattr(masked, "masked_step", watched)
        monkeypatch.setattr(masked, "run_block", run)


@pytest.mark.parametrize("order", ["confidence", "random"])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_given_codes_stay_and_all_is_settled_in_time(
    model: LoadedModel,
    prompts: list[Prompt],
    targets: list[Segment],
    steps: int,
    order: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    found = decode_masked(model.omni, prompts, targets, MaskedSampling(steps=steps, order=order))
    size = model.image.codec.config.codebook_size
    assert found.shape == (4, 64, model.image.codec.config.groups) and 0 <= int(found.min()) <= int(found.max()) < size
    for row, tokens in enumerate(targets):
        hidden = tokens.arrays["is_masked"]
        assert np.array_equal(found[row].numpy()[~hidden], tokens.arrays["codes"][~hidden])
    assert 1 <= len(watch.unknown) <= steps
    for row, tokens in enumerate(targets):
        seen = [passed[row] for passed in watch.unknown if row in passed]
        counts = [int(unknown.sum()) for unknown in seen]
        assert counts[0] == int(tokens.arrays["is_masked"].sum())
        assert counts == sorted(set(counts), reverse=True), "every step settles something"
        for before, after in pairwise(seen):
            assert not bool((after & ~before).any()), "what is settled stays settled"


def test_the_true_codes_of_a_mask_are_never_used(
    model: LoadedModel, prompts: list[Prompt], targets: list[Segment]
) -> None:
    other = [
        replace(t, arrays={**t.arrays, "codes": np.where(t.arrays["is_masked"][:, None], 7, t.arrays["codes"])})
        for t in targets
    ]
    settings = MaskedSampling(steps=3)
    assert torch.equal(
        decode_masked(model.omni, prompts, targets, settings),
        decode_masked(model.omni, prompts, other, settings),
    )


SETTINGS = (
    MaskedSampling(steps=4, guidance=2.0, unprompted_every=3, seed=1),
    MaskedSampling(steps=3, guidance=0.0, seed=2),
    MaskedSampling(steps=6, guidance=1.0, unprompted_every=1, temperature=0.0, order="random", seed=3),
    MaskedSampling(steps=2, guidance=2.0, temperature=0.5, seed=4),
)


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_each_of_a_batch_is_what_it_is_alone(
    model: LoadedModel, prompts: list[Prompt], targets: list[Segment], kind: str
) -> None:
    """States that join at different steps, with settings of their own, against one pass per step without a cache."""
    segments = targets if kind == "image" else [model.audio.blank() for _ in prompts]
    cache = model.omni.backbone.new_cache(4, 64)
    waiting: list[MaskedDecodeState] = []
    for index, prompt in enumerate(prompts):
        position, _ = prefill(model.omni, prompt, cache, index)
        waiting.append(MaskedDecodeState(index, segments[index], SETTINGS[index], index, position, "cpu"))
    everyone, live = list(waiting), [waiting.pop(0)]
    while live:
        done = masked.masked_step(model.omni, cache, live)
        live = [state for state in live if state not in done] + waiting[:1]  # one joins at each step
        del waiting[:1]
    for state, prompt, segment, sampling in zip(everyone, prompts, segments, SETTINGS, strict=True):
        assert state.step <= sampling.steps
        assert torch.equal(state.codes, decode_masked(model.omni, [prompt], [segment], sampling)[0])
        assert torch.equal(state.codes, decode_masked_reference(model, prompt, segment, sampling))


def test_row_i_draws_from_seed_plus_i(model: LoadedModel, prompts: list[Prompt], targets: list[Segment]) -> None:
    settings = MaskedSampling(steps=4, seed=11)
    batch = decode_masked(model.omni, prompts, targets, settings)
    for row in range(len(prompts)):
        own = settings.model_copy(update={"seed": 11 + row})
        assert torch.equal(decode_masked(model.omni, [prompts[row]], [targets[row]], own)[0], batch[row])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"guidance": 0.0}, [2] * 5),
        ({"unprompted_every": 1}, [4] * 5),
        ({"unprompted_every": 2}, [4, 2, 4, 2, 4]),
        ({"unprompted_every": 3}, [2, 4, 2, 2, 4]),
        ({"unprompted_every": 9}, [2, 2, 2, 2, 4]),
    ],
)
def test_the_pass_without_the_prompt_runs_in_every_nth_step_and_in_the_last(
    model: LoadedModel, prompts: list[Prompt], settings: Any, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, sampling = Watch(monkeypatch), MaskedSampling(steps=5, **settings)
    decode_masked(model.omni, prompts[:2], [model.image.blank()] * 2, sampling)
    assert watch.rows == rows
    assert sampling.passes * 2 == sum(rows)


def test_the_head_runs_on_masked_positions_alone(
    model: LoadedModel, prompts: list[Prompt], targets: list[Segment], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, adapter, heads = Watch(monkeypatch), model.omni.adapter("image_out"), list[int]()
    group_logits = adapter.group_logits

    def counted(hidden: Tensor, *rest: Any) -> Tensor:
        heads.append(len(hidden))
        return group_logits(hidden, *rest)

    monkeypatch.setattr(adapter, "group_logits", counted)
    decode_masked(model.omni, prompts, targets, MaskedSampling(steps=4, unprompted_every=1))
    masked_positions = [int(sum(unknown.sum() for unknown in passed.values())) for passed in watch.unknown]
    assert heads == [2 * count for count in masked_positions for _ in range(adapter.groups)]


def test_guidance_towards_an_empty_prompt_changes_nothing(model: LoadedModel) -> None:
    """With the empty prompt on both sides, s + g (s - s) = s."""
    blank = [model.image.blank()]
    without, guided = (
        decode_masked(model.omni, [[]], blank, MaskedSampling(steps=3, guidance=guidance, unprompted_every=1))
        for guidance in (0.0, 3.0)
    )
    assert torch.equal(without, guided)


def test_the_prompt_and_the_seed_matter(model: LoadedModel, prompts: list[Prompt]) -> None:
    def answer(prompt: Prompt, seed: int) -> Tensor:
        return decode_masked(model.omni, [prompt], [model.image.blank()], MaskedSampling(steps=3, seed=seed))

    assert torch.equal(answer(prompts[0], 1), answer(prompts[0], 1))
    assert not torch.equal(answer(prompts[0], 1), answer(prompts[0], 2))
    assert not torch.equal(answer(prompts[0], 1), answer(prompts[2], 1))


def test_audio_clips_are_filled_likewise(model: LoadedModel, prompts: list[Prompt]) -> None:
    raw = demo_sources()["spoken"][0]["audio"]
    tokens = model.audio.target(raw, options={"mask_span": (0.2, 0.5), "seconds": 1.2})
    found = decode_masked(model.omni, prompts[:1], [tokens], MaskedSampling(steps=4))[0].numpy()
    hidden = tokens.arrays["is_masked"]
    assert np.array_equal(found[~hidden], tokens.arrays["codes"][~hidden])
    assert np.isfinite(model.audio.decode(torch.from_numpy(found))).all()


def test_temperature_zero_and_no_noise_need_no_seed(model: LoadedModel, prompts: list[Prompt]) -> None:
    found = [
        decode_masked(
            model.omni,
            prompts[:1],
            [model.image.blank()],
            MaskedSampling(steps=3, temperature=0, noise=0, seed=seed),
        )
        for seed in (1, 2)
    ]
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("words", ["masked.steps=0", "masked.step=3", "text.top_p=2", "masked.order=best", "masked"])
def test_settings_that_cannot_be_are_one_sentence(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_decoding([words])
    assert "\n" not in str(caught.value)
