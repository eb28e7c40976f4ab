"""Reading a checkpoint: all tensors in any number of safetensors files, whole or in shards, by name and one at a time.

A folder holds one `model.safetensors`, or several files with an index as other libraries read them; likewise the
optimizer. If ranks wrote their shards of the tensors, the headers state where in the whole these are.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openm6.checkpoint.folder import MODEL_FILE, PREDICTORS_FILE, TRAINING_FILE
from openm6.core.errors import CheckpointError

SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in the header of a file with shards, by torch
TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float64: "F64", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {word: dtype for dtype, word in TYPES.items()}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """A tensor in a file, which is at `offsets` in the whole; its bytes begin at `first`."""

    path: Path
    name: str
    offsets: Shape
    shape: Shape
    dtype: torch.dtype
    first: int

    @property
    def end(self) -> Shape:
        return tuple(map(sum, zip(self.offsets, self.shape, strict=True)))

    def copy_to(self, target: Tensor, offsets: Shape) -> None:
        """Copy to `target`, which is at `offsets` in the whole, what both have in common."""
        limits = [start + size for start, size in zip(offsets, target.shape, strict=True)]
        common = [(max(a, b), min(c, d)) for a, b, c, d in zip(offsets, self.offsets, limits, self.end, strict=True)]
        if any(start >= stop for start, stop in common):
            return
        here = target[tuple(slice(a - own, b - own) for (a, b), own in zip(common, offsets, strict=True))]
        whole = here.shape == self.shape
        if whole and here.is_cpu and here.is_contiguous() and here.dtype == self.dtype:
            with self.path.open("rb") as stream:  # straight into the memory of the target
                stream.seek(self.first)
                stream.readinto(bytes_of(here))
            return
        mapped = np.memmap(self.path, np.uint8, "c", self.first, (prod(self.shape) * self.dtype.itemsize,))
        own = tuple(slice(a - mine, b - mine) for (a, b), mine in zip(common, self.offsets, strict=True))
        here.copy_(torch.from_numpy(mapped).view(self.dtype).view(self.shape)[own])


class CheckpointReader:
    """All tensors of a checkpoint's weights, or of its optimizer; each file's header is parsed once."""

    def __init__(self, folder: Path, kind: str) -> None:
        """`kind`: `model`, `optimizer`, `training`, or `all` for the first two; else a CheckpointError."""
        self.folder = folder
        whole = folder / (MODEL_FILE if kind == "all" else f"{kind}.safetensors")
        if kind == "all":
            others = (TRAINING_FILE, PREDICTORS_FILE)
            paths = sorted(path for path in folder.glob("*.safetensors") if path.name not in others)
        else:
            paths = [whole] if whole.exists() else sorted(folder.glob(f"{kind}-*.safetensors"))
        if not paths:
            raise CheckpointError(f"{whole} is missing: name a folder that holds a whole checkpoint")
        self._parts: dict[str, dict[Shape, _Part]] = {}
        for part in chain.from_iterable(map(_parts_of, paths)):  # copies that several ranks hold count once
            self._parts.setdefault(part.name, {})[part.offsets] = part

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> Shape:
        """Return the shape of one tensor, without reading it; raise CheckpointError if a part of it is missing."""
        parts = self._parts[name].values()
        shape = tuple(map(max, zip(*(part.end for part in parts), strict=True)))
        if sum(prod(part.shape) for part in parts) != prod(shape):
            raise CheckpointError(f"{self.folder} holds only parts of {name!r}: use another checkpoint")
        return shape

    def dtype(self, name: str) -> torch.dtype:
        return next(iter(self._parts[name].values())).dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return one tensor, or the rows from `start` to `stop` of it, on the host; raises as `shape` does."""
        shape = self.shape(name)
        inner = shape if rows is None else (rows.stop - rows.start, *shape[1:])
        tensor = torch.empty(inner, dtype=self.dtype(name))
        self.read_into(name, tensor, None if rows is None else (rows.start, *[0] * (len(shape) - 1)), shape)
        return tensor

    @torch.no_grad()
    def read_into(
        self, name: str, target: Tensor, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> None:
        """Read one tensor straight into the memory of `target` if that is on the host and of the same dtype.

        `target` may be a region of the whole, which has this `shape`, at `offsets`. CheckpointError: there is none of
        this name, or a part is missing, or it has another shape.
        """
        if name not in self._parts:
            raise CheckpointError(
                f"{self.folder} lacks {name!r}: it is of another size, stage or precision; "
                "convert it with openm6 convert, or go on with the config that it was saved with"
            )
        expected = tuple(target.shape if shape is None else shape)
        if (found := self.shape(name)) != expected:
            raise CheckpointError(
                f"{self.folder}: {name!r} has shape {list(found)}, the model expects {list(expected)}: "
                "load it with the config that it was saved with"
            )
        at = (0,) * len(expected) if offsets is None else tuple(offsets)
        for part in self._parts[name].values():
            part.copy_to(target, at)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _parts_of(path: Path) -> list[_Part]:
    """All that a file holds, from its header alone."""
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that the file is whole
            sharding = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        parts = []
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(f"{path}: {name} is of the type {entry['dtype']}: choose weights in bf16 or fp32")
            shape, first = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            offsets = tuple(sharding[name][OFFSETS]) if name in sharding else (0,) * len(shape)
            parts.append(_Part(path, name, offsets, shape, DTYPES[entry["dtype"]], first))
        return parts
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}): use another checkpoint") from None
