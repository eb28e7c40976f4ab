"""Inference with offloaded layers: the first few stay on the device, the others are fetched for each use.

On a CPU their weights stay in the checkpoint's files and are read for each use. On a GPU they lie in pinned host
memory, and the next layer is copied on a stream of its own while one computes; without a host copy they are read from
the files as on a CPU, which is slow and takes no memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from openm6.checkpoint.load import load_placed, read_weight
from openm6.checkpoint.reader import CheckpointReader
from openm6.models.backbone import Backbone
from openm6.models.omni import Omni
from openm6.nn.block import Block
from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.offload.streams import open_streams
from openm6.offload.weight_store import RecordLayout, Use, WeightsOnly, WeightStore, set_shapes
from openm6.optim.rules import WEIGHT, Slots

BUFFERS = 2  # one in use, one on its way


class OffloadedSource:
    """A `BlockSource` of a backbone of which only some weight sets stay on the device; for one thread."""

    def __init__(
        self,
        backbone: Backbone,
        catalogue: CheckpointReader,
        kept: frozenset[int],
        device: torch.device,
        host_copy: bool = True,
    ) -> None:
        """`kept` are the sets that the backbone itself holds; the others are on `meta` there."""
        self.host_copy = host_copy and device.type == "cuda"
        self.backbone, self.catalogue, self.kept, self.device = backbone, catalogue, kept, device
        self.offloaded = [index for index in range(backbone.config.num_sets) if index not in kept]
        self.store: WeightStore | None = None  # made when first used: by then the model has its dtype
        self._blocks: dict[
            tuple[DenseConfig | ExpertsConfig, int], Block
        ] = {}  # by form and address of the buffer
        self._open: tuple[int, Block] | None = None

    def block(self, layer: int) -> Block:
        """As `BlockSource` requires; while the caller works with the block, the next one is fetched."""
        index = self.backbone.config.weight_sets[layer]
        if index in self.kept:
            return cast(Block, self.backbone.sets[index])
        if self.store is None:
            self.store = self._open_store()
        if self._open is None or index != self._open[0]:
            if self._open is not None:
                self.store.close(self.offloaded.index(self._open[0]))
            self._open = None  # also if reading fails
            self.store.plan(self._uses(layer))
            stored = self.store.open(self.offloaded.index(index))
            self._open = index, self._block_of(index, layer, stored)
        return self._open[1]

    def _block_of(self, index: int, layer: int, stored: dict[str, Slots]) -> Block:
        """Return the block of a buffer, always the same one for the same memory and form, with the set's router."""
        original = cast(Block, self.backbone.sets[index])
        key = self.backbone.config.feed_forward(layer), next(iter(stored.values()))[WEIGHT].data_ptr()
        if key not in self._blocks:
            self._blocks[key] = _empty_like(original)
            for name, slots in stored.items():
                _set_parameter(self._blocks[key], name, slots[WEIGHT])
        self._blocks[key].router = original.router
        return self._blocks[key]

    def _uses(self, layer: int) -> list[Use]:
        """One round of uses from this layer on; after the last layer comes the first of the next pass."""
        sets = self.backbone.config.weight_sets
        return [
            Use(self.offloaded.index(index), whole=False)
            for index in (*sets[layer:], *sets[:layer])
            if index not in self.kept
        ]

    def _open_store(self) -> WeightStore:
        """Open a store of the dtype that the rest of the backbone has."""
        dtype = self.backbone.final_norm.weight.dtype
        blocks = {index: cast(Block, self.backbone.sets[index]) for index in self.offloaded}
        store = WeightStore(
            [RecordLayout(set_shapes(block), WeightsOnly(dtype)) for block in blocks.values()],
            on_device=(),
            device=self.device,
            streams=open_streams(self.device),
            num_buffers=BUFFERS,
            pin=True,
            read=None if self.host_copy else self._read,
        )
        if self.host_copy:
            for record in range(len(self.offloaded)):
                self._read(record, store.stored(record))
        return store

    def _read(self, record: int, stored: dict[str, Slots]) -> None:
        """Read the weights of a set from the checkpoint's files."""
        for name, slots in stored.items():
            read_weight(self.catalogue, f"backbone.sets.{self.offloaded[record]}.{name}", slots[WEIGHT])


def _set_parameter(block: Block, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def _empty_like(block: Block) -> Block:
    """Return a block of the same form on `meta`, for inference only."""
    with torch.device("meta"):
        copy = Block(block.attention.config, block.feed_forward.config, None)
    return copy.eval().requires_grad_(False)


def place_offloaded(
    omni: Omni, folder: Path, num_gpu_layers: int, device: torch.device, host_copy: bool = True
) -> None:
    """Put a model whose sets are on `meta` on a device, but not the sets that only layers from `num_gpu_layers` on use.

    Raises:
        CheckpointError: its weights are not in the folder.
    """
    backbone = omni.backbone
    kept = frozenset(backbone.config.weight_sets[:num_gpu_layers])
    blocks = [cast(Block, block) for block in backbone.sets]
    for block in (blocks[index] for index in kept):
        block.attention.to_empty(device="cpu")
        block.feed_forward.to_empty(device="cpu")
    catalogue = load_placed(folder, omni)
    for part in (omni.adapters, backbone.layers, backbone.final_norm, *(blocks[index] for index in kept)):
        part.to(device)
    for block in blocks:
        if block.router is not None:
            block.router.to(device)
    backbone.source = OffloadedSource(backbone, catalogue, kept, device, host_copy)
