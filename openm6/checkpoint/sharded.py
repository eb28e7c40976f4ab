"""Sharded checkpoints: each rank writes its shards, by torch's distributed checkpoint, as safetensors without pickle.

A file states in its header where in the whole its shards are: any number of ranks, in any mesh, can read them.
"""

import mmap
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openm6.checkpoint.folder import SEPARATOR, partial_folder, step_folder
from openm6.checkpoint.reader import CheckpointReader, Shape
from openm6.checkpoint.save import Saver, Snapshot, commit, named_tensors, open_partial
from openm6.core.errors import CheckpointError
from openm6.distributed.fsdp import Layout, as_part, expert_parameters, local, shard_spec_of, with_offsets
from openm6.offload.pinned_memory import PinnedArena
from openm6.optim.sharding import is_sharded_along

FILE_BYTES = 2**28  # of a rank's file, unless one tensor is larger


class Staging:
    """Host memory for the tensors of checkpoints, pinned for those of a GPU, whose copies else take thrice as long."""

    def __init__(self) -> None:
        self._arena: PinnedArena | None = None
        self._sizes: list[int] = []

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return copies, which the next call overwrites. It waits for the device once for all of them."""
        sizes = [-(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for tensor in tensors.values()]
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if self._arena is None or sizes != self._sizes:
            if self._arena is not None:
                self._arena.close()
            self._arena, self._sizes = PinnedArena(sizes, pin=bool(devices)), sizes
        copies: dict[str, Tensor] = {}
        for buffer, (name, tensor) in zip(self._arena.buffers, tensors.items(), strict=True):
            copies[name] = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copies[name].copy_(tensor, non_blocking=True)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copies


class ShardedSaver(Saver):
    """Save while training continues, which waits only for the copy to the host."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.host = layout.on_host()
        self._staging = Staging()
        # A group of its own: messages of a thread that saves must not mix with those of training.
        self.group = dist.new_group(backend="gloo", timeout=layout.timeout)
        self._pending: Thread | None = None
        self._failure: BaseException | None = None

    def begin(self, snapshot: Snapshot, checkpoints: Path, keep: int) -> Path:
        """Start to write `checkpoints/step-N`, on all ranks, which may go on; CheckpointError: the last failed."""
        self.finish()
        if dist.get_rank() == 0:
            with open_partial(checkpoints, snapshot.step):
                pass  # all ranks write to it, later
        dist.barrier(group=self.group)
        named = {**named_tensors(snapshot.model), **snapshot.optimizer}
        named = {name: tensor for name, tensor in named.items() if not tensor.is_meta}
        parts = with_offsets(snapshot.model, named, self.layout)
        staged = self._staging.copy({name: local(tensor).detach() for name, tensor in parts.items()})
        copies = dict(staged)
        for name, tensor in parts.items():
            if isinstance(tensor, DTensor):  # not by `dcp.async_save`, whose staging copies the mesh with each tensor
                mesh = self.host.find(tensor.device_mesh.mesh_dim_names or ())
                copies[name] = as_part(staged[name], mesh, tensor.placements, tensor.shape)
        for shard in snapshot.shards:
            copies |= {**shard.model, **shard.optimizer}
        self._pending = Thread(target=self._write, args=(copies, snapshot, checkpoints, keep), daemon=True)
        self._pending.start()
        if snapshot.num_shards:  # too large to be copied: training waits until they are written
            self.finish()
        return step_folder(checkpoints, snapshot.step)

    def finish(self) -> None:
        """Wait until the last checkpoint is written; CheckpointError if it could not be: earlier ones are intact."""
        if self._pending is not None:
            self._pending.join()
            self._pending = None
        failure, self._failure = self._failure, None
        if failure is not None:
            reason = str(failure)
            if isinstance(failure, CheckpointException):  # the last line of the first rank's failure
                reason = str(next(iter(failure.failures.values()))[0]).strip().splitlines()[-1]
            raise CheckpointError(
                f"a checkpoint could not be written ({reason}): free some space or choose another "
                "folder, earlier checkpoints are intact"
            ) from failure

    def _write(self, copies: dict[str, Tensor], snapshot: Snapshot, checkpoints: Path, keep: int) -> None:
        """In a thread: once all ranks have written, rank 0 renames the checkpoint."""
        partial, main = partial_folder(checkpoints, snapshot.step), dist.get_rank() == 0
        writer = HuggingFaceStorageWriter(str(partial), _files(copies), save_distributed=True)
        try:
            dcp.save(copies, storage_writer=writer, process_group=self.group)
            try:
                if main:
                    commit(snapshot, checkpoints, keep)
            finally:
                dist.barrier(group=self.group)  # after it, all ranks may read the checkpoint
        except BaseException as error:  # CheckpointException is no Exception
            self._failure = error
            if main:  # another rank's wait may have ended while this one still commits
                shutil.rmtree(partial, ignore_errors=True)


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the index of the file that each tensor goes to: torch holds a file in memory, twice, to write it."""
    indices, index, held = {}, 1, 0
    for name, tensor in tensors.items():
        size = local(tensor).numel() * tensor.element_size()
        if held and held + size > FILE_BYTES:
            index, held = index + 1, 0
        indices[name], held = index, held + size
    return indices


@torch.no_grad()
def read_shard(reader: CheckpointReader, name: str, target: Tensor) -> None:
    """Read what this rank holds of a tensor, of a plain one all; raises as `CheckpointReader.read_into`."""
    if not isinstance(target, DTensor):
        reader.read_into(name, target)
        return
    _, offsets = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    reader.read_into(name, target.to_local(), offsets, target.shape)


def optimizer_shards(reader: CheckpointReader, model: nn.Module, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """Read what this rank holds of an optimizer's tensors; see `load_optimizer`."""
    parameters = {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}
    experts = {name for name, _ in expert_parameters(model)}
    for name in reader.names:
        owner, _, key = name.partition(SEPARATOR)
        if key and owner in parameters:
            slot = _empty_slot(key, parameters[owner], reader.shape(name), reader.dtype(name), owner in experts)
            read_shard(reader, name, with_offsets(model, {name: slot}, layout)[name])
            yield name, slot


def _empty_slot(key: str, parameter: Tensor, size: Shape, dtype: torch.dtype, distributed: bool) -> Tensor:
    """Memory for this rank's part of a tensor kept for a parameter, whose experts are on several ranks or not."""
    shape = list(size)
    if len(shape) != parameter.dim() or not shape:
        return torch.zeros(shape, dtype=dtype)
    if distributed:
        shape[0] = parameter.shape[0]
    spec = shard_spec_of(parameter)
    if is_sharded_along(key, spec.axis, parameter.dim()) and spec.group is not None:
        shape[spec.axis] = spec.lengths[spec.group.rank()]
    return spec.slot(key, torch.zeros(shape, dtype=dtype, device=parameter.device))
