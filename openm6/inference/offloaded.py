"""Inference with offloaded layers: the first few stay on the device, the others are fetched for each use.

On a CPU their weights stay in the checkpoint's files and are read for each use. On a GPU they lie in pinned host
memory, and the next layer is copied on a stream of its own while one computes; without a host copy they are read from
the files as on a CPU, which is slow and takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from openm6.checkpoint.load import load_placed, read_weight
from openm6.checkpoint.reader import CheckpointReader
from openm6.models.backbone import Backbone
from openm6.models.omni import Omni
from openm6.nn.block import TransformerBlock
from openm6.nn.executor import LayerExecutor
from openm6.offload.streams import open_streams
from openm6.offload.weight_store import RecordLayout, Use, WeightsOnly, WeightStore, matrix_shapes
from openm6.optim.rules import WEIGHT, Slots

BUFFERS = 2  # one in use, one on its way


class OffloadedInference(LayerExecutor):
    """Runs a backbone of which only some groups of layers have their weights on the device; for one thread."""

    offloaded = True

    def __init__(
        self, backbone: Backbone, reader: CheckpointReader, on_device: frozenset[int], host_copy: bool
    ) -> None:
        """`on_device` are the groups that the backbone itself holds; the matrices of others are on `meta` there."""
        super().__init__()
        self.config, self.final_norm = backbone.config, backbone.final_norm
        self.reader, self.on_device, self.device = reader, on_device, self.final_norm.weight.device
        self.host_copy = host_copy and self.device.type == "cuda"
        self.records = [group for group in range(len(backbone.config.group_layers)) if group not in on_device]
        self.store: WeightStore | None = None  # made when first used: by then the model has its dtype
        self._parameters: dict[tuple[int, int], dict[str, nn.Parameter]] = {}  # by group and address of the buffer
        self._open: int | None = None  # the group whose weights are in use

    def block(self, blocks: Sequence[TransformerBlock], layer: int) -> TransformerBlock:
        """Return the block of a layer on the weights of its group; while it is used, the next ones are fetched."""
        group = self.config.layer_groups[layer]
        if group in self.on_device or group == self._open:
            return blocks[layer]
        if self.store is None:
            self.store = self._open_store(blocks)
        if self._open is not None:
            self.store.close(self.records.index(self._open))
        self._open = None  # also if reading fails
        # One round of uses from this layer on; after the last layer comes the first of the next pass.
        groups = (*self.config.layer_groups[layer:], *self.config.layer_groups[:layer])
        self.store.plan([Use(self.records.index(one), whole=False) for one in groups if one not in self.on_device])
        stored = self.store.open(self.records.index(group))
        # Always the same objects for the same memory.
        key = group, next(iter(stored.values()))[WEIGHT].data_ptr()
        if key not in self._parameters:
            self._parameters[key] = {
                name: nn.Parameter(slots[WEIGHT], requires_grad=False) for name, slots in stored.items()
            }
        for name, parameter in self._parameters[key].items():
            path, _, leaf = name.rpartition(".")
            setattr(blocks[layer].get_submodule(path), leaf, parameter)
        self._open = group
        return blocks[layer]

    def _open_store(self, blocks: Sequence[TransformerBlock]) -> WeightStore:
        """Open a store of the dtype that the rest of the backbone has."""
        storage = WeightsOnly(self.final_norm.weight.dtype)
        offloaded = [blocks[self.config.group_layers[group]] for group in self.records]
        layouts = [RecordLayout(matrix_shapes(block), storage) for block in offloaded]
        streams, read = open_streams(self.device), None if self.host_copy else self._read
        store = WeightStore(layouts, (), self.device, streams, num_buffers=BUFFERS, pin=True, read=read)
        if self.host_copy:
            for record in range(len(self.records)):
                self._read(record, store.stored(record))
        return store

    def _read(self, record: int, stored: dict[str, Slots]) -> None:
        """Read the weights of a group from the checkpoint's files."""
        prefix = f"backbone.layers.{self.config.group_layers[self.records[record]]}"
        for name, slots in stored.items():
            read_weight(self.reader, f"{prefix}.{name}", slots[WEIGHT])


def place_offloaded(
    omni: Omni, folder: Path, num_gpu_layers: int, device: torch.device, host_copy: bool = True
) -> None:
    """Put a model with matrices on `meta` on a device, but not those that only layers from `num_gpu_layers` on use."""
    backbone = omni.backbone
    for block in backbone.blocks[:num_gpu_layers]:
        for module in block.shareable().values():
            if any(parameter.is_meta for parameter in module.parameters()):
                module.to_empty(device="cpu")
    reader = load_placed(folder, omni)
    for tensor in [*omni.parameters(), *omni.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    on_device = frozenset(backbone.config.layer_groups[:num_gpu_layers])
    backbone.executor = OffloadedInference(backbone, reader, on_device, host_copy)
