"""Saving a checkpoint: all of it under a temporary name, then one rename, so that it is whole or not there."""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openm6 import __version__
from openm6.checkpoint import folder
from openm6.checkpoint.reader import TYPES, bytes_of
from openm6.core.errors import CheckpointError
from openm6.core.files import sync, to_json

FORMAT = 1


@dataclass(frozen=True)
class Shard:
    """The content of one pair of files: weights by name, and what the optimizer keeps, under `parameter::tensor`."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """All that one checkpoint holds."""

    step: int
    model: nn.Module
    optimizer: dict[str, Tensor]  # as `optimizer_state_dict` returns it; empty: no such file
    state: dict[str, Any]  # JSON-able; numbers that are not finite become null
    training: dict[str, Tensor] = field(default_factory=dict)  # of the training task, such as averaged weights
    files: dict[str, str | bytes] = field(default_factory=dict)  # more of them, beside the weights
    shards: Iterable[Shard] = ()  # offloaded layers, which the model does not hold, made one at a time
    num_shards: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # more of them, which no module holds
    kept: int | None = None  # the step of an earlier checkpoint that is not to be removed


def save(snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
    """Write `checkpoints/step-N`; keep the last `keep` and `kept`; a CheckpointError leaves earlier ones intact."""
    with open_partial(checkpoints, snapshot.step) as partial:
        named = {**named_tensors(snapshot.model), **snapshot.weights}
        tensors = {name: tensor for name, tensor in named.items() if not tensor.is_meta}
        if snapshot.num_shards:
            write_shards(partial, Shard(tensors, snapshot.optimizer), snapshot.shards, snapshot.num_shards)
        else:
            write_tensors(partial / folder.MODEL_FILE, tensors)
            if snapshot.optimizer:
                write_tensors(partial / folder.OPTIMIZER_FILE, snapshot.optimizer)
        return commit(snapshot, checkpoints, keep)


@contextmanager
def open_partial(checkpoints: Path, step: int) -> Iterator[Path]:
    """Make the folder to write to, without what killed ones left; if writing fails, remove it: CheckpointError."""
    partial = folder.partial_folder(checkpoints, step)
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        for left in folder.leftovers(checkpoints, step):
            folder.remove(left)
        partial.mkdir()
        yield partial
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder.step_folder(checkpoints, step)} could not be written ({error.strerror or error}): free some "
            "space or choose another folder, earlier checkpoints are intact"
        ) from error


def commit(snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
    """Add all but the weights and moments, which are written, and rename the folder; then remove older ones."""
    partial, target = (where(checkpoints, snapshot.step) for where in (folder.partial_folder, folder.step_folder))
    if snapshot.training:
        write_tensors(partial / folder.TRAINING_FILE, snapshot.training)
    for name, content in snapshot.files.items():
        (partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for path in partial.iterdir():
        sync(path)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    state = {"format": FORMAT, "openm6": __version__, "step": snapshot.step, "files": sizes, **snapshot.state}
    (partial / folder.STATE_FILE).write_text(to_json(state, indent=1), encoding="utf-8", newline="\n")
    sync(partial / folder.STATE_FILE)
    sync(partial)
    if target.exists():
        shutil.rmtree(target)  # a broken or older one of the same step
    os.rename(partial, target)
    sync(checkpoints)
    folder.prune(checkpoints, keep, snapshot.kept)
    return target


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file from the memory of the tensors to the disk, without a copy (but for those on a GPU)."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(tensors.items())  # the same bytes, in whatever order the tensors were made
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            stream.write(bytes_of(tensor.detach().cpu().contiguous()))


def write_shards(target: Path, first: Shard, others: Iterable[Shard], count: int) -> None:
    """Write `first` and `count` others as `model-00001-of-…`, each before the next is made, and the index."""
    weight_map: dict[str, str] = {}
    total = index = 0
    for index, shard in enumerate(chain([first], others)):
        ending = f"-{index + 1:05d}-of-{count + 1:05d}.safetensors"
        write_tensors(target / f"model{ending}", shard.model)
        if shard.optimizer:
            write_tensors(target / f"optimizer{ending}", shard.optimizer)
        weight_map |= dict.fromkeys(shard.model, f"model{ending}")
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.model.values())
    assert index == count, "as many shards as were announced"
    listing = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / folder.INDEX_FILE).write_text(json.dumps(listing, indent=1), encoding="utf-8", newline="\n")


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of a model, a shared one once, under the first of its names."""
    names: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor.detach() for name, tensor in tensors.items() if names.setdefault(id(tensor), name) == name}


class Saver:
    """Save at once, from one process; the base class of savers of shards."""

    def begin(self, snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
        """Write `checkpoints/step-N`, or start to; see `save`."""
        return save(snapshot, checkpoints, keep)

    def finish(self) -> None:
        """Wait until the last checkpoint is written; raise CheckpointError if it could not be."""
