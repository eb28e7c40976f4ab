"""Texts that join and leave a batch are those that each has alone, for every kind of sampling, and those of the model
without a cache."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from openm6.inference import engine
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import ATTENTION, DecodeBatch, DecodeSequence
from openm6.inference.engine import generate_scored, generate_texts
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt, prefill
from openm6.inference.sampling import Sampling
from openm6.modalities.batch import build_sequence
from openm6.modalities.interface import Part
from openm6.modalities.registry import opened, source_segments, split_opening
from tests.data.sample_images import png
from tests.inference.reference import write_reference
from tests.inference.test_decode_graphs import Recording
from tests.sequences import meta_of
from tests.small_model import demo_sources, loaded, modalities

SAMPLINGS = (
    Sampling(max_tokens=12),
    Sampling(temperature=1.0, max_tokens=5, seed=2),
    Sampling(temperature=0.8, top_k=20, max_tokens=20, seed=3),
    Sampling(temperature=1.0, top_p=0.7, max_tokens=9, seed=4),
    Sampling(temperature=0.7, top_k=30, top_p=0.9, repetition_penalty=1.5, max_tokens=14, seed=5),
)
STEPS = 12


@pytest.fixture(scope="module")
def ragged() -> list[Prompt]:
    """An image, a recording, long and short texts, numbers, and nothing at all."""
    parts = [
        [Part("image", demo_sources()["digits"][0]["image"]), Part("text", " What is this?")],
        [Part("audio", demo_sources()["spoken"][0]["audio"])],
        [Part("text", "hi")],
        [Part("text", "a longer prompt, with many words in it " * 3)],
        [Part("numbers", {"mass": 3.0, "length": None})],
        [],
    ]
    return [source_segments(found, modalities()) for found in parts]


def run_all(model: LoadedModel, prompts: list[Prompt], slots: int, batch_invariant: bool) -> dict[int, DecodeSequence]:
    """All prompts through few slots, a new one every other step."""
    rows = DecodeBatch(TextHead.of(model.omni, model.text), slots, 128, batch_invariant=batch_invariant)
    todo, done, steps = list(range(len(prompts))), {}, 0
    while todo or rows.rows:
        if todo and rows.free and steps % 2 == 0:
            index = todo.pop(0)
            position, _ = prefill(model.omni, prompts[index], rows.cache, rows.next_slot)
            rows.add(index, SAMPLINGS[index], position, model.text.start, top=2, prompt=prompts[index])
        for row in rows.step():
            done[row.key] = row
            rows.remove(row)
        steps += 1
    return done


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_row_in_a_crowd_writes_what_it_writes_alone(
    model: LoadedModel, prompts: list[Prompt], batch_invariant: bool
) -> None:
    done = run_all(model, prompts, 3, batch_invariant)
    for index, row in done.items():
        assert len(row.tokens) <= SAMPLINGS[index].max_tokens
        tokens = [token for token in row.tokens if token != model.text.end]
        assert model.text.decode(tokens) == generate_texts(model, [prompts[index]], SAMPLINGS[index])[0]


def test_a_sequence_of_nan_spoils_no_later_one(model: LoadedModel, prompts: list[Prompt]) -> None:
    sampling = Sampling(max_tokens=6)
    rows = DecodeBatch(TextHead.of(model.omni, model.text), 1, 128)
    for spoiled in (True, False):
        position, _ = prefill(model.omni, prompts[0], rows.cache, rows.next_slot)
        rows.add(0, sampling, position, model.text.start, prompt=prompts[0])
        if spoiled:
            rows.cache.keys.fill_(math.nan)
            rows.cache.values.fill_(math.nan)
        while not (ended := rows.step()):
            pass
        rows.remove(ended[0])
    tokens = [token for token in ended[0].tokens if token != model.text.end]
    assert model.text.decode(tokens) == generate_texts(model, [prompts[0]], sampling)[0]


@pytest.mark.parametrize("stepped", [True, False])
def test_a_sequence_of_nan_that_moves_leaves_none_behind(
    model: LoadedModel, prompts: list[Prompt], stepped: bool
) -> None:
    """Also one that is removed before its first step, as if it was cancelled."""
    rows = DecodeBatch(TextHead.of(model.omni, model.text), 2, 128)
    for slot, prompt in enumerate(prompts[:2]):
        position, _ = prefill(model.omni, prompt, rows.cache, slot)
        rows.add(slot, Sampling(max_tokens=6), position, model.text.start)
    first, spoiled = rows.rows
    rows.cache.keys[:, 1] = math.nan
    if stepped:
        rows.step()
    for row in (first, spoiled):
        rows.remove(row)
    assert not rows.cache.keys.isnan().any() and not rows.cache.values.isnan().any()


def test_scores_are_those_of_the_model_alone_to_the_last_bit(model: LoadedModel, prompts: list[Prompt]) -> None:
    crowd = run_all(model, prompts, 5, True)
    for index in (0, 3):
        alone = run_all(model, [prompts[index]], 5, True) if index == 0 else None
        if alone is not None:
            assert alone[0].scores == crowd[0].scores
    assert all(score <= 0 for row in crowd.values() for score, _ in row.scores)
    assert all(rivals[0][1] >= rivals[1][1] for row in crowd.values() for _, rivals in row.scores)


def test_texts_are_those_of_the_model_without_a_cache(model: LoadedModel, ragged: list[Prompt]) -> None:
    found = generate_texts(model, ragged, Sampling(max_tokens=STEPS))
    assert found == [write_reference(model, prompt, Sampling(max_tokens=STEPS)) for prompt in ragged]
    assert len(set(found)) > 2, "the prompts must matter"


def test_tokens_that_open_an_answer_take_none_of_its_length(model: LoadedModel, ragged: list[Prompt]) -> None:
    ids = tuple(model.text.encode("and so the answer of the model is:"))
    opened_prompts = [[*prompt[:-1], replace(prompt[-1], opening=ids)] for prompt in ragged if prompt]
    for most in (1, STEPS):
        found = generate_texts(model, opened_prompts, Sampling(max_tokens=most))
        assert found == [write_reference(model, one, Sampling(max_tokens=most)) for one in opened_prompts]


def test_a_causal_prompt_is_continued_from_its_last_token() -> None:
    """Parts keep their keys whatever follows, and no start token stands between the prompt and the text."""
    model = loaded(7, prompt_attention="causal")
    image = Part("image", png("red", 40))
    prompts = [
        source_segments(parts, model.modalities)
        for parts in ([Part("text", "draw the digit")], [image, Part("text", " What is")], [Part("text", "s")], [image])
    ]
    found = generate_texts(model, prompts, Sampling(max_tokens=STEPS))
    assert found == [write_reference(model, prompt, Sampling(max_tokens=STEPS)) for prompt in prompts]
    (segment,) = prompts[0]
    rest, opening = split_opening(prompts[0])
    assert opening == segment.arrays["ids"][-1] and len(rest[0]) == len(segment) - 1
    assert split_opening(prompts[2]) == ([], model.text.encode("s")[0]) and split_opening(prompts[3])[1] is None
    target = opened(model.text.target("seven"), opening)
    assert target.arrays["ids"][0] == opening
    order = meta_of(build_sequence([*rest, target])).attn_order[0].tolist()
    assert order == sorted(set(order)), "strictly causal"


def test_a_text_alone_equals_the_text_in_a_batch(
    model: LoadedModel, ragged: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BATCH", 4)  # fewer than there are prompts: some wait
    settings = Sampling(max_tokens=STEPS, temperature=1.0, seed=40)
    batch = generate_scored(model, ragged, settings)
    for row, prompt in enumerate(ragged):
        own = settings.model_copy(update={"seed": 40 + row})
        ((text, confidence),) = generate_scored(model, [prompt], own)
        assert text == batch[row][0] == write_reference(model, prompt, own)
        assert confidence == pytest.approx(batch[row][1], rel=1e-4)
        assert 0 < confidence <= 1
    assert generate_texts(model, [], settings) == []


def test_a_penalty_is_that_of_the_model_without_a_cache(model: LoadedModel, ragged: list[Prompt]) -> None:
    greedy = Sampling(max_tokens=STEPS, repetition_penalty=1.4)
    drawn = greedy.model_copy(update={"temperature": 0.8, "top_p": 0.9, "seed": 3})
    expected = [
        [write_reference(model, prompt, one.model_copy(update={"seed": one.seed + row})) for row, prompt in rows]
        for one in (greedy, drawn)
        for rows in [list(enumerate(ragged))]
    ]
    assert [generate_texts(model, ragged, one) for one in (greedy, drawn)] == expected
    assert generate_texts(model, ragged, Sampling(max_tokens=STEPS)) != expected[0]


def test_a_high_penalty_leaves_no_token_twice(model: LoadedModel, ragged: list[Prompt]) -> None:
    def written(penalty: float) -> list[list[int]]:
        found = []
        for prompt in ragged:
            rows = DecodeBatch(TextHead.of(model.omni, model.text), 1, 128)
            position, _ = prefill(model.omni, prompt, rows.cache, 0)
            sampling = Sampling(max_tokens=STEPS, repetition_penalty=penalty)
            row = rows.add(0, sampling, position, model.text.start, prompt=prompt)
            while row not in rows.step():
                pass
            found.append(row.tokens)
        return found

    assert any(len(set(tokens)) < len(tokens) for tokens in written(1.0)), "the model must repeat itself"
    assert all(len(set(tokens)) == len(tokens) for tokens in written(100.0))


def test_seeds_matter_only_if_something_is_drawn(model: LoadedModel, prompts: list[Prompt]) -> None:
    def answers(temperature: float, seed: int) -> list[str]:
        return generate_texts(model, prompts[:1], Sampling(max_tokens=STEPS, temperature=temperature, seed=seed))

    assert answers(0.0, 1) == answers(0.0, 2)
    assert answers(1.0, 1) == answers(1.0, 1)
    assert len({answers(1.0, seed)[0] for seed in range(5)}) > 1


@pytest.mark.parametrize("mark", ["start", "mask"])
def test_marks_are_never_generated(prompts: list[Prompt], mark: str) -> None:
    """A model whose most likely token is a mark generates the text that is likely without it."""
    model = loaded(3)
    text_head = TextHead.of(model.omni, model.text)
    forbidden = getattr(model.text, mark)
    found = []
    for factor in (1.0, 100.0, -100.0):  # by its sign, one of the last two makes the mark most likely
        head = text_head.head.clone()
        head[forbidden] *= factor
        rows = DecodeBatch(replace(text_head, head=head), 1, 64)
        position, _ = prefill(model.omni, prompts[0], rows.cache, 0)
        row = rows.add(0, Sampling(max_tokens=4), position, model.text.start)
        while row not in rows.step():
            pass
        found.append(row.tokens)
    assert found[0] == found[1] == found[2]


def test_replayed_passes_of_few_sizes_are_those_that_run(
    model: LoadedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, but for the recording: rows and keys are padded to the sizes of graphs."""
    expected = run_all(model, prompts, 8, False)
    sizes = set()

    def captured(batch: DecodeBatch, *size: Any) -> Recording:
        sizes.add(size)
        return Recording(batch, *size)

    monkeypatch.setattr(DecodeBatch, "_captured", captured)
    monkeypatch.setattr(DecodeBatch, "graphed", property(lambda self: True, lambda self, found: None), raising=False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    found = run_all(model, prompts, 7, False)
    assert {index: row.tokens for index, row in found.items()} == {i: row.tokens for i, row in expected.items()}
    assert {rows for rows, _, _ in sizes} == {1, 8} and {keys for _, keys, _ in sizes} == {128}


def test_graphs_leave_cudnn_out() -> None:
    assert SDPBackend.CUDNN_ATTENTION not in ATTENTION
