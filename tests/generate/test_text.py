"""Text from the cache equals text from a naive twin; a row alone equals the row in a crowd."""

from __future__ import annotations

import pytest
import torch

from openm6.generate.load import Loaded
from openm6.generate.prompt import Prompt, read_prompts
from openm6.generate.sampling import Sampling
from openm6.generate.text import write
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part, Segment, line
from openm6.modalities.registry import source_segments
from openm6.modalities.text import HOLE, START, Text, TextAdapter
from tests.small_model import demo_sources, loaded, modalities

STEPS = 12


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(3)


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    """Ragged: a picture, a sound, long and short texts, numbers, and nothing at all."""
    parts = [
        [Part("image", demo_sources()["digits"][0]["image"]), Part("text", " What is this?")],
        [Part("sound", demo_sources()["spoken"][0]["audio"])],
        [Part("text", "hi")],
        [Part("text", "a longer prompt, with many words in it " * 3)],
        [Part("numbers", {"mass": 3.0, "length": None})],
        [],
    ]
    return [source_segments(found, modalities()) for found in parts]


def naive(model: Loaded, prompt: Prompt, steps: int) -> str:
    """Greedy decoding without a cache: the whole sequence anew for each token."""
    text = model.text
    ids: list[int] = [text.start]
    for _ in range(steps):
        arrays = {"ids": torch.tensor(ids).numpy(), "labels": torch.tensor(ids).numpy()}
        wanted = Segment("text", arrays, line(len(ids)), len(ids), arrays["ids"] >= 0, "causal")
        sequence = build_sequence([*prompt, wanted])
        batch = collate([[sequence]], len(sequence))
        logits = model.omni.text.logits(model.omni(batch.kinds, batch.layout)[0][0, -1])
        for token in range(text.first_mark, text.vocabulary_size):
            if token != text.end:
                logits[token] = float("-inf")
        ids.append(int(logits.argmax()))
        if ids[-1] == text.end:
            break
    return text.decode(ids)


def test_cached_equals_uncached(model: Loaded, prompts: list[Prompt]) -> None:
    found = write(model, prompts, Sampling(max_tokens=STEPS))
    assert found == [naive(model, prompt, STEPS) for prompt in prompts]
    assert len(set(found)) > 2, "the prompts must matter"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_alone_equals_the_row_in_a_crowd(
    model: Loaded, prompts: list[Prompt], temperature: float
) -> None:
    settings = Sampling(max_tokens=STEPS, temperature=temperature, seed=40)
    crowd = write(model, prompts, settings)
    for row, prompt in enumerate(prompts):
        alone = write(model, [prompt], settings.model_copy(update={"seed": 40 + row}))
        assert alone == [crowd[row]]


def test_seeds_matter_only_where_something_is_drawn(model: Loaded, prompts: list[Prompt]) -> None:
    def answers(temperature: float, seed: int) -> list[str]:
        return write(model, prompts[:1], Sampling(max_tokens=STEPS, temperature=temperature, seed=seed))

    assert answers(0.0, 1) == answers(0.0, 2)
    assert answers(1.0, 1) == answers(1.0, 1)
    assert len({answers(1.0, seed)[0] for seed in range(5)}) > 1


@pytest.mark.parametrize("mark", [START, HOLE])
def test_marks_are_never_written(prompts: list[Prompt], mark: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose most likely token is a mark at every step writes the text that is likely without it."""
    model = loaded(3)
    wanted = write(model, prompts, Sampling(max_tokens=4))
    forbidden = model.text.first_mark + mark
    decoded: list[int] = []
    plain_logits, plain_decode = TextAdapter.logits, Text.decode

    def logits(adapter: TextAdapter, hidden: torch.Tensor) -> torch.Tensor:
        scores = plain_logits(adapter, hidden).clone()
        scores[..., forbidden] = scores.max() + 100
        return scores

    def decode(text: Text, ids: list[int]) -> str:
        decoded.extend(ids)
        return plain_decode(text, ids)

    monkeypatch.setattr(TextAdapter, "logits", logits)
    monkeypatch.setattr(Text, "decode", decode)
    assert write(model, prompts, Sampling(max_tokens=4)) == wanted
    assert decoded and max(decoded) < model.text.first_mark


def test_the_end_ends_its_row_alone(model: Loaded, prompts: list[Prompt]) -> None:
    long = write(model, prompts, Sampling(max_tokens=STEPS))
    short = write(model, prompts, Sampling(max_tokens=2))
    for first, second in zip(short, long, strict=True):
        kept = first.rstrip("\ufffd")  # two tokens may end in the middle of a character
        assert second.startswith(kept)


def test_a_reading_can_be_taken_back(model: Loaded, prompts: list[Prompt]) -> None:
    reading = read_prompts(model.omni, prompts, 8)
    assert reading.batch == len(prompts) and reading.place.tolist() == [
        sum(piece.span for piece in prompt) for prompt in prompts
    ]
    grid = torch.zeros(1, 3)
    arrays = {"ids": torch.full((len(prompts),), model.text.start)}
    first = reading.run("text", arrays, reading.layout(1, grid))
    reading.forget()
    assert reading.cache.length == reading.read
    assert torch.equal(reading.run("text", arrays, reading.layout(1, grid)), first)
