"""Layers that come to the device as they are used: the first few stay, the others pass through two buffers.

On a processor their weights stay in the checkpoint's files and are read for each use. On a GPU they lie in host
memory, registered with it, and the next layer arrives on a stream of its own while one computes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from openm6.checkpoint.load import load_placed, read_weight
from openm6.checkpoint.shards import Catalogue
from openm6.models.backbone import Backbone
from openm6.models.omni import Omni
from openm6.nn.block import Block
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.parallel.lanes import Lane, Mark, open_lanes
from openm6.parallel.slab import HostSlab

BUFFERS = 2  # for each form of layer: one in use, one on its way
ALIGNMENT = 64  # bytes


class Home(Protocol):
    """Where the sets are that are not on the device."""

    def fetch(self, number: int, block: Block, lane: Lane) -> None:
        """Fills a block with the matrices of a set, in the lane's turn."""


class FileHome:
    """The checkpoint's files; what is read often stays in the system's own cache."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def fetch(self, number: int, block: Block, lane: Lane) -> None:
        for name, tensor in matrices(block):
            read_weight(self.catalogue, f"backbone.sets.{number}.{name}", tensor)


class MemoryHome:
    """Host memory, registered with a GPU where there is one; read from the files once."""

    def __init__(self, catalogue: Catalogue, blocks: dict[int, Block], dtype: torch.dtype, pin: bool) -> None:
        """`blocks` are the sets in question, on `meta`."""
        wanted = {number: dict(matrices(block)) for number, block in blocks.items()}
        sizes = [sum(_room(tensor, dtype) for tensor in found.values()) for found in wanted.values()]
        pages = [-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in sizes]
        self.slab = HostSlab(pages, pin)
        self.sets: dict[int, dict[str, Tensor]] = {}
        for (number, found), run in zip(wanted.items(), self.slab.runs, strict=True):
            self.sets[number] = {}
            start = 0
            for name, tensor in found.items():
                size = tensor.numel() * dtype.itemsize
                view = run[start : start + size].view(dtype).view(tensor.shape)
                read_weight(catalogue, f"backbone.sets.{number}.{name}", view)
                self.sets[number][name] = view
                start += _room(tensor, dtype)

    def fetch(self, number: int, block: Block, lane: Lane) -> None:
        for name, tensor in matrices(block):
            lane.copy(tensor, self.sets[number][name])


def matrices(block: Block) -> Iterator[tuple[str, Tensor]]:
    """What of a set is streamed: all but its router, which is small and stays."""
    for name, parameter in block.named_parameters():
        if not name.startswith("router."):
            yield name, parameter.detach()


def _room(tensor: Tensor, dtype: torch.dtype) -> int:
    """Bytes from one matrix to the next."""
    return -(-tensor.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False)
class _Buffer:
    """Room on the device for one set of a form."""

    block: Block
    form: DenseConfig | ExpertsConfig
    number: int | None = None  # the set that it holds
    ready: Mark = None  # the set has arrived
    free: Mark = None  # nobody reads it any more


class StreamedSets:
    """The source of a backbone's blocks where only some of its weight sets stay on the device; for one thread."""

    def __init__(
        self, backbone: Backbone, catalogue: Catalogue, kept: frozenset[int], device: torch.device
    ) -> None:
        """`kept` are the sets that stand in the backbone itself; the others are on `meta` there."""
        self.backbone, self.catalogue, self.kept, self.device = backbone, catalogue, kept, device
        self.numbers = backbone.config.weight_sets
        self.lanes = open_lanes(device)
        self.fetched = 0  # sets, since the start
        self.buffers: list[_Buffer] = []  # made when first used: by then the model has its type
        self._open: _Buffer | None = None

    def _make_buffers(self) -> None:
        """Buffers, and host memory, of the type that the rest of the backbone has."""
        dtype = self.backbone.final_norm.weight.dtype
        away = [number for number in range(self.backbone.config.num_sets) if number not in self.kept]
        blocks = {number: cast(Block, self.backbone.sets[number]) for number in away}
        self.home: Home = FileHome(self.catalogue)
        if self.device.type == "cuda":
            self.home = MemoryHome(self.catalogue, blocks, dtype, pin=True)
        forms = [self._form(number) for number in away]
        self.buffers = [
            _Buffer(_empty_like(blocks[away[forms.index(form)]], self.device, dtype), form)
            for form in dict.fromkeys(forms)
            for _ in range(min(BUFFERS, forms.count(form)))
        ]

    def block(self, layer: int) -> Block:
        """As `BlockSource` asks; while the caller works with it, the next one is on its way."""
        number = self.numbers[layer]
        if number in self.kept:
            return cast(Block, self.backbone.sets[number])
        if not self.buffers:
            self._make_buffers()
        buffer = self._holding(number) or self._fetch(number)
        self.lanes.compute.wait(buffer.ready)
        if self._open is not None and self._open is not buffer:
            self._open.free = self.lanes.compute.record()
        self._open = buffer
        self._fetch_ahead(layer)
        return buffer.block

    def _form(self, number: int) -> DenseConfig | ExpertsConfig:
        return self.backbone.config.feed_forward(self.numbers.index(number))

    def _holding(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self.buffers if buffer.number == number), None)

    def _fetch_ahead(self, layer: int) -> None:
        """Sends for the next set that is away; after the last layer comes the first of the next pass."""
        for number in (*self.numbers[layer + 1 :], *self.numbers[:layer]):
            if number not in self.kept:
                if self._holding(number) is None:
                    self._fetch(number)
                return

    def _fetch(self, number: int) -> _Buffer:
        form, lane = self._form(number), self.lanes.inward
        buffer = next(one for one in self.buffers if one.form == form and one is not self._open)
        lane.wait(buffer.free)
        buffer.number = None  # while it is half filled
        self.home.fetch(number, buffer.block, lane)
        buffer.block.router = cast(Block, self.backbone.sets[number]).router
        buffer.ready, buffer.number = lane.record(), number
        self.fetched += 1
        return buffer


def _empty_like(block: Block, device: torch.device, dtype: torch.dtype) -> Block:
    """A block of the same form without values, of inference alone."""
    with torch.device("meta"):
        copy = Block(block.attention.config, block.feed_forward.config, None)
    return copy.to(dtype).to_empty(device=device).eval().requires_grad_(False)


def place_streamed(omni: Omni, folder: Path, resident: int, device: torch.device) -> None:
    """Puts a model whose sets are on `meta` on a device: all but the sets that only layers from `resident` on use.

    Raises:
        CheckpointError: its weights are not in the folder.
    """
    backbone = omni.backbone
    kept = frozenset(backbone.config.weight_sets[:resident])
    blocks = [cast(Block, block) for block in backbone.sets]
    for block in (blocks[number] for number in kept):
        block.attention.to_empty(device="cpu")
        block.feed_forward.to_empty(device="cpu")
    catalogue = load_placed(folder, omni)
    for part in (omni.adapters, backbone.layers, backbone.final_norm, *(blocks[number] for number in kept)):
        part.to(device)
    for block in blocks:
        if block.router is not None:
            block.router.to(device)
    backbone.source = StreamedSets(backbone, catalogue, kept, device)
