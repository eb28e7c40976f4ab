"""A multimodal step on its device: the host waits for nothing, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openm6.checkpoint.folder import step_folder
from openm6.core.config import build
from openm6.core.run_folder import RunFolder
from openm6.modalities.batch import Batch
from openm6.ops import moe
from openm6.ops.sequence import visible
from openm6.train.callbacks import MemoryCallback, SpikeCallback
from openm6.train.loop import train
from openm6.train.metering import MeterCallback
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.step import StepReport, TrainStep
from tests.devices import CPU, on_each_device
from tests.host_reads import HostReads
from tests.train.tiny_recipe import tiny_recipe

# Of a resumed run on a GPU, and of products in bf16 on a CPU: their sums have no fixed order. A CPU repeats fp32 to the
# bit.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
# Moves of what is on the device already: a load, unless the router of another stage sends it; torch's gradient norm.
THERE_ALREADY = ("to(device) at openm6/nn/moe.py", "to(device) at openm6/distributed/process_group.py")


def opened(folder: Path, device: torch.device, **loop: object) -> MultimodalTraining:
    """The training of all kinds of tokens, in rows that FlexAttention takes."""
    values = {**tiny_recipe(6, **loop), "packing": {"batch_size": 2, "seq_len": 256}}
    # Whole images are convolved, one size after the other.
    values["modalities"] = {**values["modalities"], "image": {"stem": "conv"}}
    values["eval"] = {**values["eval"], "at_end": False}
    recipe = build(MultimodalRecipe, values, "tiny")
    return MultimodalTraining(recipe, RunFolder.open(folder), device)


@contextmanager
def no_waiting(device: torch.device, allowed: str = "/") -> Iterator[dict[str, int]]:
    """Fail where the host waits for the device; on a CPU, where it would wait for a GPU, but in the file `allowed`.

    Its waits on a CPU are entered in the dictionary afterwards.
    """
    found: dict[str, int] = {}
    if device == CPU:
        with HostReads() as reads:
            yield found
        found |= {place: count for place, count in reads.found.items() if f" at {allowed}:" in place}
        waits = [place for place in reads.found if place not in found and not place.startswith(THERE_ALREADY)]
        assert not waits, waits
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_loss_and_its_gradient_wait_for_nothing(
    device: torch.device, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the batch on the host to the gradients, all modalities among it. Grouped products in fp32 need counts on
    the host (`ops/matmul.py`), so there the experts are left out."""
    if device == CPU:
        # As on a GPU: the CPU's own mask and experts ask for numbers on purpose.
        monkeypatch.setattr("openm6.models.backbone.choose_mask", lambda meta, *_: visible(meta, meta))
        monkeypatch.setattr(moe, "choose_backend", lambda *_: "fused")
    training = opened(tmp_path, device, precision=precision, compile=False, activation_checkpointing=0)
    if precision == "fp32":
        for block in training.omni.backbone.blocks:
            monkeypatch.setattr(block.mlp.experts, "forward", lambda x, *_: (x, None))
    step, batch = TrainStep(training, training.recipe.loop), next(training.batches())
    kinds = {kind for kind, group in batch.groups.items() if len(group.learned)}
    assert {"text", "image_out", "audio_out", "numbers_out"} <= kinds, "the loss must hold all of them"
    training.model.train()
    # What tasks cost is counted on the host, before the batch leaves it.
    work = training.attribution.work(batch)
    monkeypatch.setattr(training.attribution, "work", lambda _: work)

    def run() -> Tensor:
        with step.autocast():
            result = training.loss(batch)
        result.loss.backward()
        training.after_step(result)
        return result.loss

    run()  # kernels are compiled and FlexAttention is tried
    with no_waiting(device):
        loss = run()
    assert loss.isfinite()


@on_each_device
def test_a_whole_step_waits_for_nothing(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the batch on the host to the optimizer and the callbacks; the report of the step before is there already."""
    if device == CPU:
        monkeypatch.setattr("openm6.models.backbone.choose_mask", lambda meta, *_: visible(meta, meta))
        monkeypatch.setattr(moe, "choose_backend", lambda *_: "fused")
        monkeypatch.setattr("openm6.train.step.AHEAD", ("cpu",))
    settings = {"precision": "bf16", "compile": False, "activation_checkpointing": 0, "num_processes": 1}
    training = opened(tmp_path, device, log_every=2, save_every=99, **settings)
    work = training.attribution.work(next(training.batches()))
    # What tasks cost is counted on the host, before the batch leaves it.
    monkeypatch.setattr(training.attribution, "work", lambda _: work)
    update, reads = TrainStep.update_ahead, []

    def watched(train_step: TrainStep, batch: Batch, step: int, total: int | None) -> StepReport | None:
        if step < 4:  # kernels are compiled, FlexAttention is tried, and moments are allocated
            return update(train_step, batch, step, total)
        with no_waiting(device, allowed="openm6/train/step.py") as found:
            report = update(train_step, batch, step, total)
        reads.append(found)
        assert report is not None and report.step == step - 1
        return report

    monkeypatch.setattr(TrainStep, "update_ahead", watched)
    for callback in (MeterCallback, SpikeCallback, MemoryCallback):
        monkeypatch.setattr(callback, "after_step", watching(callback.after_step, device))
    train(training, training.recipe.loop, RunFolder.open(tmp_path))
    assert len(reads) == 3
    if device == CPU:  # the numbers of the step before
        assert all(sum(found.values()) == 1 and next(iter(found)).startswith("tolist") for found in reads), reads


def watching(act: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`act`, which must wait for nothing."""

    def watched(*given: Any) -> Any:
        with no_waiting(device):
            return act(*given)

    return watched


def test_a_wait_is_found_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = opened(tmp_path, CPU)
    monkeypatch.setattr(moe, "choose_backend", lambda *_: "per_expert")
    batch = next(training.batches())
    with HostReads() as reads:
        training.loss(batch)
    assert any(found.startswith("tolist at openm6/ops/moe.py:") for found in reads.found), dict(reads.found)
    assert any(found.startswith("numpy at openm6/train/metering.py:") for found in reads.found), dict(reads.found)


def weights_of(training: MultimodalTraining) -> dict[str, Tensor]:
    return {name: weight.detach().float().cpu() for name, weight in training.model.named_parameters()}


def losses_of(run: Path) -> dict[int, float]:
    """The last loss of every step; a resumed run logs some of them again."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(device: torch.device, precision: str, tmp_path: Path) -> None:
    """To the bit in fp32 on a CPU; else losses and weights differ by less than TOLERANCE of themselves."""
    settings = {"precision": precision, "compile": False, "save_every": 3, "keep_last": 9, "num_processes": 1}
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = opened(whole, device, **settings)
    train(first, first.recipe.loop, RunFolder.open(whole))
    shutil.copytree(whole, again)
    shutil.rmtree(step_folder(again / "checkpoints", 6))
    second = opened(again, device, **settings)
    result = train(second, second.recipe.loop, RunFolder(again), resume=True)
    assert result.steps == 6
    expected, found = weights_of(first), weights_of(second)
    tolerance = 0.0 if device == CPU and precision == "fp32" else TOLERANCE[precision]
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= tolerance * weight.norm(), name
    one, other = losses_of(whole), losses_of(again)
    assert list(one) == list(other) == [1, 2, 3, 4, 5, 6]
    for step in (4, 5, 6):
        assert other[step] == pytest.approx(one[step], rel=tolerance, abs=0)
