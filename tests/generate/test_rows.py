"""Rows that come and go give what each gives alone, for every way of drawing."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from openm6.base.errors import ConfigError
from openm6.generate.decode import DecodeStep, Speaker, meets_all_experts
from openm6.generate.graphs import ATTENTION, GraphedRows
from openm6.generate.load import Loaded
from openm6.generate.matrices import QuantizedMatrix, QuantizedStack, stack_of
from openm6.generate.prompt import Prompt, read_prompts
from openm6.generate.reading import PromptMemory, read_into, read_together
from openm6.generate.rows import Row, TextRows
from openm6.generate.sampling import Sampling
from openm6.generate.text import write
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.experts import Experts
from openm6.nn.slots import PackedWriter, SlotWriter
from openm6.ops.sequence import causal_meta
from tests.data.pictures import png
from tests.small_model import loaded

WORDS = ("draw the digit seven", "a", "a picture of something long", "x", "What is this?")
SAMPLINGS = (
    Sampling(max_tokens=12),
    Sampling(temperature=1.0, max_tokens=5, seed=2),
    Sampling(temperature=0.8, top_k=20, max_tokens=20, seed=3),
    Sampling(temperature=1.0, top_p=0.7, max_tokens=9, seed=4),
    Sampling(temperature=0.7, top_k=30, top_p=0.9, max_tokens=14, seed=5),
)
SHAPES = {
    "experts": {"experts": ExpertsConfig(hidden=32, num_experts=4, top_k=2)},
    "many experts": {"experts": ExpertsConfig(hidden=32, num_experts=16, top_k=2)},
    "prototypes": {"experts": ExpertsConfig(hidden=32, num_experts=8, num_prototypes=2, ffn="gelu")},
    "shared": {"experts": ExpertsConfig(hidden=32, num_experts=4, top_k=1, num_shared=1)},
    "dense": {"dense": DenseConfig(hidden=64), "qk_norm": False},
    "shared sets": {"experts": ExpertsConfig(hidden=32, num_experts=4, top_k=2), "sharing": "all"},
}


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(5)


@pytest.fixture(scope="module")
def prompts(model: Loaded) -> list[Prompt]:
    return [source_segments([Part("text", words)], model.modalities) for words in WORDS]


def run_all(model: Loaded, prompts: list[Prompt], slots: int, deterministic: bool) -> dict[int, Row]:
    """All prompts through few slots, a new one every other step."""
    rows = TextRows(Speaker.of(model.omni, model.text), slots, 128, deterministic=deterministic)
    todo, done, steps = list(range(len(prompts))), {}, 0
    while todo or rows.rows:
        if todo and rows.free and steps % 2 == 0:
            number = todo.pop(0)
            place, _ = read_into(model.omni, prompts[number], rows.cache, rows.next_slot)
            rows.add(number, SAMPLINGS[number], place, model.text.start, top=2)
        for row in rows.step():
            done[row.key] = row
            rows.remove(row)
        steps += 1
    return done


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_row_in_a_crowd_writes_what_it_writes_alone(
    model: Loaded, prompts: list[Prompt], deterministic: bool
) -> None:
    done = run_all(model, prompts, 3, deterministic)
    for number, row in done.items():
        assert len(row.tokens) <= SAMPLINGS[number].max_tokens
        tokens = [token for token in row.tokens if token != model.text.end]
        assert model.text.decode(tokens) == write(model, [prompts[number]], SAMPLINGS[number])[0]


def test_scores_are_those_of_the_model_alone_to_the_last_bit(model: Loaded, prompts: list[Prompt]) -> None:
    crowd = run_all(model, prompts, 5, True)
    for number in (0, 3):
        alone = run_all(model, [prompts[number]], 5, True) if number == 0 else None
        if alone is not None:
            assert alone[0].scores == crowd[0].scores
    assert all(score <= 0 for row in crowd.values() for score, _ in row.scores)
    assert all(rivals[0][1] >= rivals[1][1] for row in crowd.values() for _, rivals in row.scores)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fixed", [False, True])
@torch.inference_mode()
def test_the_step_is_the_backbone(shape: dict, fixed: bool) -> None:
    torch.manual_seed(0)
    config = BackboneConfig(width=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, **shape)
    backbone = Backbone(config).requires_grad_(False)
    embedding = torch.randn(50, 64)
    speaker = Speaker(backbone, embedding, embedding, None, None)
    ids, lengths = torch.randint(0, 50, (3, 9)), (8, 3, 5)
    cache = speaker.new_slots(4, 32)
    for row, length in enumerate(lengths):
        backbone(embedding[ids[row : row + 1, :length]], causal_meta(1, length), cache.writer(row))
    places = torch.tensor(lengths)
    token = ids[torch.arange(3), places]
    found = DecodeStep(speaker, cache, fixed=fixed)(token, places, places, 16)
    for row, length in enumerate(lengths):
        hidden, _ = backbone(embedding[ids[row : row + 1, : length + 1]], causal_meta(1, length + 1))
        torch.testing.assert_close(found[row], embedding @ hidden[0, -1], rtol=1e-4, atol=1e-4)


def test_int8_weights_stand_for_what_they_say() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    matrix = QuantizedMatrix(weight)
    assert float((matrix.plain() - weight).abs().max()) <= float(weight.abs().max()) / 254 + 1e-6
    torch.testing.assert_close(matrix(x), x @ matrix.plain().t(), rtol=1e-4, atol=1e-4)


def test_int8_experts_stand_for_what_they_say() -> None:
    """A scale for each output of each expert, in both ways of multiplying."""
    torch.manual_seed(0)
    weight, x = torch.randn(3, 32, 64), torch.randn(3, 5, 32)
    weight[1] *= 100  # one loud expert must not blur the others
    stack, counts = stack_of(weight, "int8"), torch.tensor([2, 0, 3])
    assert isinstance(stack, QuantizedStack)
    for expert, matrix in enumerate(stack.matrices):
        error = (matrix.plain().t() - weight[expert]).abs().amax(0)
        assert bool((error <= weight[expert].abs().amax(0) / 254 + 1e-6).all())
    plain = torch.stack([matrix.plain().t() for matrix in stack.matrices])
    torch.testing.assert_close(stack.each(x), torch.bmm(x, plain), rtol=1e-4, atol=1e-3)
    rows = torch.randn(5, 32)
    wanted = torch.cat([rows[:2] @ plain[0], rows[2:] @ plain[2]])
    torch.testing.assert_close(stack.grouped(rows, counts), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("experts", [4, 16])  # all rows by all experts, and rows sorted by their own
def test_int8_decoding_reads_no_expert_in_full(experts: int) -> None:
    """The answer of int8 weights is close to that of the weights, and the experts are among them."""
    shape = {"experts": ExpertsConfig(hidden=32, num_experts=experts, top_k=2)}
    torch.manual_seed(1)
    backbone = Backbone(
        BackboneConfig(width=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, **shape)
    )
    embedding = torch.randn(50, 32)
    speaker = Speaker(backbone.eval(), embedding, embedding, 0, 1)
    arguments = (
        torch.tensor([3, 4, 5]),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
        8,
    )
    with torch.inference_mode():
        plain = DecodeStep(speaker, speaker.new_slots(3, 16))(*arguments)
        step = DecodeStep(speaker, speaker.new_slots(3, 16), "int8")
        step(*arguments)
        for part in backbone.modules():
            if isinstance(part, Experts):
                part.up.zero_()
                part.down.zero_()
        found = step(*arguments)
    assert float((found - plain).norm() / plain.norm()) < 0.05


def test_on_a_gpu_a_pass_never_waits_for_a_count() -> None:
    """In float32 and int8 rows are not sorted, however many: that would need the counts on the host."""
    assert all(meets_all_experts(rows, True, False, 64, 2) for rows in (1, 170, 171, 1024))
    assert meets_all_experts(170, True, True, 64, 2) and not meets_all_experts(171, True, True, 64, 2)
    assert meets_all_experts(500, False, False, 4, 2) and not meets_all_experts(1, False, True, 5, 2)


def test_graphs_leave_the_settings_of_the_process_alone(
    model: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    torch.backends.cuda.enable_cudnn_sdp(True)
    GraphedRows(Speaker.of(model.omni, model.text), 2, 32, "float32")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    assert SDPBackend.CUDNN_ATTENTION not in ATTENTION


def test_a_prompt_read_before_is_not_read_again(model: Loaded, prompts: list[Prompt]) -> None:
    cache = Speaker.of(model.omni, model.text).new_slots(2, 64)
    memory = PromptMemory(10**6)
    first, again = (read_into(model.omni, prompts[0], cache, slot, memory) for slot in (0, 1))
    assert (first[0], again[0]) == (again[0], first[0]) and (first[1], again[1]) == (0, cache.lengths[0])
    length = cache.lengths[0]
    assert cache.lengths[1] == length > 0
    assert torch.equal(cache.keys[:, 0, :length], cache.keys[:, 1, :length])
    assert read_into(model.omni, prompts[1], cache, 1, memory)[1] == 0


def test_parts_read_one_by_one_are_as_if_read_at_once() -> None:
    model = loaded(reading="parts")
    parts = (Part("text", "Look:"), Part("image", png("red", 40)), Part("text", " What is this?"))
    prompt = source_segments(parts, model.modalities)
    cache = Speaker.of(model.omni, model.text).new_slots(1, 128)
    place, _ = read_into(model.omni, prompt, cache, 0)
    whole = read_prompts(model.omni, [prompt], 1)
    assert place == int(whole.place[0]) and cache.lengths[0] == whole.read == sum(map(len, prompt))
    for slots, plain in ((cache.keys, whole.cache.keys), (cache.values, whole.cache.values)):
        torch.testing.assert_close(slots[:, 0, : whole.read], plain[:, 0, : whole.read], rtol=1e-4, atol=1e-4)


def test_a_second_question_about_a_picture_reads_its_own_tokens_alone() -> None:
    model = loaded(reading="parts")
    picture = Part("image", png("red", 40))
    first, second = (
        source_segments((picture, Part("text", words)), model.modalities) for words in (" What?", " And why?")
    )
    cache = Speaker.of(model.omni, model.text).new_slots(3, 128)
    memory = PromptMemory(10**6)
    assert read_into(model.omni, first, cache, 0, memory)[1] == 0
    assert read_into(model.omni, second, cache, 1, memory)[1] == len(second[0])
    read_into(model.omni, second, cache, 2)
    length = cache.lengths[2]
    assert cache.lengths[1] == length == sum(map(len, second))
    assert torch.equal(cache.keys[:, 1, :length], cache.keys[:, 2, :length])
    assert torch.equal(cache.values[:, 1, :length], cache.values[:, 2, :length])
    other = source_segments((Part("image", png("blue", 40)), Part("text", " What?")), model.modalities)
    assert read_into(model.omni, other, cache, 0, memory)[1] == 0, "the same words after another picture"


def test_the_memory_forgets_what_was_not_used_for_longest() -> None:
    memory = PromptMemory(100)
    parts = {name: (torch.zeros(5), torch.zeros(5)) for name in (b"a", b"b", b"c")}  # 40 bytes each
    memory.put(b"a", parts[b"a"])
    memory.put(b"b", parts[b"b"])
    assert memory.get(b"a") is not None
    memory.put(b"c", parts[b"c"])
    assert memory.get(b"b") is None and memory.get(b"a") is not None and memory.bytes == 80


def test_prompts_read_together_are_as_if_read_alone(model: Loaded, prompts: list[Prompt]) -> None:
    asked = [prompts[0], prompts[1], prompts[0], prompts[2]]
    cache, alone = (Speaker.of(model.omni, model.text).new_slots(6, 64) for _ in range(2))
    memory = PromptMemory(10**6)
    read_into(model.omni, prompts[2], cache, 0, memory)  # known before, so only copied
    found = read_together(model.omni, asked, cache, [1, 2, 3, 4], memory)
    for slot, (prompt, (place, known)) in enumerate(zip(asked, found, strict=True), 1):
        assert place == read_into(model.omni, prompt, alone, slot)[0]
        length = alone.lengths[slot]
        assert cache.lengths[slot] == length and known == (length if slot in (3, 4) else 0)
        for packed, single in ((cache.keys, alone.keys), (cache.values, alone.values)):
            torch.testing.assert_close(
                packed[:, slot, :length], single[:, slot, :length], rtol=1e-4, atol=1e-5
            )
    assert torch.equal(cache.keys[:, 3], cache.keys[:, 1])


def test_a_packed_prompt_too_long_for_its_slot_is_refused(model: Loaded, prompts: list[Prompt]) -> None:
    cache = Speaker.of(model.omni, model.text).new_slots(2, 2)
    with pytest.raises(ConfigError, match="make slots larger"):
        read_together(model.omni, prompts[:2], cache, [0, 1], PromptMemory(10**6))


@pytest.mark.parametrize("writer", [PackedWriter, SlotWriter])
def test_a_reading_that_fails_half_way_leaves_empty_slots(
    model: Loaded, prompts: list[Prompt], writer: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: PackedWriter | SlotWriter, layer: int, key: torch.Tensor, value: torch.Tensor) -> object:
        if layer == 1:
            raise RuntimeError("out of luck")
        return whole(self, layer, key * float("nan"), value)

    whole = writer.write
    cache = Speaker.of(model.omni, model.text).new_slots(3, 64)
    memory = PromptMemory(10**6)
    read_into(model.omni, prompts[3], cache, 2, memory)
    kept = cache.take(2)
    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(RuntimeError, match="out of luck"):
        if writer is PackedWriter:
            read_together(model.omni, prompts[:2], cache, [0, 1], memory)
        else:
            read_into(model.omni, prompts[0], cache, 0, memory)
    assert cache.lengths[:2] == [0, 0] and len(memory.kept) == 1
    assert not cache.keys[:, :2].any() and not cache.values[:, :2].any(), "nothing, not even NaN"
    assert all(torch.equal(part, again) for part, again in zip(kept, cache.take(2), strict=True))
