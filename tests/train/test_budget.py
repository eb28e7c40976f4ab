"""The byte budget: true to what is allocated, and a refusal that names what would fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from openm6.base.errors import ConfigError
from openm6.optim.config import OptimizerConfig
from openm6.optim.rules import update_rule
from openm6.parallel.record import RecordLayout
from openm6.parallel.streaming_config import StreamingConfig, spread
from openm6.train import budget as module
from openm6.train.budget import (
    GIB,
    Budget,
    check_budget,
    choose_resident,
    free_host_bytes,
    largest_fit,
    most_resident,
)
from openm6.train.stages import StagesConfig, SwitchConfig
from openm6.train.streamed import StreamedUpdater
from tests.train.words_job import WordsJob, words_backbone, words_config

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def budget_of(size: int = 2, layers: int = 10, **streaming: Any) -> Budget:
    """Layers of a million weights each."""
    rule = update_rule(OptimizerConfig(bytes_per_parameter=size))  # type: ignore[arg-type]
    layouts = [RecordLayout({"w": (1024, 1024)}, rule)] * layers
    config = words_backbone(num_layers=layers, experts_every=1, dense=None)
    return Budget(config, layouts, 50_000, 1024, StreamingConfig(**streaming))


def test_it_counts_what_a_run_allocates() -> None:
    streaming = StreamingConfig(resident=1)
    config = words_config(streaming=streaming, optimizer=OptimizerConfig(bytes_per_parameter=2))
    updater = StreamedUpdater(WordsJob(words_backbone()), config)
    budget = updater.budget(updater.store.layouts)
    assert budget.parameters == sum(p.numel() for p in updater.job.model.parameters())
    lines = {line.what: line.num_bytes for line in budget.lines(tuple(updater.store.resident))}
    held = [updater.store.homes[number].numel() for number in updater.store.resident]
    away = [
        home.numel()
        for number, home in enumerate(updater.store.homes)
        if number not in updater.store.resident
    ]
    assert lines["resident weight sets and their moments"] == sum(held)
    assert lines["streamed weight sets and their moments"] == sum(away)
    assert lines["buffers for streamed sets"] == 2 * max(away)


@pytest.mark.parametrize("size", [16, 4, 2, 1])
def test_bytes_a_parameter_are_those_that_stay(size: int) -> None:
    kept = {16: 12, 4: 4, 2: 2, 1: 1}[size]
    assert budget_of(size).bytes_per_parameter == pytest.approx(kept, rel=0.1)


def test_auto_fills_the_device_to_the_last_whole_set() -> None:
    budget = budget_of()
    empty = budget.total("device", ())
    one = budget.layouts[0].num_bytes
    assert most_resident(budget, empty + 3.5 * one) == 3
    assert most_resident(budget, 0) == 0 and most_resident(budget, 100 * GIB) == 10
    assert choose_resident(budget, CPU, budget.streaming) == tuple(range(10))
    assert spread(3, 9) == (1, 4, 7) and spread(0, 9) == () and spread(12, 3) == (0, 1, 2)


def test_offloaded_inputs_move_to_the_host() -> None:
    here, there = budget_of(), budget_of(boundaries="host")
    assert there.total("host", ()) - here.total("host", ()) == 2 * 1024 * 32 * 10
    assert here.total("device", ()) - there.total("device", ()) == 2 * 1024 * 32 * 10
    assert budget_of(recompute_every=5).total("device", ()) < here.total("device", ())


def test_too_large_a_model_is_refused_with_the_number_of_layers_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget = budget_of(16, resident=0)
    room = {"host": 0.1 * GIB}
    monkeypatch.setattr(module, "available", lambda device, streaming: room)
    with pytest.raises(ConfigError) as caught:
        check_budget(budget, CPU, budget.streaming)
    sentence = str(caught.value)
    layers = largest_fit(budget, room, CPU)
    assert 0 < layers < 10 and f"model.overrides.num_layers={layers} would fit" in sentence
    assert "loop.optimizer.bytes_per_parameter=4 frees most" in sentence and "\n" not in sentence


def test_a_gpu_that_is_too_small_says_what_helps_there() -> None:
    budget = budget_of(2, resident=0)
    room = {"device": 1e6, "host": 10.0 * GIB}
    sentence = module.refusal(budget, "device", room, (), GPU)
    assert "not even one layer would fit" in sentence and "frees most" in sentence


def test_a_run_that_may_not_have_the_memory_is_refused_before_it_starts() -> None:
    config = words_config(streaming=StreamingConfig(host_gib=1e-5))
    with pytest.raises(ConfigError, match="of host memory, and 0.00 are free"):
        StreamedUpdater(WordsJob(words_backbone()), config)


def test_the_real_stage_is_counted_before_the_pseudo_one_begins() -> None:
    shared = words_backbone(sharing="all", experts_every=1, dense=None)
    needed = (
        StreamedUpdater(WordsJob(shared), words_config(streaming=StreamingConfig()))
        .store.layouts[0]
        .num_bytes
    )
    room = StreamingConfig(host_gib=3.5 * needed / GIB)  # one set, or two, but never four
    StreamedUpdater(WordsJob(shared), words_config(streaming=room))
    stages = StagesConfig(switch=SwitchConfig(step=5))
    with pytest.raises(ConfigError, match="num_layers"):
        StreamedUpdater(WordsJob(shared), words_config(streaming=room, stages=stages))


def test_free_memory_is_read_from_the_system() -> None:
    assert 0 < free_host_bytes() < 2**50
