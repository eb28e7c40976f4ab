"""Loading what a checkpoint holds into a model and an optimizer; nothing is ever unpickled."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openm6.base.errors import CheckpointError
from openm6.checkpoint.folder import JOB_FILE, MODEL_FILE
from openm6.checkpoint.optimizer import place_optimizer
from openm6.checkpoint.save import Saver
from openm6.checkpoint.shards import EXPONENT, INDEX_FILE, SEPARATOR, Catalogue
from openm6.checkpoint.tensors import named_tensors, open_tensors, read_into
from openm6.optim.low_precision import from_levels


def load_model(folder: Path, model: nn.Module, layout: Any = None) -> None:
    """Fill a placed model (not on `meta`) with the weights of a checkpoint folder.

    `layout` is that of parallel/fsdp.py if the model is sharded, all of which call this.

    Raises:
        CheckpointError: names or shapes differ, or the file is missing or unreadable.
    """
    if layout is not None or is_sharded(folder):
        _sharded().load_sharded_model(folder, model, layout)
        return
    if (folder / INDEX_FILE).exists():
        _load_shards(Catalogue(folder, "model"), named_tensors(model))
        return
    with open_tensors(folder / MODEL_FILE) as source:
        read_into(source, named_tensors(model))


def load_placed(folder: Path, model: nn.Module) -> Catalogue:
    """Fill what of a model is not on `meta`; gives the catalogue from which the rest may be read when it is needed.

    Raises:
        CheckpointError: as `load_model`.
    """
    catalogue = Catalogue(folder, "shard" if is_sharded(folder) else "model")
    _load_shards(catalogue, named_tensors(model))
    return catalogue


@torch.no_grad()
def read_weight(catalogue: Catalogue, name: str, target: Tensor) -> None:
    """One weight of however many bytes, as the target's dtype and device; raises CheckpointError if it is not there."""
    exponent = f"{name}{SEPARATOR}{EXPONENT}"
    if exponent in catalogue:
        target.copy_(from_levels(catalogue.read(name), catalogue.read(exponent), torch.float32))
    else:
        catalogue.read_into(name, target)


def _load_shards(catalogue: Catalogue, targets: dict[str, Tensor]) -> None:
    """All weights but those that stand on `meta`."""
    names = {name for name in catalogue.names if SEPARATOR not in name}
    if unknown := sorted(names - set(targets)):
        raise CheckpointError(
            f"{catalogue.folder} has {unknown[0]!r}, unknown to this model: "
            "load it with the config that it was saved with"
        )
    for name, target in targets.items():
        if not target.is_meta:
            read_weight(catalogue, name, target)


def load_job_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors that the job added to the checkpoint; empty if it added none."""
    path = folder / JOB_FILE
    if not path.exists():
        return {}
    with open_tensors(path) as source:
        return {name: source[name] for name in source.names}


def open_saver(layout: Any = None) -> Saver:
    """What saves a model of this layout (None: whole, in this process)."""
    return Saver() if layout is None else _sharded().ShardedSaver(layout)


def is_sharded(folder: Path) -> bool:
    """Whether ranks wrote their parts of the weights to files of their own."""
    return not (folder / MODEL_FILE).exists() and any(folder.glob("shard-*.safetensors"))


def load_parts(folder: Path, targets: dict[str, Tensor], known: set[str] | None) -> None:
    """Fills tensors, each of which may be a part that knows its place in the whole, from the files of any ranks.

    All ranks call it. `known`, if given, names all that the model has.

    Raises:
        CheckpointError: a weight that is not known, a tensor that is missing or of another shape, or no readable file.
    """
    _sharded().load_parts(folder, targets, known)


def _sharded() -> Any:
    """checkpoint/sharded.py, whose import takes seconds that others need not wait for."""
    return importlib.import_module("openm6.checkpoint.sharded")


def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module, layout: Any = None
) -> None:
    """Put the saved tensors in place of the optimizer's state; learning rates are left as they are.

    Raises:
        CheckpointError: the file is missing or unreadable, or names a parameter that the optimizer does not move.
    """
    if layout is not None or is_sharded(folder):
        _sharded().load_sharded_optimizer(folder, optimizer, model, layout)
        return
    catalogue = Catalogue(folder, "optimizer")
    # One tensor at a time: the file must not stand in memory beside the optimizer.
    pairs = ((name, catalogue.read(name)) for name in catalogue.names)
    place_optimizer(pairs, optimizer, model, str(folder))
