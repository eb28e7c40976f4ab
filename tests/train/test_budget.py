"""The byte budget: true to what is allocated, and a refusal that names what would fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.offload.config import OffloadConfig
from openm6.offload.weight_store import PAGE, RecordLayout
from openm6.optim.config import PRECISION_OF_BYTES, OptimizerConfig
from openm6.optim.rules import update_rule
from openm6.plan.hardware import GIB
from openm6.train import budget as module
from openm6.train.budget import Budget, _changes, available, check_budget, refusal
from openm6.train.config import StagesConfig, SwitchConfig
from openm6.train.loop import train
from openm6.train.offloaded import OffloadedTrainStep
from tests.offload.test_executor import config_of, training_of
from tests.train.words_training import WordsTraining, words_backbone, words_config

CPU = torch.device("cpu")
RULE = update_rule(OptimizerConfig(precision="bf16-adafactor"))


def budget_of(size: int = 2, layers: int = 10, free: dict[str, float] | None = None, **offload: Any) -> Budget:
    """Layers of a million weights each."""
    rule = update_rule(OptimizerConfig(precision=PRECISION_OF_BYTES[size]))  # type: ignore[arg-type]
    layouts = [RecordLayout({"w": (1024, 1024)}, rule)] * layers
    config = words_backbone(num_layers=layers, moe_layer_freq=1, dense=None)
    return Budget(config, layouts, 50_000, 1024, OffloadConfig(**offload), free or {"host": 0.0})


def test_what_an_image_stem_keeps_is_on_the_device() -> None:
    plain, stem = budget_of(), replace(budget_of(), stem_elements=100)
    assert stem.total("host") - plain.total("host") == stem.total("device") - plain.total("device") == 2 * 1024 * 100


def test_it_counts_what_a_run_allocates() -> None:
    offload = OffloadConfig(num_gpu_layers=1)
    config = words_config(offload=offload, optimizer=OptimizerConfig(precision="bf16-adafactor"))
    train_step = OffloadedTrainStep(WordsTraining(words_backbone()), config)
    budget = train_step.budget(train_step.store.layouts)
    assert budget.parameters == sum(p.numel() for p in train_step.training.model.parameters())
    assert budget.value_bytes == 4 and budget.checkpoints == 0
    lines = {what: size for (_, what), size in budget.entries(tuple(train_step.store.on_device)).items()}
    held = [train_step.store.storage[number].numel() for number in train_step.store.on_device]
    away = [
        stored.numel()
        for number, stored in enumerate(train_step.store.storage)
        if number not in train_step.store.on_device
    ]
    assert lines["weights on the device"] + lines["optimizer state on the device"] == sum(held)
    assert lines["offloaded weights"] + lines["state of offloaded weights"] == sum(away)
    weights = 2 * sum(layout.num_parameters for layout in train_step.store.layouts)
    assert lines["weights on the device"] + lines["offloaded weights"] == pytest.approx(weights, rel=0.02)
    assert lines["buffers for offloaded layers"] == 2 * max(away)


def test_what_is_frozen_counts_without_gradient_and_optimizer_state() -> None:
    trained, frozen = (OffloadedTrainStep(training_of(case), config_of(2)) for case in ("all", "adapters"))
    (whole, all_of_it), (part, rest) = (
        (one.budget(one.store.layouts), one.budget(one.store.layouts).entries(())) for one in (trained, frozen)
    )
    weights = sum(layout.num_parameters for layout in frozen.store.layouts)
    assert 2 * weights <= rest["host", "offloaded weights"] < 2.02 * weights
    assert rest["host", "state of offloaded weights"] < 4 * PAGE < all_of_it["host", "state of offloaded weights"]
    others = part.others - part.frozen
    assert others == sum(one.numel() for one in frozen.parameters) and whole.frozen == 0
    assert rest["device", "embeddings, heads, norms, routers"] == 20 * others + 8 * part.frozen
    layer = ("device", "gradient and weights of the layer in use")
    assert rest[layer] == all_of_it[layer] / 2
    smaller = _changes(part)["loop.optimizer.precision=int8-adafactor"]
    assert [one.frozen for one in smaller.layouts] == [one.frozen for one in part.layouts]


@pytest.mark.parametrize("size", [16, 4, 2, 1])
def test_bytes_per_parameter_are_those_that_stay(size: int) -> None:
    kept = {16: 12, 4: 4, 2: 2, 1: 1}[size]
    budget = budget_of(size)
    assert budget.checkpoint_bytes / budget.parameters == pytest.approx(kept, rel=0.1)


def test_auto_fills_the_device_to_the_last_whole_set() -> None:
    budget = budget_of()
    empty = budget.total("device", ())
    one = budget.layouts[0].num_bytes
    assert budget.on_device == tuple(range(10))
    for room, groups in ((3.5 * one, (1, 5, 8)), (-1.0, ()), (100.0 * GIB, tuple(range(10)))):
        free = {"device": empty + room + 4 * GIB, "host": 0.0}
        assert replace(budget, free=free).on_device == groups
    assert [budget_of(layers=9, num_gpu_layers=count).on_device for count in (3, 0)] == [(1, 4, 7), ()]
    assert budget_of(layers=3, num_gpu_layers=12).on_device == (0, 1, 2)


def test_offloaded_inputs_move_to_the_host() -> None:
    free = {"device": 0.0, "host": 0.0}
    here, there = budget_of(free=free), budget_of(free=free, activation_storage="host")
    assert there.total("host", ()) - here.total("host", ()) == 2 * 1024 * 32 * 10
    assert here.total("device", ()) - there.total("device", ()) == 2 * 1024 * 32 * 10
    assert budget_of(activation_checkpointing_every=5).total("device", ()) < here.total("device", ())


def test_too_large_a_model_is_refused_with_the_number_of_layers_that_fit() -> None:
    budget = budget_of(16, num_gpu_layers=0, free={"host": 0.1 * GIB})
    with pytest.raises(ConfigError) as caught:
        check_budget(budget, RULE)
    sentence = str(caught.value)
    layers = max(count for count in range(1, 10) if budget.with_layers(count).fits)
    assert layers < 9 and f"model.overrides.num_layers={layers} would fit" in sentence
    mildest = "and loop.optimizer.precision=bf16-adafactor-momentum would do"
    assert f"precision=int8-adafactor frees most, 132 MiB, {mildest}" in sentence and "\n" not in sentence
    assert " would do" not in refusal(replace(budget, free={"host": 0.01 * GIB}), "host", RULE)


def test_what_frees_most_is_tried_out() -> None:
    """Few weights and many tokens: fewer bytes per parameter hardly help, fewer inputs kept do."""
    tight = {"device": 1e6, "host": 10.0 * GIB}
    budget = replace(budget_of(2, num_gpu_layers=0, free=tight), tokens=10**6)
    assert "loop.offload.gradient_accumulation_steps=8 frees most" in refusal(budget, "device", RULE)
    parts = replace(budget, offload=OffloadConfig(num_gpu_layers=0, gradient_accumulation_steps=64))
    assert "loop.offload.activation_storage=host frees most" in refusal(parts, "device", RULE)
    offload = parts.offload.model_copy(update={"activation_storage": "host"})
    offloaded = replace(parts, offload=offload, free={"device": 10.0 * GIB, "host": 0.3 * GIB})
    sentence = refusal(offloaded, "host", RULE)
    assert "activation_storage=device frees most" in sentence and "activation_storage=device would do" in sentence
    assert parts.total("host") < offloaded.total("host")


def test_where_no_layer_fits_a_preset_is_named() -> None:
    wide = replace(budget_of(2, layers=2, num_gpu_layers=0, free={"host": 1.0 * GIB}), others=10**9)
    assert "model.preset=tiny would fit" in refusal(wide, "host", RULE)
    assert "not even the smallest preset" in refusal(replace(wide, free={"host": 1e6}), "host", RULE)


def test_the_disk_must_hold_the_kept_checkpoints_and_the_one_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = OptimizerConfig(learning_rate=0.01, precision="int8-adafactor")
    config = words_config(4, keep_last=3, offload=OffloadConfig(), optimizer=optimizer)
    run = RunFolder.open(tmp_path)
    train(WordsTraining(words_backbone()), config, run)
    size = sum(path.stat().st_size for path in latest(run.path).iterdir())
    disk = shutil._ntuple_diskusage(10**9, 0, 2 * size)  # type: ignore[attr-defined]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: disk)
    assert available(CPU, OffloadConfig(), run.checkpoints)["disk"] == 3 * size
    for name, left in ((".step-9.partial", 100), ("step-1", 10)):  # by a save and a removal that were killed
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "model.safetensors").write_bytes(bytes(left))
    assert available(CPU, OffloadConfig(), run.checkpoints)["disk"] == 3 * size + 110
    with pytest.raises(ConfigError, match=r"KiB of disk, and .* are free.*loop\.keep_last=1 frees most"):
        train(WordsTraining(words_backbone()), config, run, resume=True)
    train(WordsTraining(words_backbone()), config.model_copy(update={"keep_last": 1}), run, resume=True)


def test_a_run_that_may_not_have_the_memory_is_refused_before_it_starts() -> None:
    config = words_config(offload=OffloadConfig(host_gib=1e-5))
    with pytest.raises(ConfigError, match="of host memory, and 10.5 KiB are free"):
        OffloadedTrainStep(WordsTraining(words_backbone()), config)


def test_the_real_stage_is_counted_before_the_pseudo_one_begins() -> None:
    shared = words_backbone(sharing="all", moe_layer_freq=1, dense=None)
    needed = OffloadedTrainStep(WordsTraining(shared), words_config(offload=OffloadConfig())).store.layouts[0].num_bytes
    free_bytes = OffloadConfig(host_gib=5 * needed / GIB)  # one set, or two, but never four beside the shared one
    OffloadedTrainStep(WordsTraining(shared), words_config(offload=free_bytes))
    stages = StagesConfig(switch=SwitchConfig(step=5))
    with pytest.raises(ConfigError, match="num_layers"):
        OffloadedTrainStep(WordsTraining(shared), words_config(offload=free_bytes, stages=stages))


def test_processes_of_a_machine_divide_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_host_bytes", lambda: 8e9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available(CPU, OffloadConfig())["host"] == pytest.approx(0.9 * 2e9)


def test_checkpoints_hold_the_shards_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class FourShards(ProcessGroupContext):
        layout = SimpleNamespace(dense=SimpleNamespace(size=lambda: 4))

        def gather(self, value: Any) -> list[Any]:
            seen.append("others")
            return [value] * 4

    train_step = OffloadedTrainStep(WordsTraining(words_backbone()), words_config(offload=OffloadConfig()))
    one = train_step.budget(train_step.store.layouts)
    train_step.training.ranks = FourShards()
    monkeypatch.setattr("openm6.train.offloaded.available", lambda *_: seen.append("free") or {"host": 1.0})
    four = train_step.budget(train_step.store.layouts)
    assert seen == ["free", "others"], "all ranks read what is free before one of them allocates"
    whole = replace(one, layouts=list(one.layouts) * 4)
    assert (four.parameters, four.checkpoint_bytes) == (whole.parameters, whole.checkpoint_bytes)


def test_what_the_allocator_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("mem_get_info", (5000, 9000)), ("memory_reserved", 3000), ("memory_allocated", 2000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, found=found: found)
    assert available(torch.device("cuda", 0), OffloadConfig(), held=100)["device"] == 5000 + 1000 + 100


def test_at_the_switch_the_run_does_not_count_twice_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    budgets: list[Budget] = []
    monkeypatch.setattr(module, "free_host_bytes", lambda: 1e9)
    monkeypatch.setattr("openm6.train.offloaded.check_budget", lambda budget, rule: budgets.append(budget))
    training = WordsTraining(words_backbone(sharing="all"))
    train_step = OffloadedTrainStep(training, words_config(offload=OffloadConfig()))
    train_step.update(training.batch(1), 1, 10)
    train_step.delink("independent")
    first, second = (budget.free["host"] - 0.9e9 for budget in budgets)
    others = budgets[1].others
    assert first == pytest.approx(4 * others), "the weights in fp32"
    assert second == pytest.approx(12 * others, rel=0.02), "and two moments of each, with their counts"
