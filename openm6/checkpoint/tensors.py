"""Tensors by name in one safetensors file, with failures told in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openm6.base.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors`; each must own its memory (see `named_tensors` for models that share weights).

    Raises:
        OSError: the disk is full or the path cannot be written.
    """
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, str(path), metadata={"format": "pt"})
    except SafetensorError as error:  # its writer wraps the system's error in words of its own
        raise OSError(str(error)) from error


class TensorFile:
    """An open safetensors file: tensors are read one at a time, so a large file never stands twice in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safe_open(str(path), framework="pt")
        self.names: list[str] = list(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing or is not safetensors.
    """
    try:
        yield TensorFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: name a folder that holds a whole checkpoint") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): use another checkpoint"
        ) from None


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers of a model, a shared one once, under the first of its names."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def read_into(source: TensorFile, targets: Mapping[str, Tensor]) -> None:
    """Copy every tensor of the file into the target of the same name, as the target's dtype and device.

    Raises:
        CheckpointError: a name that only one side has, or two shapes that differ; nothing is copied then.
    """
    _compare(source, targets)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(source[name])


def _compare(source: TensorFile, targets: Mapping[str, Tensor]) -> None:
    mend = "load it with the config that it was saved with"
    if missing := sorted(set(targets) - set(source.names)):
        raise CheckpointError(f"{source.path} lacks {_listed(missing)}: {mend}")
    if unknown := sorted(set(source.names) - set(targets)):
        raise CheckpointError(f"{source.path} has {_listed(unknown)}, unknown to this model: {mend}")
    for name, target in targets.items():
        if target.is_meta:
            raise ValueError(f"{name} is on the meta device; place the model before loading into it")
        if source.shape(name) != tuple(target.shape):
            found, wanted = list(source.shape(name)), list(target.shape)
            raise CheckpointError(
                f"{source.path}: {name!r} has shape {found}, the model wants {wanted}: {mend}"
            )


def _listed(names: list[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
