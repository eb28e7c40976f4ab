"""Saving a checkpoint: all of it under a temporary name, then one rename, so that it is whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openm6 import __version__
from openm6.base.errors import CheckpointError
from openm6.base.files import sync_file, sync_folder, write_synced
from openm6.base.plain_json import to_json
from openm6.checkpoint.folder import (
    JOB_FILE,
    MODEL_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    clear_partial,
    partial_folder,
    prune,
    step_folder,
)
from openm6.checkpoint.shards import Shard, write_shards
from openm6.checkpoint.tensors import named_tensors, write_tensors

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """All that one checkpoint holds."""

    step: int
    model: nn.Module
    optimizer: dict[str, Tensor]  # as `optimizer_tensors` gives it; empty: no such file
    state: dict[str, Any]  # JSON-able; numbers that are not finite become null
    job: dict[str, Tensor] = field(default_factory=dict)  # tensors of the job, such as averaged weights
    files: dict[str, str] = field(default_factory=dict)  # text files beside the weights
    shards: Iterable[Shard] = ()  # weight sets that the model itself does not hold, made one at a time
    num_shards: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)  # more of them, which no module holds


def save(snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
    """Write `checkpoints/step-N` and remove all but the last `keep`.

    Raises:
        CheckpointError: the disk is full or not writable; the temporary folder is gone then, and earlier checkpoints
            are as they were.
    """
    partial = partial_folder(checkpoints, snapshot.step)
    with told_as_checkpoint_error(step_folder(checkpoints, snapshot.step), partial):
        checkpoints.mkdir(parents=True, exist_ok=True)
        clear_partial(checkpoints)
        partial.mkdir()
        _write_tensors_of(snapshot, partial)
        return publish(snapshot, checkpoints, keep)


@contextmanager
def told_as_checkpoint_error(target: Path, partial: Path) -> Iterator[None]:
    """Turns a failure to write into one sentence, and removes what was written in part."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{target} could not be written ({reason}): free some space or choose another folder, "
            "earlier checkpoints are intact"
        ) from error


def publish(snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
    """Adds all but the weights and moments, which are written, and gives the folder its name; then older ones go."""
    partial = partial_folder(checkpoints, snapshot.step)
    target = step_folder(checkpoints, snapshot.step)
    _complete(snapshot, partial)
    if target.exists():
        shutil.rmtree(target)  # a broken or older one of the same step
    os.rename(partial, target)
    sync_folder(checkpoints)
    prune(checkpoints, keep)
    return target


def _write_tensors_of(snapshot: Snapshot, folder: Path) -> None:
    named = {**named_tensors(snapshot.model), **snapshot.weights}
    tensors = {name: tensor for name, tensor in named.items() if not tensor.is_meta}
    if snapshot.num_shards:
        edges = Shard(tensors, snapshot.optimizer)
        write_shards(folder, edges, snapshot.shards, snapshot.num_shards)
        return
    write_tensors(folder / MODEL_FILE, tensors)
    if snapshot.optimizer:
        write_tensors(folder / OPTIMIZER_FILE, snapshot.optimizer)


def _complete(snapshot: Snapshot, folder: Path) -> None:
    if snapshot.job:
        write_tensors(folder / JOB_FILE, snapshot.job)
    for name, text in snapshot.files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for path in folder.iterdir():
        sync_file(path)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    state = {"format": FORMAT, "openm6": __version__, "step": snapshot.step, "files": sizes, **snapshot.state}
    write_synced(folder / STATE_FILE, to_json(state, indent=1).encode("utf-8"))
    sync_folder(folder)


class Saver:
    """Saves at once, from one process; the parent of ways that do it in parts, or beside the training."""

    def begin(self, snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
        """Writes `checkpoints/step-N`, or starts to; see `save`."""
        return save(snapshot, checkpoints, keep)

    def finish(self) -> None:
        """Waits until the last checkpoint is whole; raises CheckpointError where it could not be written."""
