"""Checkpoints of which each rank writes its part, by torch's distributed checkpoint, as safetensors without any pickle.

A file holds parts of tensors and, in its header, where in the whole they lie. So any number of ranks, in any mesh, can
read what any other wrote, and one process can, too; the files of an unsharded checkpoint count as a single part.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from openm6.base.errors import CheckpointError
from openm6.checkpoint.folder import clear_partial, partial_folder, step_folder
from openm6.checkpoint.optimizer import place_optimizer
from openm6.checkpoint.save import Saver, Snapshot, publish, told_as_checkpoint_error
from openm6.checkpoint.shards import EXPONENT, SEPARATOR
from openm6.checkpoint.tensors import named_tensors
from openm6.optim.low_precision import from_levels
from openm6.optim.pieces import keeps_cut
from openm6.parallel.fsdp import Layout, expert_parameters, with_places
from openm6.parallel.sharded_weights import local, piece_of

FILE_BYTES = 2**28  # of a rank's file, unless one tensor is larger


class ShardedSaver(Saver):
    """Saves while training goes on: it stops only for the copy to the host."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.host = layout.on_host()
        # Of its own: messages of a thread that saves must not mix with those of training.
        self.group = dist.new_group(backend="gloo")
        self._pending: Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
        """Starts to write `checkpoints/step-N`; the tensors may change as soon as this returns. All ranks call it.

        Raises:
            CheckpointError: the save before this one has failed, or the folder cannot be made.
        """
        self.finish()
        partial, target = (make(checkpoints, snapshot.step) for make in (partial_folder, step_folder))
        if dist.get_rank() == 0:
            with told_as_checkpoint_error(target, partial):
                checkpoints.mkdir(parents=True, exist_ok=True)
                clear_partial(checkpoints)
                partial.mkdir()
        dist.barrier(group=self.group)
        named = {**named_tensors(snapshot.model), **snapshot.optimizer}
        named = {name: tensor for name, tensor in named.items() if not tensor.is_meta}
        parts = with_places(snapshot.model, named, self.layout)
        copies = {name: self._copy(tensor) for name, tensor in parts.items()}
        for shard in snapshot.shards:
            copies |= {**shard.model, **shard.optimizer}
        self._pending = Thread(target=self._write, args=(copies, snapshot, checkpoints, keep), daemon=True)
        self._pending.start()
        if snapshot.num_shards:  # too large to be copied: training waits until they are written
            self.finish()
        return target

    def finish(self) -> None:
        """Waits until the last checkpoint is whole.

        Raises:
            CheckpointError: it could not be written; earlier ones are intact.
        """
        if self._pending is not None:
            self._pending.join()
            self._pending = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(
                f"a checkpoint could not be written ({_reason(failure)}): free some space or choose another "
                "folder, earlier checkpoints are intact"
            ) from failure

    def _copy(self, tensor: Tensor) -> Tensor:
        """On the host. Not by `dcp.async_save`, whose staging copies the mesh along with each tensor."""
        if not isinstance(tensor, DTensor):
            return tensor.detach().to("cpu", copy=True)
        part = tensor.to_local().detach().to("cpu", copy=True)
        mesh = self.host.find(tensor.device_mesh.mesh_dim_names or ())
        return DTensor.from_local(
            part, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write(self, copies: dict[str, Tensor], snapshot: Snapshot, checkpoints: Path, keep: int) -> None:
        """In a thread: once all ranks have written, rank 0 gives the checkpoint its name."""
        partial = partial_folder(checkpoints, snapshot.step)
        writer = HuggingFaceStorageWriter(str(partial), _files(copies), save_distributed=True)
        try:
            dcp.save(copies, storage_writer=writer, process_group=self.group)
            if dist.get_rank() == 0:
                publish(snapshot, checkpoints, keep)
        except BaseException as error:  # CheckpointException is no Exception
            self._failure = error


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number of the file that each tensor goes to: torch builds a file in memory, twice, before it writes it."""
    numbers, number, held = {}, 1, 0
    for name, tensor in tensors.items():
        size = local(tensor).numel() * tensor.element_size()
        if held and held + size > FILE_BYTES:
            number, held = number + 1, 0
        numbers[name], held = number, held + size
    return numbers


def load_sharded_model(folder: Path, model: nn.Module, layout: Layout | None) -> None:
    """As `load_model`, for a model or a checkpoint that lies in parts."""
    targets = named_tensors(model)
    metadata = _metadata(folder)
    saved = {name: entry for name, entry in metadata.items() if SEPARATOR not in name}
    if layout is not None:
        targets = with_places(model, targets, layout)
    _compare(folder, saved, targets)
    levels = {name for name in targets if f"{name}{SEPARATOR}{EXPONENT}" in metadata}
    _read(folder, {name: target for name, target in targets.items() if name not in levels})
    for name in levels:
        _read_levels(folder, name, targets[name], metadata)


@torch.no_grad()
def _read_levels(folder: Path, name: str, target: Tensor, metadata: dict[str, TensorStorageMetadata]) -> None:
    """Weights of one byte, as those of a process that holds all of a model."""
    names = (name, f"{name}{SEPARATOR}{EXPONENT}")
    read = {one: torch.zeros(metadata[one].size, dtype=metadata[one].properties.dtype) for one in names}
    _read(folder, read)
    target.copy_(from_levels(read[names[0]], read[names[1]], torch.float32))


def load_parts(folder: Path, targets: dict[str, Tensor], known: set[str] | None) -> None:
    """See `openm6.checkpoint.load.load_parts`."""
    metadata = _metadata(folder)
    unknown = {name.partition(SEPARATOR)[0] for name in metadata} - known if known is not None else set()
    if unknown:
        raise CheckpointError(
            f"{folder} has {min(unknown)!r}, unknown to this model: "
            "turn it with openm6 convert, or load it with the config that it was saved with"
        )
    _compare(folder, {name: entry for name, entry in metadata.items() if name in targets}, targets)
    _read(folder, targets)


def load_sharded_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module, layout: Layout | None
) -> None:
    """As `load_optimizer`, for a model or a checkpoint that lies in parts."""
    parameters = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}
    experts = {name for name, _ in expert_parameters(model)}
    slots: dict[str, Tensor] = {}
    for name, entry in _metadata(folder).items():
        owner, _, key = name.partition(SEPARATOR)
        if key and owner in parameters:
            slots[name] = _empty_slot(key, parameters[owner], entry, owner in experts)
    _read(folder, slots if layout is None else with_places(model, slots, layout))
    place_optimizer(slots.items(), optimizer, model, str(folder))


def _empty_slot(key: str, parameter: Tensor, entry: TensorStorageMetadata, dealt: bool) -> Tensor:
    """Room for what lies here of a tensor kept for a parameter, of which experts are `dealt` out or not."""
    dtype, shape = entry.properties.dtype, list(entry.size)
    if len(shape) != parameter.dim() or not shape:
        return torch.zeros(shape, dtype=dtype)
    if dealt:
        shape[0] = parameter.shape[0]
    if not isinstance(parameter, DTensor):
        return torch.zeros(shape, dtype=dtype, device=parameter.device)
    piece = piece_of(parameter)
    if keeps_cut(key, piece.axis, parameter.dim()) and piece.group is not None:
        shape[piece.axis] = piece.lengths[piece.group.rank]
    return piece.slot(key, torch.zeros(shape, dtype=dtype, device=parameter.device))


def _metadata(folder: Path) -> dict[str, TensorStorageMetadata]:
    metadata: Metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _compare(folder: Path, saved: dict[str, TensorStorageMetadata], targets: dict[str, Tensor]) -> None:
    mend = "load it with the config that it was saved with"
    for name in sorted(set(saved) ^ set(targets)):
        where = "lacks" if name in targets else "has, unknown to this model,"
        raise CheckpointError(f"{folder} {where} {name!r}: {mend}")
    for name, target in targets.items():
        if saved[name].size != target.shape:
            raise CheckpointError(
                f"{folder}: {name!r} has shape {list(saved[name].size)}, the model wants "
                f"{list(target.shape)}: {mend}"
            )


def _read(folder: Path, targets: dict[str, Tensor]) -> None:
    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(targets, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read ({_reason(error)}): use another checkpoint") from None


def _reason(error: BaseException) -> str:
    """The last line of the first rank's failure."""
    if isinstance(error, CheckpointException):
        failure = next(iter(error.failures.values()))[0]
        return str(failure).strip().splitlines()[-1]
    return str(error)
