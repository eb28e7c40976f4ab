"""Canvases at different steps share passes, and each becomes what it becomes alone."""

from __future__ import annotations

import pytest
import torch

from openm6.generate.canvases import Canvas, advance
from openm6.generate.decode import Speaker
from openm6.generate.load import Loaded
from openm6.generate.masked import MaskedSampling, fill_codes
from openm6.generate.reading import read_into
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import source_segments
from tests.small_model import demo_sources, loaded

SETTINGS = (
    MaskedSampling(steps=4, guidance=2.0, seed=1),
    MaskedSampling(steps=3, guidance=0.0, seed=2),
    MaskedSampling(steps=6, guidance=1.0, temperature=0.0, order="random", seed=3),
    MaskedSampling(steps=2, guidance=2.0, temperature=0.5, seed=4),
)
WORDS = ("draw the digit seven", "a", "a picture of something long", "x")


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(5)


def wanted(model: Loaded, kind: str) -> list[Segment]:
    if kind == "sound":
        return [model.sound.blank() for _ in WORDS]
    hole = {"hole": (0.25, 0.0, 0.75, 1.0)}
    given = model.image.target(demo_sources()["digits"][0]["image"], options=hole)
    return [given, *(model.image.blank() for _ in WORDS[1:])]


@pytest.mark.parametrize("kind", ["image", "sound"])
def test_each_becomes_what_it_becomes_alone(model: Loaded, kind: str) -> None:
    cache = Speaker.of(model.omni, model.text).new_slots(4, 64)
    pieces = wanted(model, kind)
    prompts = [source_segments([Part("text", words)], model.modalities) for words in WORDS]
    waiting: list[Canvas] = []
    for number, prompt in enumerate(prompts):
        place, _ = read_into(model.omni, prompt, cache, number)
        waiting.append(Canvas.of(number, pieces[number], SETTINGS[number], number, place, "cpu"))
    everyone, live = list(waiting), [waiting.pop(0)]
    while live:
        done = advance(model.omni, cache, live)
        live = [canvas for canvas in live if canvas not in done] + waiting[:1]  # one joins at each step
        del waiting[:1]
    for canvas, prompt, piece, sampling in zip(everyone, prompts, pieces, SETTINGS, strict=True):
        assert canvas.step <= sampling.steps
        assert torch.equal(canvas.codes, fill_codes(model.omni, [prompt], [piece], sampling)[0])
