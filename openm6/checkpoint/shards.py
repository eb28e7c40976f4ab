"""safetensors files written straight from memory, one weight set each, and read back into the place kept for them.

A folder holds either one `model.safetensors`, or shards with an index as other tools read them; likewise the optimizer.
Where ranks wrote their parts of the tensors, the headers say where in the whole these lie.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openm6.base.errors import CheckpointError
from openm6.checkpoint.folder import MODEL_FILE, OPTIMIZER_FILE

INDEX_FILE = f"{MODEL_FILE}.index.json"
SEPARATOR = "::"  # between a parameter's name and the name of one of the tensors kept with it
PLACES, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # in the header of a file with parts, by torch
EXPONENT = "exponent"  # of int8 weights, which lies beside them
TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.int32: "I32", torch.int64: "I64", torch.float64: "F64", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {word: dtype for dtype, word in TYPES.items()}


@dataclass(frozen=True)
class Shard:
    """What one pair of files holds: weights by name, and what the optimizer keeps, under `parameter::tensor`."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def write_raw(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file whose bytes go from the tensors to the disk without a copy in between (but for a GPU's).

    Raises:
        OSError: the disk is full or the path cannot be written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    ordered = sorted(tensors.items())  # the same bytes, in whatever order the tensors came to be
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            stream.write(_bytes_of(tensor.detach().cpu().contiguous()))


def write_shards(folder: Path, first: Shard, others: Iterable[Shard], count: int) -> None:
    """`first` and `count` others as `model-00001-of-…`, each written before the next is asked for, and the index."""
    weight_map: dict[str, str] = {}
    total = 0
    number = 0
    for number, shard in enumerate(chain([first], others)):
        ending = f"-{number + 1:05d}-of-{count + 1:05d}.safetensors"
        write_raw(folder / f"model{ending}", shard.model)
        if shard.optimizer:
            write_raw(folder / f"optimizer{ending}", shard.optimizer)
        weight_map |= dict.fromkeys(shard.model, f"model{ending}")
        total += sum(tensor.numel() * tensor.element_size() for tensor in shard.model.values())
    assert number == count, "as many shards as were announced"
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class _Part:
    """A tensor in a file, which lies in the whole from `offsets` on; its bytes begin at `first`."""

    path: Path
    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: int

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(map(sum, zip(self.offsets, self.shape, strict=True)))

    def region(self, whole: Tensor) -> Tensor:
        """What of the whole it fills, as a view."""
        return whole[tuple(map(slice, self.offsets, self.end))]

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor)
        return tensor

    def read_into(self, target: Tensor) -> None:
        """Straight into the memory of `target` where that can be."""
        if not (target.is_cpu and target.is_contiguous() and target.dtype == self.dtype):
            target.copy_(self.read())
            return
        with self.path.open("rb") as stream:
            stream.seek(self.first)
            stream.readinto(_bytes_of(target))


class Catalogue:
    """All tensors of a checkpoint's weights, or of its optimizer, in however many files; read one at a time."""

    def __init__(self, folder: Path, kind: str) -> None:
        """`kind` is `model`, `optimizer`, or `shard` for what ranks wrote: their parts of both.

        Raises:
            CheckpointError: a file is missing or is not safetensors.
        """
        self.folder = folder
        whole = {"optimizer": OPTIMIZER_FILE}.get(kind, MODEL_FILE)
        paths = (
            [folder / whole] if (folder / whole).exists() else sorted(folder.glob(f"{kind}-*.safetensors"))
        )
        # What several ranks hold alike has one place, however often it was written.
        self._parts: dict[str, dict[tuple[int, ...], _Part]] = {}
        for part in chain.from_iterable(map(_parts_of, paths)):
            self._parts.setdefault(part.name, {})[part.offsets] = part
        if not paths:
            raise CheckpointError(f"{folder / whole} is missing: name a folder that holds a whole checkpoint")

    @property
    def names(self) -> list[str]:
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it.

        Raises:
            CheckpointError: there is not all of it.
        """
        parts = self._parts[name].values()
        shape = tuple(map(max, zip(*(part.end for part in parts), strict=True)))
        if sum(prod(part.shape) for part in parts) != prod(shape):
            raise CheckpointError(f"{self.folder} holds only parts of {name!r}: use another checkpoint")
        return shape

    def read(self, name: str) -> Tensor:
        """One tensor; raises as `shape` does."""
        shape, parts = self.shape(name), list(self._parts[name].values())
        if len(parts) == 1:
            return parts[0].read()
        read = [(part, part.read()) for part in parts]
        whole = torch.empty(shape, dtype=read[0][1].dtype)
        for part, tensor in read:
            part.region(whole).copy_(tensor)
        return whole

    def read_into(self, name: str, target: Tensor) -> None:
        """One tensor, straight into the memory of `target` where it is of the same type and on the host.

        Raises:
            CheckpointError: there is none of this name, or not all of it, or it has another shape.
        """
        if name not in self._parts:
            raise CheckpointError(
                f"{self.folder} lacks {name!r}: it is of another size, stage or number of bytes a parameter; "
                "turn it with openm6 convert, or go on with the config that it was saved with"
            )
        if (shape := self.shape(name)) != tuple(target.shape):
            raise CheckpointError(
                f"{self.folder}: {name!r} has shape {list(shape)}, the model wants {list(target.shape)}: "
                "load it with the config that it was saved with"
            )
        for part in self._parts[name].values():
            part.read_into(part.region(target))


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _parts_of(path: Path) -> list[_Part]:
    """All that a file holds, from its header alone, which is read once."""
    try:
        with safe_open(str(path), framework="pt") as file:  # checks that the file is whole
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [
            _Part(
                path,
                name,
                tuple(places[name][OFFSETS]) if name in places else (0,) * len(entry["shape"]),
                tuple(entry["shape"]),
                DTYPES[entry["dtype"]],
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        ]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): use another checkpoint"
        ) from None
