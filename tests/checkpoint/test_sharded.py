"""Checkpoints in parts: written by any mesh, read by any other and by one process; nothing is lost on the way."""

from __future__ import annotations

import shutil
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from openm6.checkpoint.folder import MODEL_FILE, latest, list_checkpoints
from openm6.checkpoint.load import load_model
from openm6.checkpoint.save import Snapshot
from openm6.checkpoint.sharded import ShardedSaver, Staging
from openm6.core.errors import CheckpointError
from openm6.core.run_folder import RunFolder
from openm6.distributed.config import MeshShape
from openm6.distributed.processes import DistributedContext
from openm6.inference.load import load
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe
from tests.devices import CPU, on_each_device
from tests.distributed.fleet import Fleet
from tests.distributed.recording_training import Records, run_steps
from tests.train.tiny_recipe import tiny_recipe, write_recipe

Axes = tuple[int, int, int]
STEPS = 9


def recipe_file(folder: Path) -> str:
    recipe = tiny_recipe(steps=STEPS, save_every=3, keep_last=9, num_processes=1)
    recipe["packing"] = {"batch_size": 4, "seq_len": 160, "num_shards": 4}
    return write_recipe(folder, recipe)


@cache
def unbroken() -> tuple[Records, dict[int, float], dict[str, Tensor]]:
    """Records, losses and last weights of one process that nothing disturbed."""
    with TemporaryDirectory() as name:
        recipe = recipe_file(Path(name))
        records, losses = run_steps(recipe, name, (1, 1, 1), 1, None)
        return records, losses, weights(recipe, latest(name))


def weights(recipe: str, checkpoint: Path) -> dict[str, Tensor]:
    """The whole model of a checkpoint, read by one process."""
    checked, _ = read_recipe(Path(recipe), [])
    with TemporaryDirectory() as name:
        shutil.copy(checkpoint / "tokenizer.json", name)
        training = MultimodalTraining(checked, RunFolder(Path(name)), torch.device("cpu"))
    load_model(checkpoint, training.model)
    return {name: tensor.detach() for name, tensor in training.model.state_dict().items()}


def wait_for(folder: Path, step: int) -> Path:
    """The checkpoint of a step, which a thread may still be writing."""
    checkpoint = folder / "checkpoints" / f"step-{step}"
    end = time.monotonic() + 60
    while checkpoint not in list_checkpoints(checkpoint.parent):
        assert time.monotonic() < end, f"{checkpoint} never came"
        time.sleep(0.02)
    return checkpoint


def together(parts: list[Records]) -> Records:
    """The records of all ranks, in their order, by step."""
    return {step: [record for part in parts for record in part[step]] for step in parts[0]}


@on_each_device
def test_copies_for_a_checkpoint_use_the_same_memory_again(device: torch.device) -> None:
    """Of any shape and dtype; the tensors may change as soon as the copies are there."""
    staging = Staging()
    tensors = {
        "matrix": torch.randn(300, 50, device=device).t(),
        "half": torch.randn(7, device=device).bfloat16(),
        "count": torch.tensor(3.0),
        "empty": torch.zeros(0, 4, device=device),
    }
    before, addresses = {name: tensor.clone().cpu() for name, tensor in tensors.items()}, []
    for _ in range(2):
        copies = staging.copy(tensors)
        addresses.append(copies["matrix"].data_ptr())
        for tensor in tensors.values():
            tensor.add_(1)
        assert all(torch.equal(copies[name], expected) and copies[name].is_cpu for name, expected in before.items())
        assert copies["matrix"].is_pinned() == (device != CPU)
        before = {name: tensor.clone().cpu() for name, tensor in tensors.items()}
    assert addresses[0] == addresses[1]
    assert staging.copy({"other": tensors["half"]})["other"].tolist() == before["half"].tolist()


MESHES: list[list[tuple[str, Axes]]] = [
    [("four", (1, 2, 2)), ("two", (1, 1, 2)), ("four", (2, 2, 1))],
    [("two", (1, 2, 1)), ("one", (1, 1, 1)), ("two", (2, 1, 1))],
]


@pytest.mark.parametrize("plan", MESHES)
def test_a_run_goes_on_with_another_number_of_ranks(
    plan: list[tuple[str, Axes]], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Killed two steps after each checkpoint: every step has the records of an unbroken run, and its loss."""
    recipe = recipe_file(tmp_path)
    records: Records = {}
    losses: dict[int, float] = {}
    for turn, (fleet, axes) in enumerate(plan):
        begin = 1 + 3 * turn
        fall_at = None if turn == 2 else begin + 5
        words: tuple[Any, ...] = (recipe, str(tmp_path), axes, begin, fall_at)
        answers = [run_steps(*words)] if fleet == "one" else request.getfixturevalue(fleet).run(run_steps, *words)
        records |= together([seen for seen, _ in answers])
        losses |= answers[0][1]
        checkpoint = wait_for(tmp_path, begin + 2)
        assert (checkpoint / MODEL_FILE).exists() is (max(axes[1:]) == 1)
        for later in (begin + 5,) if turn < 2 else ():  # the fall came before this one
            assert not (tmp_path / "checkpoints" / f"step-{later}").exists()
    expected, expected_losses, last = unbroken()
    assert records == expected
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    found = weights(recipe, latest(tmp_path))
    for name, tensor in last.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=5e-4, msg=name)


def test_the_same_ranks_go_on_bit_for_bit(tmp_path: Path, four: Fleet) -> None:
    recipe = recipe_file(tmp_path)
    four.run(run_steps, recipe, str(tmp_path / "whole"), (1, 2, 2), 1, None)
    four.run(run_steps, recipe, str(tmp_path / "broken"), (1, 2, 2), 1, 6)
    wait_for(tmp_path / "broken", 3)
    four.run(run_steps, recipe, str(tmp_path / "broken"), (1, 2, 2), 4, None)
    ours, theirs = (weights(recipe, latest(tmp_path / name)) for name in ("whole", "broken"))
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert_streamed(latest(tmp_path / "broken"), theirs)


def assert_streamed(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    """Layers that stay in the ranks' files have these weights when they are used."""
    assert not (checkpoint / MODEL_FILE).exists()
    backbone = load(checkpoint, torch.device("cpu"), num_gpu_layers=0).omni.backbone
    for layer in range(backbone.config.num_layers):
        for name, tensor in backbone.block(layer).named_parameters():
            assert torch.equal(tensor, weights[f"backbone.layers.{layer}.{name}"]), name


def failing_save(folder: str) -> tuple[str, list[str]]:
    """The sentence of a save whose disk is full, and what it has left."""
    ranks = DistributedContext(CPU, 60)
    ranks.open_mesh(MeshShape(1, 2, 1))
    assert ranks.layout is not None
    saver = ShardedSaver(ranks.layout)
    with patch("openm6.checkpoint.sharded.dcp.save", side_effect=OSError("No space left on device")):
        saver.begin(Snapshot(3, nn.Linear(2, 2), {}, {}), Path(folder), keep=1)
        with pytest.raises(CheckpointError) as caught:
            saver.finish()
    dist.barrier()
    return str(caught.value), [path.name for path in Path(folder).iterdir()]


def test_a_save_that_fails_leaves_no_part(tmp_path: Path, two: Fleet) -> None:
    for sentence, left in two.run(failing_save, str(tmp_path)):
        assert "could not be written (No space left on device)" in sentence and left == []


def test_a_missing_part_makes_a_checkpoint_incomplete(tmp_path: Path, two: Fleet) -> None:
    recipe = recipe_file(tmp_path)
    two.run(run_steps, recipe, str(tmp_path), (1, 1, 2), 1, None)
    last = latest(tmp_path)
    assert last.name == f"step-{STEPS}"
    next(last.glob("shard-00002-*")).unlink()
    assert latest(tmp_path).name == "step-6"
    with pytest.raises(CheckpointError, match=r"shard-00002.* is missing or cut short .*use an earlier"):
        latest(last)
