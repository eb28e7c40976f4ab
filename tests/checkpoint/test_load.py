"""What a checkpoint gives back, and what it says where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from openm6.checkpoint.load import load_model, load_optimizer, load_training_tensors
from openm6.checkpoint.optimizer import optimizer_state_dict
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Snapshot, save
from openm6.core.errors import CheckpointError
from openm6.optim.config import OptimizerConfig
from openm6.optim.registry import OPTIMIZERS, build_optimizer, default_groups


class Tied(nn.Module):
    """A word table that is also the head, a buffer that is kept and one that is not."""

    def __init__(self, words: int = 6, width: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("kept", torch.rand(3))
        self.register_buffer("scratch", torch.rand(2), persistent=False)


def saved(model: nn.Module, folder: Path) -> Path:
    return save(Snapshot(1, model, {}, {}), folder, keep=1)


def test_shared_weights_are_stored_once_and_come_back_shared(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = Tied(), Tied()
    folder = saved(first, tmp_path)
    saved_names = sorted(CheckpointReader(folder, "model").names)
    assert saved_names == ["kept", "layer.bias", "layer.weight", "table.weight"]
    load_model(folder, second)
    assert second.head.weight is second.table.weight
    assert torch.equal(second.head.weight, first.table.weight)
    assert torch.equal(second.kept, first.kept)
    assert not torch.equal(second.scratch, first.scratch)


def test_weights_come_back_in_the_models_own_type(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    folder = saved(model, tmp_path)
    half = nn.Linear(3, 3, dtype=torch.bfloat16)
    load_model(folder, half)
    assert torch.equal(half.weight, model.weight.bfloat16())


def test_bfloat16_and_strided_tensors_survive(tmp_path: Path) -> None:
    model = nn.Linear(5, 3, dtype=torch.bfloat16)
    model.weight = nn.Parameter(torch.rand(5, 3, dtype=torch.bfloat16).t())
    folder = saved(model, tmp_path)
    again = nn.Linear(5, 3, dtype=torch.bfloat16)
    load_model(folder, again)
    assert torch.equal(again.weight, model.weight)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Tied(words=7),
            r"'table.weight' has shape \[6, 4\], the model expects \[7, 4\]: load it with the config",
        ),
        (nn.Linear(2, 2), r"lacks 'bias' and 1 more: load it with the config"),
        (nn.Sequential(), r"has 'kept' and 3 more, unknown to this model: load it with the config"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, model: nn.Module, sentence: str) -> None:
    folder = saved(Tied(), tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=sentence):
        load_model(folder, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_missing_or_foreign_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load_model(tmp_path, Tied())
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04 not safetensors at all")
    with pytest.raises(CheckpointError, match="is not a readable safetensors file"):
        load_model(tmp_path, Tied())


def test_a_model_on_meta_is_not_filled_in_silence(tmp_path: Path) -> None:
    folder = saved(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="move the model"):
        load_model(folder, nn.Linear(2, 2, device="meta"))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(4.0).expand(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.01)
    torch.manual_seed(2)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    ours = build_optimizer(default_groups(first), config)
    for _ in range(3):
        one_step(first, ours)
    folder = save(Snapshot(3, first, optimizer_state_dict(ours, first), {}), tmp_path, keep=1)
    theirs = build_optimizer(default_groups(second), config)
    one_step(second, theirs)  # state of its own, which must go
    load_model(folder, second)
    load_optimizer(folder, theirs, second)
    for _ in range(2):
        one_step(first, ours)
        one_step(second, theirs)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_a_checkpoint_of_before_the_first_update_has_no_state(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(default_groups(model), OptimizerConfig())
    folder = save(Snapshot(1, model, optimizer_state_dict(optimizer, model), {}), tmp_path, keep=1)
    one_step(model, optimizer)
    load_optimizer(folder, optimizer, model)
    assert not optimizer.state


def test_state_for_a_parameter_that_is_not_trained_is_told(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = build_optimizer(default_groups(model), OptimizerConfig())
    one_step(model, optimizer)
    folder = save(Snapshot(1, model, optimizer_state_dict(optimizer, model), {}), tmp_path, keep=1)
    model.bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match="state for 'bias', which is not trained here"):
        load_optimizer(folder, build_optimizer(default_groups(model), OptimizerConfig()), model)


def test_a_parameter_outside_the_model_is_a_mistake() -> None:
    inside, outside = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = build_optimizer(default_groups(outside), OptimizerConfig())
    one_step(outside, optimizer)
    with pytest.raises(ValueError, match="not part of the training task's model"):
        optimizer_state_dict(optimizer, inside)


def test_the_training_tensors(tmp_path: Path) -> None:
    average = torch.rand(2, 3)
    folder = save(Snapshot(1, nn.Linear(1, 1), {}, {}, training={"average": average}), tmp_path / "with", keep=1)
    assert torch.equal(load_training_tensors(folder)["average"], average)
    assert load_training_tensors(saved(nn.Linear(1, 1), tmp_path / "without")) == {}
