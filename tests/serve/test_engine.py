"""The engine: every answer is that of the request alone; fairness, bounds, deadlines, and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch

from openm6.core.errors import ConfigError, DataError
from openm6.energy.meter import open_meter
from openm6.inference.engine import generate_texts, score_texts, visible_text
from openm6.inference.load import LoadedModel
from openm6.inference.prefill import prefill
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.kernels.probe import Capabilities
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.modalities.series import NumberSeries
from openm6.nn.moe import Router
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.requests import (
    CodesRequest,
    DeadlineExceededError,
    EmbedRequest,
    EngineUnavailableError,
    NumbersRequest,
    QueueFullError,
    RankRequest,
    Request,
    TextRequest,
    prepare,
)
from openm6.serve.run import read_serve_config
from openm6.serve.worker import EnergyAttribution, RequestHandle, Worker, follow
from tests.data.sample_images import png, wav
from tests.devices import CPU, GPU, needs_gpu
from tests.serve.alone import answer_alone
from tests.small_model import embedding_model, loaded


def say(words: str) -> tuple[Part, ...]:
    return (Part("text", words),)


def requests() -> list[Request]:
    """Two of each kind, with settings of their own."""
    warm = Sampling(temperature=1.0, max_tokens=10, seed=3)
    return [
        TextRequest(parts=say("draw the digit seven"), sampling=Sampling(max_tokens=10), client="a"),
        TextRequest(parts=(Part("image", png("red", 40)), Part("text", " What?")), sampling=warm, client="b"),
        CodesRequest(parts=say("draw"), modality="image", sampling=MaskedSampling(steps=3, seed=1)),
        CodesRequest(parts=say("say zero"), modality="audio", sampling=MaskedSampling(steps=2, seed=2)),
        CodesRequest(
            parts=say("fill"),
            modality="image",
            source=png("red", 40),
            mask=(0.0, 0.0, 0.5, 0.5),
            sampling=MaskedSampling(steps=2),
        ),
        NumbersRequest(parts=say("a small apple"), columns=("mass", "length")),
        NumbersRequest(parts=say("an apple"), series=NumberSeries("mass", [3.0, 4.0, None, 5.0]), ahead=5),
        RankRequest(parts=(Part("audio", wav()),), candidates=("zero", "seven apples")),
        EmbedRequest(parts=say("What is this?")),
        TextRequest(parts=say("x"), sampling=warm, client="a"),
    ]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return embedding_model()


@pytest.fixture(scope="module")
def engine(model: LoadedModel) -> Iterator[Engine]:
    with Engine(model, EngineConfig(max_num_seqs=3, max_model_len=256, max_num_media=2)) as found:
        yield found


def same(found: Any, wanted: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(found, Histogram):
        return np.array_equal(found.probability, wanted.probability)
    return bool(np.all(np.asarray(found) == np.asarray(wanted)))


def test_in_a_crowd_each_gets_the_answer_that_it_gets_alone(engine: Engine, model: LoadedModel) -> None:
    crowd = requests() * 2
    handles = [engine.submit([prepare(request, model, 256)])[0] for request in crowd]
    for request, handle in zip(crowd, handles, strict=True):
        answer = handle.wait(60)
        assert same(answer.value, answer_alone(model, request, 256)), type(request).__name__
        assert answer.joules is not None and answer.joules >= 0 and answer.energy_source
        assert answer.usage.prompt > 0 and answer.seconds > 0
    assert any(handle.cached for handle in handles), "the second of two equal prompts is not read again"


def test_a_second_question_about_an_image_reads_only_its_own_tokens() -> None:
    model = loaded(prompt_attention="block")

    def ask(words: str) -> TextRequest:
        parts = (Part("image", png("red", 40)), Part("text", words))
        return TextRequest(parts=parts, sampling=Sampling(max_tokens=6), top=3)

    config = EngineConfig(max_num_seqs=2, max_model_len=256)
    with Engine(model, config) as engine:
        first, second = (engine.ask_and_wait(ask(words)) for words in (" What is this?", " Say more."))
    with Engine(model, config) as engine:
        alone = engine.ask_and_wait(ask(" Say more."))
    assert (first.usage.cached, alone.usage.cached) == (0, 0)
    assert second.usage.cached == second.usage.by_modality["image"] > 0
    assert (second.value, second.tokens) == (alone.value, alone.tokens), "bit for bit"
    assert second.value == answer_alone(model, ask(" Say more."), 256)


def test_a_query_is_read_once_for_candidates_and_for_later_requests() -> None:
    model = loaded(prompt_attention="block")

    def ask(words: str, *candidates: str) -> RankRequest:
        return RankRequest(parts=(Part("image", png("red", 40)), Part("text", words)), candidates=candidates)

    again, other = ask(" What?", "zero", "seven apples"), ask(" And why?", "zero")
    with Engine(model, EngineConfig(max_num_seqs=2, max_model_len=256)) as engine:
        first, second, third = map(engine.ask_and_wait, (again, again, other))
    assert (first.usage.cached, second.usage.cached) == (0, first.usage.prompt)
    assert third.usage.cached == third.usage.by_modality["image"] > 0
    assert second.value == first.value == answer_alone(model, again), "bit for bit"
    assert third.value == answer_alone(model, other)


def test_a_causal_model_continues_and_ranks_from_the_last_token() -> None:
    model, words, candidates = loaded(prompt_attention="causal"), "draw the digit", ("zero", "seven apples")
    prompt = source_segments(say(words), model.modalities)
    with Engine(model, EngineConfig(max_num_seqs=2, max_model_len=256)) as engine:
        text = engine.ask_and_wait(TextRequest(parts=say(words), sampling=Sampling(max_tokens=6)))
        ranked = engine.ask_and_wait(RankRequest(parts=say(words), candidates=candidates))
    assert text.value == generate_texts(model, [prompt], Sampling(max_tokens=6))[0]
    assert text.usage.prompt == len(model.text.encode(words))
    (expected,) = score_texts(model, [prompt], [model.text.target(candidate) for candidate in candidates])
    np.testing.assert_allclose([nll for nll, _ in ranked.value], expected, rtol=1e-5)


def test_not_deterministic_is_as_right(model: LoadedModel) -> None:
    config = EngineConfig(max_num_seqs=3, max_model_len=256, max_num_media=2, batch_invariant=False)
    with Engine(model, config) as engine:
        handles = [engine.submit([prepare(request, model, 256)])[0] for request in requests()[:5]]
        for request, handle in zip(requests(), handles, strict=False):
            assert same(handle.wait(60).value, answer_alone(model, request, 256))


def test_of_prompts_read_together_only_the_broken_one_ends(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def embed(arrays: dict[str, torch.Tensor]) -> torch.Tensor:
        raise DataError("the image fades away")

    few = Sampling(max_tokens=6)
    asked = [TextRequest(parts=say(words), sampling=few) for words in ("draw", "say zero", "a small apple")]
    asked.insert(1, TextRequest(parts=(Part("image", png("red", 40)), Part("text", " What?")), sampling=few))
    monkeypatch.setattr(model.omni.adapter("image_in"), "embed", embed)
    with open_meter() as meter:
        worker = Worker(model, EngineConfig(max_num_seqs=4, max_model_len=256, batch_invariant=False), meter)
        handles = [RequestHandle(prepare(request, model, 256)) for request in asked]
        for handle in handles:
            worker.start(handle)
        while worker.active:
            worker.tick()
    found = {handle: answer.value for handle, answer in worker.ended}
    broken = handles.pop(1)
    assert broken.done and set(found) == set(handles)
    with pytest.raises(DataError, match="fades away"):
        broken.wait()
    for handle in handles:
        assert found[handle] == answer_alone(model, handle.prepared.request, 256)


def test_a_failure_between_reading_and_decoding_ends_those_prompts_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with open_meter() as meter:
        worker = Worker(model, EngineConfig(max_num_seqs=2, max_model_len=256, batch_invariant=False), meter)
        handles = [RequestHandle(prepare(TextRequest(parts=say("draw")), model, 256)) for _ in range(2)]
        for handle in handles:
            worker.start(handle)
        monkeypatch.setattr(worker.text, "add", fail)
        worker.tick()
    assert not worker.active and worker.text.free == 2
    for handle in handles:
        with pytest.raises(EngineUnavailableError, match="failed on this request"):
            handle.wait(0)


@pytest.mark.parametrize("mask", [(0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 1e-9, 1e-9)])
def test_an_image_of_nan_leaves_none_behind(model: LoadedModel, mask: tuple[float, ...], monkeypatch: Any) -> None:
    """Also one with a mask that covers nothing, which is answered at once."""

    def spoiled(omni: Any, prompt: Any, cache: Any, slot: int, prefix_cache: Any) -> tuple[int, int]:
        found = prefill(omni, prompt, cache, slot, prefix_cache)
        cache.keys[:, slot] = float("nan")
        return found

    request = CodesRequest(
        parts=say("fill"), modality="image", source=png("red", 40), mask=mask, sampling=MaskedSampling(steps=2)
    )
    monkeypatch.setattr("openm6.serve.worker.prefill", spoiled)
    with open_meter() as meter:
        worker = Worker(model, EngineConfig(max_num_media=2, max_model_len=256), meter)
        worker.start(RequestHandle(prepare(request, model, 256)))
        while worker.active:
            worker.tick()
    assert len(worker.ended) == 1 and worker.free_slots == [0, 1] and not worker.slots.keys.isnan().any()


@pytest.mark.parametrize(("device", "gpus"), [("cpu", ()), ("cuda:2", (2,))])
def test_only_the_gpu_of_the_model_is_charged(
    device: str, gpus: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    metered = Mock()
    monkeypatch.setattr("openm6.serve.engine.open_meter", metered)
    Engine(Mock(**{"omni.device": torch.device(device)}), EngineConfig(weights="float32"))
    metered.assert_called_once_with(gpus)


def test_requests_without_measured_time_do_not_stop_the_attribution(model: LoadedModel) -> None:
    """A clock may be too coarse to show any."""
    with open_meter() as meter:
        energy = EnergyAttribution(meter)
        handle = RequestHandle(prepare(TextRequest(parts=say("draw")), model, 256))
        energy.add([handle], 0.0)
        energy.settle()
    assert handle.joules == 0 and not energy.seconds


def test_joules_add_up_to_what_the_meter_counted(model: LoadedModel) -> None:
    with Engine(model, EngineConfig(max_num_seqs=3, max_model_len=256)) as engine:
        before = engine.meter.joules(fresh=True).joules
        handles = [engine.submit([prepare(request, model, 256)])[0] for request in requests()]
        total = sum(handle.wait(60).joules or 0 for handle in handles)
        assert 0 < total <= engine.meter.joules(fresh=True).joules - before + 1e-6


def test_a_stop_string_ends_the_text_and_is_left_out(engine: Engine) -> None:
    free = engine.ask_and_wait(TextRequest(parts=say("draw"), sampling=Sampling(max_tokens=30)))
    word = free.value[3:5]
    cut = engine.ask_and_wait(TextRequest(parts=say("draw"), sampling=Sampling(max_tokens=30), stop=(word,)))
    assert cut.value == free.value[: free.value.index(word)] and cut.finish == "stop"


def test_a_reader_sees_the_text_grow_and_never_shrink(engine: Engine) -> None:
    async def read() -> tuple[list[str], str]:
        request = TextRequest(parts=say("a"), sampling=Sampling(temperature=1.0, max_tokens=40))
        [handle] = await engine.ask_all([request], "", 60)
        seen = [handle.text async for _ in follow([handle])]
        return seen, handle.wait().value

    seen, whole = asyncio.run(read())
    assert seen[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))


def test_a_text_that_nobody_reads_as_it_grows_is_decoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Mock(side_effect=visible_text)
    monkeypatch.setattr("openm6.serve.worker.visible_text", decoded)

    async def ask() -> str:
        request = TextRequest(parts=say("a"), sampling=Sampling(temperature=1.0, max_tokens=20))
        [handle] = await engine.ask_all([request], "", 60)
        return str((await handle.answer()).value)

    assert asyncio.run(ask()) and decoded.call_count == 1


def test_each_token_of_a_text_that_is_read_as_it_grows_is_scored_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = Mock(side_effect=engine.loaded.text.bytes_of)
    monkeypatch.setattr(engine.loaded.text, "bytes_of", scored)

    async def ask() -> tuple[list[int], int]:
        request = TextRequest(parts=say("a"), sampling=Sampling(temperature=1.0, max_tokens=20), top=0)
        [handle] = await engine.ask_all([request], "", 60)
        held = [handle.tokens async for _ in follow([handle])]
        return [len(tokens) for tokens in held], len(handle.wait().tokens)

    lengths, whole = asyncio.run(ask())
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == whole == scored.call_count


def test_who_stops_waiting_for_an_answer_cancels_it(engine: Engine) -> None:
    async def leave() -> RequestHandle:
        request = TextRequest(parts=say("a"), sampling=Sampling(max_tokens=200))
        [handle] = await engine.ask_all([request], "", 60)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.answer(), 0.01)
        return handle

    handle = asyncio.run(leave())
    with pytest.raises(DeadlineExceededError, match="cancelled"):
        handle.wait(30)


def test_who_stops_reading_frees_the_slot(engine: Engine) -> None:
    async def leave() -> RequestHandle:
        request = TextRequest(parts=say("a"), sampling=Sampling(max_tokens=200))
        [handle] = await engine.ask_all([request], "", 60)
        async for _ in follow([handle]):
            if handle.text:
                break
        handle.cancel()
        return handle

    handle = asyncio.run(leave())
    with pytest.raises(DeadlineExceededError, match="cancelled"):
        handle.wait(30)
    assert engine.ask_and_wait(TextRequest(parts=say("a"), sampling=Sampling(max_tokens=2))).usage.generated == 2


def test_a_loop_that_closes_does_not_stop_the_engine(engine: Engine) -> None:
    """The loop may close between any look at it and the call."""

    class Closing:
        def is_closed(self) -> bool:
            return False

        def call_soon_threadsafe(self, *_: object) -> None:
            raise RuntimeError("Event loop is closed")

    handle = RequestHandle(prepare(TextRequest(parts=say("a"), sampling=Sampling(max_tokens=3)), engine.loaded, 256))
    handle.readers.append((cast(asyncio.AbstractEventLoop, Closing()), asyncio.Event()))
    handle.notify()
    assert not handle.done


def test_too_many_requests_being_read_are_refused(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.serve.engine.MAX_PREPARING", 0)
    config = EngineConfig(max_num_seqs=1, max_model_len=256)
    with Engine(model, config) as engine, pytest.raises(QueueFullError, match="are being read"):
        asyncio.run(engine.ask_all([TextRequest(parts=say("a"))], "", 60))


def test_requests_that_have_been_read_make_way_for_others(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are broken."""
    monkeypatch.setattr("openm6.serve.engine.MAX_PREPARING", 1)
    with Engine(model, EngineConfig(max_num_seqs=1, max_model_len=256)) as engine:
        for _ in range(2):
            with pytest.raises(DataError):
                asyncio.run(engine.ask_all([TextRequest(parts=())], "", 60))
        for _ in range(2):
            request = TextRequest(parts=say("a"), sampling=Sampling(max_tokens=1))
            asyncio.run(engine.ask_all([request], "", 60))


def test_a_deadline_that_passes_is_said(engine: Engine) -> None:
    with pytest.raises(DeadlineExceededError):
        engine.ask_and_wait(TextRequest(parts=say("a"), sampling=Sampling(max_tokens=200), seconds=0.0))


def test_too_much_work_is_refused_with_a_time_to_come_back(model: LoadedModel) -> None:
    with Engine(model, EngineConfig(max_num_seqs=1, max_model_len=256, max_queued_tokens=460)) as engine:
        request = TextRequest(parts=say("a"), sampling=Sampling(max_tokens=150))
        handles = []
        with pytest.raises(QueueFullError) as caught:
            for _ in range(10):
                handles.append(engine.submit([prepare(request, model, 256)])[0])
        assert caught.value.retry_after >= 1 and len(handles) >= 2
        for handle in handles:
            handle.cancel()


def test_what_does_not_fit_is_one_sentence(engine: Engine) -> None:
    for request in (
        TextRequest(parts=say("a " * 400), sampling=Sampling(max_tokens=10)),
        TextRequest(parts=()),
        NumbersRequest(parts=say("a"), columns=("nothing",)),
    ):
        with pytest.raises(DataError):
            engine.ask_and_wait(request)


def test_a_failure_ends_one_request_and_not_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr("openm6.serve.worker.prefill", fail)
        with pytest.raises(EngineUnavailableError, match="failed on this request"):
            engine.ask_and_wait(TextRequest(parts=say("b")))
    assert engine.ready and engine.ask_and_wait(TextRequest(parts=say("b"), sampling=Sampling(max_tokens=1)))


def test_int8_and_layers_that_come_and_go_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="leave out num_gpu_layers"):
        read_serve_config(["engine.num_gpu_layers=1", "engine.weights=int8"])


def test_in_bfloat16_the_router_chooses_as_it_was_balanced() -> None:
    model = loaded()
    routers = [module for module in model.omni.modules() if isinstance(module, Router)]
    biases = [router.bias.uniform_(-0.1, 0.1).clone() for router in routers if router.bias is not None]
    engine = Engine(model, EngineConfig(weights="bfloat16"))
    assert engine.loaded.omni.text.embedding.weight.dtype == torch.bfloat16
    assert biases and len(biases) == len(routers)
    for router, bias in zip(routers, biases, strict=True):
        assert router.bias is not None and torch.equal(router.bias, bias)
        assert router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("bf16", "weights"), [(True, "bfloat16"), (False, "float32")])
def test_the_defaults_on_a_gpu_are_fast_and_logged(
    bf16: bool, weights: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a CPU they are exact, and nothing needs to be said."""
    caplog.set_level("INFO", "openm6")
    exact, model = EngineConfig(), loaded()
    assert exact.precision(CPU) == "float32" and exact.is_invariant(CPU)
    Engine(model, exact)
    assert not caplog.messages and model.omni.text.embedding.weight.dtype == torch.float32
    found = Capabilities(GPU, "a GPU", (9, 0) if bf16 else (7, 5), bf16, None)
    monkeypatch.setattr("openm6.serve.config.capabilities", lambda device: found)
    monkeypatch.setattr(type(model.omni), "device", GPU)
    monkeypatch.setattr("openm6.serve.engine.open_meter", Mock())  # there may be no such GPU
    assert exact.precision(GPU) == weights and not exact.is_invariant(GPU)
    Engine(model, exact)
    assert model.omni.text.embedding.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    *converted, line = caplog.messages
    assert len(converted) == bf16, "the memory of converted weights"
    assert line.startswith(f"weights in {weights}; a request may differ in its last bits among others")
    chosen = EngineConfig(weights="float32", batch_invariant=True)
    assert chosen.precision(GPU) == "float32" and chosen.is_invariant(GPU)


def test_the_thread_of_the_engine_uses_the_gpu_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is current there only if it is set there: each thread begins with the first."""
    engine, used = MagicMock(failure=None), Mock()
    engine.loaded.omni.device, engine._admit.return_value = torch.device("cuda", 1), False
    monkeypatch.setattr(torch.cuda, "set_device", used)
    Engine._run(engine, MagicMock(active=[], ended=[]))
    used.assert_called_once_with(torch.device("cuda", 1))


@needs_gpu
def test_on_a_gpu_passes_are_captured_before_the_first_request() -> None:
    model = loaded(3)
    model.omni.to(GPU)
    with Engine(model, EngineConfig(max_num_seqs=2, max_model_len=64)) as engine:
        assert model.omni.text.embedding.weight.dtype == torch.bfloat16
        answer = engine.ask_and_wait(TextRequest(parts=say("draw"), sampling=Sampling(max_tokens=3)))
    assert isinstance(answer.value, str)


def test_a_failed_step_on_a_lost_device_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of cuBLAS and of Triton have no class of their own: the device is asked."""
    with Engine(loaded(), EngineConfig(max_num_seqs=1, max_model_len=256)) as engine:
        monkeypatch.setattr("openm6.serve.worker.prefill", Mock(side_effect=RuntimeError("CUBLAS_STATUS_FAILED")))
        lost = Mock(side_effect=torch.AcceleratorError("CUDA error: an illegal memory access"))
        monkeypatch.setattr("openm6.serve.worker.check_alive", lost)
        with pytest.raises(EngineUnavailableError):
            engine.ask_and_wait(TextRequest(parts=say("a")))
        engine._thread.join()
        assert not engine.ready and "illegal memory access" in str(engine.failure)


def test_after_the_end_nothing_is_taken(model: LoadedModel) -> None:
    with Engine(model, EngineConfig(max_num_seqs=1, max_model_len=256)) as engine:
        pass
    assert not engine.ready
    with pytest.raises(EngineUnavailableError):
        engine.ask_and_wait(TextRequest(parts=say("a")))
