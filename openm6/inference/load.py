"""A checkpoint loaded for inference: the model in evaluation mode, its modalities, and what it was trained on.

Of offloaded layers the first few stay on the device, the others are fetched for each use. On a CPU their weights stay
in the checkpoint's files and are read for each use. On a GPU they lie in pinned host memory, and the next layer is
copied on a stream of its own while one computes; without a host copy they are read from the files as on a CPU, which
is slow and takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import nn

from openm6.checkpoint.folder import PREDICTORS_FILE, latest
from openm6.checkpoint.load import load_model, load_placed, read_weight
from openm6.checkpoint.reader import CheckpointReader
from openm6.core.config import build
from openm6.core.device import resolve_device
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.log import get_log
from openm6.inference.sampling import MaskedSampling
from openm6.kernels.probe import capabilities
from openm6.modalities.audio import Audio
from openm6.modalities.image import Image
from openm6.modalities.numbers import Numbers
from openm6.modalities.pool import PoolAdapter
from openm6.modalities.registry import Modalities
from openm6.modalities.simple_predictors import from_bytes
from openm6.modalities.text import Text
from openm6.models.backbone import Backbone
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, CheckpointConfig, build_model, read_description
from openm6.models.omni import Omni
from openm6.nn.attention import Attention
from openm6.nn.block import TransformerBlock
from openm6.nn.executor import LayerExecutor
from openm6.nn.layers import MLP, NoInitWeights
from openm6.nn.moe import Experts
from openm6.offload.weight_store import RecordLayout, Use, WeightsOnly, WeightStore, matrix_shapes, open_streams
from openm6.ops.int8 import Int8Weight
from openm6.optim.rules import WEIGHT, Slots
from openm6.tasks.registry import all_tasks, any_masks_words
from openm6.tasks.task import Task

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
        self._open: int | None = None  # the group whose weights are in use
        # Low-rank updates are merged into weights when these are read, because decoding uses the matrices alone.
        self._updates = [backbone.group_blocks[group].take_lora() for group in self.records]

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
        for name, slots in self.store.open(self.records.index(group)).items():
            path, _, leaf = name.rpartition(".")
            setattr(blocks[layer].get_submodule(path), leaf, nn.Parameter(slots[WEIGHT], requires_grad=False))
        self._open = group
        return blocks[layer]

    def _open_store(self, blocks: Sequence[TransformerBlock]) -> WeightStore:
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
        prefix = f"backbone.layers.{self.config.group_layers[self.records[record]]}"
        for name, slots in stored.items():
            read_weight(self.reader, f"{prefix}.{name}", slots[WEIGHT])
            if name in self._updates[record]:
                self._updates[record][name].merge_into(slots[WEIGHT])


def place_offloaded(omni: Omni, folder: Path, num_gpu_layers: int, device: torch.device, host_copy: bool) -> None:
    """Put a model with matrices on `meta` on a device, but not those that only layers from `num_gpu_layers` on use."""
    backbone = omni.backbone
    for block in backbone.blocks[:num_gpu_layers]:
        block.place_matrices("cpu")
    reader = load_placed(folder, omni)
    for tensor in [*omni.parameters(), *omni.buffers()]:
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    on_device = frozenset(backbone.config.layer_groups[:num_gpu_layers])
    backbone.executor = OffloadedInference(backbone, reader, on_device, host_copy)


Precision = Literal["float32", "bfloat16", "int8"]
PRECISIONS: dict[str, Precision | None] = {"auto": None, "fp32": "float32", "bf16": "bfloat16", "int8": "int8"}
# What is quantized; embeddings, norms, routers and the adapters of modalities stay as they are.
MATRICES: dict[type, tuple[str, str]] = {Attention: ("qkv", "output"), MLP: ("up", "down"), Experts: ("up", "down")}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference; with `compiled`, layers run compiled when texts are decoded on a CPU."""

    omni: Omni
    modalities: Modalities
    description: CheckpointConfig
    checkpoint: Path
    compiled: bool = False

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        return all_tasks(self.description.tasks)

    def task(self, name: str) -> Task:
        """Return the task of this name; raise ConfigError if it is of a package that is not installed here."""
        if name not in self.tasks:
            raise ConfigError(f"task {name!r} of {self.checkpoint} comes from a package: install it, or choose others")
        return self.tasks[name]

    def masked_sampling(self, given: MaskedSampling) -> MaskedSampling:
        """Return settings with those that the model was evaluated with in place of what is not set."""
        own = self.description.eval.get("decoding", {})
        return build(MaskedSampling, {**own, **given.model_dump(exclude_unset=True)}, "eval.decoding")

    @property
    def chats(self) -> bool:
        return any(self.tasks[one.task].chat for one in self.description.trained_tasks if one.task in self.tasks)

    @property
    def has_chat_template(self) -> bool:
        return self.text.imported is not None and self.text.imported.chat_template is not None

    @property
    def pool(self) -> PoolAdapter:
        """The adapter that makes embeddings; raise ConfigError if the model was not trained to embed."""
        if self.omni.pool is None:
            raise ConfigError(
                "this model makes no embeddings: it needs training on image_text_retrieval or audio_text_retrieval, "
                "as in recipes/embed.yaml"
            )
        return self.omni.pool

    @property
    def text(self) -> Text:
        return cast(Text, self.modalities["text"])

    @property
    def image(self) -> Image:
        return cast(Image, self.modalities["image"])

    @property
    def audio(self) -> Audio:
        return cast(Audio, self.modalities["audio"])

    @property
    def numbers(self) -> Numbers:
        return cast(Numbers, self.modalities["numbers"])


def read_texts(folder: Path) -> tuple[CheckpointConfig, str]:
    """Return the description of a checkpoint folder and the text of its tokenizer; CheckpointError if it has none."""
    texts = []
    for path in (folder / MODEL_FILE, folder / TOKENIZER_FILE):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} has no {path.name}: it is not a checkpoint of a multimodal model"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): use another checkpoint") from None
    return read_description(texts[0], str(folder / MODEL_FILE)), texts[1]


def precision_of(dtype: str) -> Precision | None:
    """Return the precision of an option `--dtype`, or of torch's name for it; None for `auto`; else a ConfigError."""
    if dtype in get_args(Precision):
        return cast(Precision, dtype)
    if dtype not in PRECISIONS:
        raise ConfigError(f"no dtype is called {dtype!r}: choose {', '.join(PRECISIONS)}")
    return PRECISIONS[dtype]


def convert_weights(omni: Omni, precision: Precision) -> None:
    """Convert a model once, in place (int8: matrices of layers, a copy of the embedding as head); log its memory."""
    if precision == "bfloat16":
        omni.round_weights()
    elif precision == "int8" and omni.text.int8_head is None:
        if omni.backbone.executor.offloaded:
            raise ConfigError("int8 weights stay on the device: leave out num_gpu_layers, or take fp32 or bf16")
        quantize(omni.backbone)
        omni.text.int8_head = Int8Weight.of(omni.text.output_weight)
    get_log().info(f"weights in {precision}: {weight_bytes(omni) / 2**20:,.1f} MiB")


def quantize(network: nn.Module) -> None:
    """Replace the matrices of layers by their weights in int8; modules that several layers share stay shared."""
    for module in list(network.modules()):
        for name in MATRICES.get(type(module), ()):
            weight = getattr(module, name)  # of experts: E I O
            delattr(module, name)
            setattr(module, name, Int8Weight.of(weight.mT if isinstance(module, Experts) else weight))


def weight_bytes(omni: Omni) -> int:
    found = {tensor.data_ptr(): tensor.nbytes for tensor in [*omni.parameters(), *omni.buffers()] if not tensor.is_meta}
    values = (value for module in omni.modules() for value in vars(module).values())
    quantized = {value: value.bytes for value in values if isinstance(value, Int8Weight)}
    return sum(found.values()) + sum(quantized.values())


def load(
    path: Path,
    device: torch.device | str = "auto",
    num_gpu_layers: int | None = None,
    host_copy: bool = True,
    precision: Precision | None = None,
    compiled: bool = False,
) -> LoadedModel:
    """Return the model of a run (its newest complete checkpoint) or of one checkpoint.

    With `num_gpu_layers`, only so many layers stay on the device; the others are offloaded. Without `host_copy` they
    stay in the files, and the model is never whole in memory. `precision`: see `convert_weights`; None
    keeps that of the checkpoint. `compiled`: see `LoadedModel`. CheckpointError: there is none, it is not of a
    multimodal model, or its parts do not fit one another.
    """
    if num_gpu_layers is not None and num_gpu_layers < 0:
        raise ConfigError(f"num_gpu_layers={num_gpu_layers} is negative: leave it out to keep all layers there")
    folder, device = latest(path), resolve_device(device) if isinstance(device, str) else device
    if device.type == "cuda":
        get_log().info(str(capabilities(device)))
    description, tokenizer = read_texts(folder)
    offloaded = num_gpu_layers is not None and num_gpu_layers < description.backbone.num_layers
    where, kept = str(folder / TOKENIZER_FILE), folder / PREDICTORS_FILE
    predictors = from_bytes(kept.read_bytes(), str(kept)) if kept.is_file() else []
    with NoInitWeights():
        omni, modalities = build_model(description, tokenizer, where, offloaded, predictors)
    trained = (one.task for one in description.trained_tasks)
    cast(Text, modalities["text"]).reads_gaps = any_masks_words(trained, description.tasks)
    if offloaded and num_gpu_layers is not None:
        place_offloaded(omni, folder, num_gpu_layers, device, host_copy)
    else:
        load_model(folder, omni)
        omni.to(device)
    omni.backbone.merge_lora()
    omni.eval().requires_grad_(False)
    if precision is not None and precision != "float32":
        convert_weights(omni, precision)
    return LoadedModel(omni, modalities, description, folder, compiled)
