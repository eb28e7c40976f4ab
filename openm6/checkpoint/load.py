"""Loading a checkpoint into a model and an optimizer; nothing is ever unpickled."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import EXPONENT, MODEL_FILE, SEPARATOR, TRAINING_FILE, read_state
from openm6.checkpoint.optimizer import load_optimizer_state
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Saver, named_tensors
from openm6.core.errors import CheckpointError
from openm6.optim.low_precision import from_levels

Names = tuple[str, ...]


def open_reader(folder: Path, kind: str = "model") -> CheckpointReader:
    """Return the reader of the weights (`model`) or moments (`optimizer`), also in files of ranks, which hold both."""
    sharded = not (folder / MODEL_FILE).exists() and any(folder.glob("shard-*.safetensors"))
    return CheckpointReader(folder, "all" if sharded else kind)


def load_model(folder: Path, model: nn.Module, layout: Any = None) -> None:
    """Fill a model (not on `meta`) from a folder, on all ranks of a `layout`; CheckpointError if it does not fit."""
    targets = named_tensors(model)
    if meta := [name for name, target in targets.items() if target.is_meta]:
        raise ValueError(f"{meta[0]} is on the meta device; move the model to a device before loading into it")
    if layout is None:
        load_placed(folder, model)
        return
    reader = open_reader(folder)
    check_names(reader, set(targets), set(targets))
    load_parts(reader, _sharded().with_offsets(model, targets, layout))


def load_placed(folder: Path, model: nn.Module, new: Names = (), unread: Names = ()) -> CheckpointReader:
    """Fill what of a model is not on `meta`, as `load_model`; return the reader, for the rest when it is needed.

    Names with one of `new` in them may be missing there, those with one of `unread` are passed over.
    """
    reader, named = open_reader(folder), named_tensors(model)
    missing = {name for name in named if name not in reader and any(part in name for part in new)}
    passed = {name for name in {*named, *reader.names} if any(part in name for part in unread)}
    targets = {key: tensor for key, tensor in named.items() if not tensor.is_meta and key not in missing | passed}
    check_names(reader, set(targets), set(named) | passed)
    for name, target in targets.items():  # before anything is copied
        if reader.shape(name) != tuple(target.shape):
            reader.read_into(name, target)  # raises
    for name, target in targets.items():
        read_weight(reader, name, target)
    return reader


def load_parts(reader: CheckpointReader, targets: dict[str, Tensor]) -> None:
    """Fill tensors, each of which may be a shard with its position in the whole; raises as `read_into`."""
    for name, target in targets.items():
        if type(target) is Tensor:
            reader.read_into(name, target)
        else:
            _sharded().read_shard(reader, name, target)


@torch.no_grad()
def read_weight(reader: CheckpointReader, name: str, target: Tensor) -> None:
    """Read a weight of any number of bytes, as the target's dtype and device; raises as `read_into`."""
    exponent = f"{name}{SEPARATOR}{EXPONENT}"
    if exponent in reader:
        target.copy_(from_levels(reader.read(name), reader.read(exponent), torch.float32))
    else:
        reader.read_into(name, target)


def load_training_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors that the training task added to the checkpoint; empty if it added none."""
    if not (folder / TRAINING_FILE).exists():
        return {}
    reader = CheckpointReader(folder, "training")
    return {name: reader.read(name) for name in reader.names}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module, layout: Any = None) -> None:
    """Replace the optimizer's state, but not learning rates, by that saved; CheckpointError if it does not fit."""
    if not any(name.startswith(("optimizer", "shard")) for name in read_state(folder)["files"]):
        optimizer.state.clear()  # it was saved before the first step that was applied
        return
    reader = open_reader(folder, "optimizer")
    if layout is not None:
        tensors = _sharded().optimizer_shards(reader, model, layout)
    else:
        offloaded = {name for name, tensor in model.named_parameters() if tensor.is_meta}
        names = [name for name in reader.names if SEPARATOR in name]  # files of ranks also hold weights
        kept = [name for name in names if name.partition(SEPARATOR)[0] not in offloaded]
        # One tensor at a time: the file must not be in memory beside the optimizer.
        tensors = ((name, reader.read(name)) for name in kept)
    load_optimizer_state(tensors, optimizer, model, str(folder))


def open_saver(layout: Any = None) -> Saver:
    """Return what saves a model of this layout (None: whole, in this process)."""
    return Saver() if layout is None else _sharded().ShardedSaver(layout)


def check_names(reader: CheckpointReader, needed: set[str], known: set[str]) -> None:
    """Raise CheckpointError for a weight that is missing, or one, or a tensor kept with one, that is not known."""
    saved = {name.partition(SEPARATOR)[0] for name in reader.names}
    fix = "load it with the config that it was saved with, or convert it with openm6 convert"
    if missing := sorted(needed - set(reader.names)):
        raise CheckpointError(f"{reader.folder} lacks {_listed(missing)}: {fix}")
    if unknown := sorted(saved - known):
        raise CheckpointError(f"{reader.folder} has {_listed(unknown)}, unknown to this model: {fix}")


def _listed(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _sharded() -> ModuleType:
    # torch.distributed.tensor takes seconds to import, for sharded models only
    from openm6.checkpoint import sharded  # noqa: PLC0415

    return sharded
