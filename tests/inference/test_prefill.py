"""Prompts in slots: by themselves, packed, in parts and from the prefix cache they are what one pass gives."""

from __future__ import annotations

import pytest
import torch

from openm6.core.errors import ConfigError
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import PrefixCache, Prompt, prefill, prefill_all, prefill_packed
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.nn.cache import PackedWriter, SlotWriter
from tests.data.sample_images import png
from tests.small_model import loaded


def test_a_prompt_read_before_is_not_read_again(model: LoadedModel, prompts: list[Prompt]) -> None:
    cache = model.omni.backbone.new_cache(2, 64)
    memory = PrefixCache(10**6)
    first, again = (prefill(model.omni, prompts[0], cache, slot, memory) for slot in (0, 1))
    assert (first[0], again[0]) == (again[0], first[0]) and (first[1], again[1]) == (0, cache.lengths[0])
    length = cache.lengths[0]
    assert cache.lengths[1] == length > 0
    assert torch.equal(cache.keys[:, 0, :length], cache.keys[:, 1, :length])
    assert prefill(model.omni, prompts[1], cache, 1, memory)[1] == 0


def test_parts_read_one_by_one_are_as_if_read_at_once() -> None:
    model = loaded(prompt_attention="block")
    parts = (Part("text", "Look:"), Part("image", png("red", 40)), Part("text", " What is this?"))
    prompt = source_segments(parts, model.modalities)
    cache = model.omni.backbone.new_cache(2, 128)
    position, _ = prefill(model.omni, prompt, cache, 0)
    sequence = build_sequence(prompt)
    batch = collate([[sequence]], len(sequence))
    with torch.inference_mode():
        model.omni(batch.groups, batch.meta, SlotWriter(cache, 1))
    assert position == sum(segment.span for segment in prompt) and cache.lengths == [len(sequence)] * 2
    for whole in (cache.keys[..., : len(sequence), :, :], cache.values[..., : len(sequence), :, :]):
        torch.testing.assert_close(whole[:, 0], whole[:, 1], rtol=1e-4, atol=1e-4)


def test_a_second_question_about_an_image_reads_its_own_tokens_alone() -> None:
    model = loaded(prompt_attention="block")
    image = Part("image", png("red", 40))
    first, second = (
        source_segments((image, Part("text", words)), model.modalities) for words in (" What?", " And why?")
    )
    cache = model.omni.backbone.new_cache(3, 128)
    memory = PrefixCache(10**6)
    assert prefill(model.omni, first, cache, 0, memory)[1] == 0
    assert prefill(model.omni, second, cache, 1, memory)[1] == len(second[0])
    prefill(model.omni, second, cache, 2)
    length = cache.lengths[2]
    assert cache.lengths[1] == length == sum(map(len, second))
    assert torch.equal(cache.keys[:, 1, :length], cache.keys[:, 2, :length])
    assert torch.equal(cache.values[:, 1, :length], cache.values[:, 2, :length])
    other = source_segments((Part("image", png("blue", 40)), Part("text", " What?")), model.modalities)
    assert prefill(model.omni, other, cache, 0, memory)[1] == 0, "the same words after another image"


def test_prompts_read_together_are_as_if_read_alone(model: LoadedModel, prompts: list[Prompt]) -> None:
    asked = [prompts[0], prompts[1], prompts[0], prompts[2]]
    cache, alone = (model.omni.backbone.new_cache(6, 64) for _ in range(2))
    memory = PrefixCache(10**6)
    prefill(model.omni, prompts[2], cache, 0, memory)  # known before, so only copied
    found = prefill_packed(model.omni, asked, cache, [1, 2, 3, 4], memory)
    for slot, (prompt, (position, known)) in enumerate(zip(asked, found, strict=True), 1):
        assert position == prefill(model.omni, prompt, alone, slot)[0]
        length = alone.lengths[slot]
        assert cache.lengths[slot] == length and known == (length if slot in (3, 4) else 0)
        for packed, single in ((cache.keys, alone.keys), (cache.values, alone.values)):
            torch.testing.assert_close(packed[:, slot, :length], single[:, slot, :length], rtol=1e-4, atol=1e-5)
    assert torch.equal(cache.keys[:, 3], cache.keys[:, 1])


def test_a_packed_prompt_too_long_for_its_slot_is_refused(model: LoadedModel, prompts: list[Prompt]) -> None:
    cache = model.omni.backbone.new_cache(2, 2)
    with pytest.raises(ConfigError, match="make slots larger"):
        prefill_packed(model.omni, prompts[:2], cache, [0, 1], PrefixCache(10**6))


@pytest.mark.parametrize("writer", [PackedWriter, SlotWriter])
def test_a_reading_that_fails_half_way_leaves_empty_slots(
    model: LoadedModel, prompts: list[Prompt], writer: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: PackedWriter | SlotWriter, layer: int, key: torch.Tensor, value: torch.Tensor) -> object:
        if layer == 1:
            raise RuntimeError("out of luck")
        return whole(self, layer, key * float("nan"), value)

    whole = writer.write
    cache = model.omni.backbone.new_cache(3, 64)
    memory = PrefixCache(10**6)
    prefill(model.omni, prompts[3], cache, 2, memory)
    kept = cache.take(2)
    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(RuntimeError, match="out of luck"):
        if writer is PackedWriter:
            prefill_packed(model.omni, prompts[:2], cache, [0, 1], memory)
        else:
            prefill(model.omni, prompts[0], cache, 0, memory)
    assert cache.lengths[:2] == [0, 0] and len(memory.entries) == 1
    assert not cache.keys[:, :2].any() and not cache.values[:, :2].any(), "nothing, not even NaN"
    assert all(torch.equal(part, again) for part, again in zip(kept, cache.take(2), strict=True))


def test_all_prompts_are_read_in_bounded_passes(
    model: LoadedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*prompts, [], prompts[1]]
    cache, alone = (model.omni.backbone.new_cache(len(asked) + 1, 64) for _ in range(2))
    cache.lengths[6] = 3  # what an earlier prompt left
    passes: list[int] = []
    plain = prefill_packed

    def watched(omni, few, *rest):
        passes.append(len(few))
        return plain(omni, few, *rest)

    monkeypatch.setattr("openm6.inference.prefill.prefill_packed", watched)
    monkeypatch.setattr("openm6.inference.prefill.PACKED_TOKENS", 24)
    positions = prefill_all(model.omni, asked, cache, 1)
    assert sum(passes) == len(asked) and len(passes) > 1
    for slot, (prompt, position) in enumerate(zip(asked, positions, strict=True), 1):
        assert position == prefill(model.omni, prompt, alone, slot)[0]
        length = alone.lengths[slot]
        assert cache.lengths[slot] == length == sum(map(len, prompt))
        for packed, single in ((cache.keys, alone.keys), (cache.values, alone.values)):
            torch.testing.assert_close(packed[:, slot, :length], single[:, slot, :length], rtol=1e-4, atol=1e-5)
