"""GGUF files: a published decoder read tensor by tensor under Hugging Face's names, and one written."""

# Dimensions: H heads, d size of a head, D hidden size, E experts

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from openm6.core.errors import CheckpointError, ConfigError
from openm6.hub.architectures import THEIR_HEAD, Settings, Shape
from openm6.hub.gguf_tokenizer import gguf_tokenizer
from openm6.nn.config import RopeScaling

# Names of architectures: GGUF's, and Hugging Face's.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "olmoe": "olmoe"}
# Fields of config.json by those of GGUF.
FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_used_count": "num_experts_per_tok",
    "expert_count": "num_experts",
    "attention.sliding_window": "sliding_window",
}
# Of Llama 3.1 and later: what each rotary frequency is divided by.
FREQUENCIES = "rope_freqs.weight"


def gguf_name(known: Any, name: str) -> tuple[str, int | None]:
    """The name in a GGUF file (by the library's map of names), and the expert whose slice of the tensor is meant."""
    expert = re.search(r"experts\.(\d+)\.", name)
    whole = name if expert is None else name.replace(expert[0], "experts.")
    return known.get_name(whole, (".weight", ".bias")) or name, None if expert is None else int(expert[1])


class GgufFile:
    """The tensors of a GGUF file under Hugging Face's names, dequantized one at a time."""

    def __init__(self, path: Path) -> None:
        """Raise CheckpointError if the file is cut short, or not GGUF of a version or type that is known."""
        # An optional dependency.
        import gguf  # noqa: PLC0415
        from gguf.quants import dequantize  # noqa: PLC0415

        self.path, self._gguf, self._dequantize = path, gguf, dequantize
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is cut short, of an unknown type, or no GGUF file ({error}): download it again"
            ) from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.fields.get("general.architecture"))
        for kind, tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.items():
            try:
                dequantize(tensor.data[:1], kind)
            except NotImplementedError:
                raise CheckpointError(
                    f"{path}: {tensor.name} is of the type {kind.name}, which cannot be read: choose another file of "
                    "this model, such as Q8_0"
                ) from None
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = int(self.fields.get(f"{self.architecture}.block_count", 0))
        self._names = gguf.get_tensor_name_map(kinds.get(self.architecture, gguf.MODEL_ARCH.LLAMA), layers)
        self.settings = self._settings()

    def _settings(self) -> dict[str, Any]:
        """The metadata as a config.json."""
        prefix = f"{self.architecture}."
        own = {name.removeprefix(prefix): value for name, value in self.fields.items() if name.startswith(prefix)}
        # 1e-5 as it was written, not the fp32 next to it.
        own |= {name: float(str(np.float32(value))) for name, value in own.items() if isinstance(value, float)}
        settings = {theirs: own[ours] for ours, theirs in FIELDS.items() if ours in own}
        uneven = [name for name, value in settings.items() if isinstance(value, list)]
        if uneven:
            raise ConfigError(f"{self.path} has another {uneven[0]} in each layer, which the backbone lacks")
        kind = ARCHITECTURES.get(self.architecture, self.architecture)
        settings["model_type"] = "mixtral" if kind == "llama" and settings.get("num_experts") else kind
        settings["norm_topk_prob"] = kind == "qwen3_moe"
        settings["tie_word_embeddings"] = THEIR_HEAD not in self
        size: Any = own.get("attention.key_length") or own.get("rope.dimension_count")
        settings["head_dim"] = size
        rotated = own.get("rope.dimension_count", size)
        rope = {"rope_theta": settings.get("rope_theta", 10_000.0), "partial_rotary_factor": 1.0}
        if rotated != size:
            rope["partial_rotary_factor"] = rotated / size
        if own.get("rope.scaling.type", "none") != "none":
            original = own.get("rope.scaling.original_context_length")
            rope |= {"rope_type": own["rope.scaling.type"], "factor": own.get("rope.scaling.factor")}
            rope |= {"original_max_position_embeddings": original} if original else {}
        if FREQUENCIES in self.tensors:
            rope |= self._llama3_scaling(rope["rope_theta"])
        settings["rope_parameters"] = rope
        return settings

    def _llama3_scaling(self, theta: float) -> dict[str, Any]:
        """The settings of Llama 3.1 and later, of which a GGUF file holds only the divisors of frequencies."""
        found = self._array(FREQUENCIES)
        scaling = RopeScaling(rope_type="llama3", factor=float(found.max()))
        if not np.allclose(found, scaling.divisors(theta, len(found)), rtol=1e-4):
            raise ConfigError(f"{self.path} scales rotary positions by divisors of its own, which is not supported")
        return scaling.model_dump(exclude_none=True)

    def _array(self, name: str, index: int | None = None) -> np.ndarray:
        tensor = self.tensors[name]
        data = tensor.data if index is None else tensor.data[index]
        # fp32 values are a view of the file, which cannot be written.
        return np.require(self._dequantize(data, tensor.tensor_type), requirements="W")

    def __contains__(self, name: str) -> bool:
        return gguf_name(self._names, name)[0] in self.tensors

    def shape(self, name: str) -> Shape:
        """The shape of one tensor."""
        own, expert = gguf_name(self._names, name)
        shape = tuple(int(size) for size in reversed(self.tensors[own].shape))
        return shape if expert is None else shape[1:]

    def read(self, name: str) -> Tensor:
        """One tensor: fp16 and bf16 as they are, the others as fp32; heads in the order of Hugging Face."""
        own, expert = gguf_name(self._names, name)
        values, kind = torch.from_numpy(self._array(own, expert)), self.tensors[own].tensor_type.name
        if self.architecture == "llama":
            values = reorder_heads(values, name, self.settings, to_gguf=False)
        return values.to({"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32))

    @property
    def tokenizer_fields(self) -> dict[str, Any]:
        """The metadata of the tokenizer."""
        return {name.removeprefix("tokenizer."): value for name, value in self.fields.items()}


def reorder_heads(values: Tensor, name: str, settings: Settings, to_gguf: bool) -> Tensor:
    """GGUF's Llama rotates neighbours (x[2i], x[2i + 1]), Hugging Face halves (x[i], x[i + d/2]).  # H·d …"""
    found = re.search(r"self_attn\.([qk])_proj", name)
    if found is None:
        return values
    heads = settings["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
    shape = (heads, 2, -1) if to_gguf else (heads, -1, 2)
    return values.unflatten(0, shape).transpose(1, 2).flatten(0, 2)


def write_gguf(
    path: Path, settings: Settings, shapes: dict[str, Shape], tensors: Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer, special: dict[str, Any], dtype: str,
) -> None:  # fmt: skip
    """Write a dense decoder; matrices as F32, F16, BF16 or Q8_0, vectors as F32. ConfigError if GGUF cannot hold it.

    shapes: of all tensors, whose values `tensors` yields in the same order; special: further fields of the tokenizer.
    """
    # An optional dependency.
    import gguf  # noqa: PLC0415
    from gguf.quants import quantize  # noqa: PLC0415

    architecture = {theirs: ours for ours, theirs in ARCHITECTURES.items()}.get(settings["model_type"])
    if architecture not in ("llama", "qwen2", "qwen3"):
        raise ConfigError(f"export of {settings['model_type']} as GGUF is not supported: export with --format hf")
    kinds, types = gguf.GGMLQuantizationType, gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, architecture)
    models = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(models[architecture], settings["num_hidden_layers"])
    own, rope = _metadata(settings), settings["rope_parameters"]
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(**{key: value for key, value in rope.items() if key in RopeScaling.model_fields})
        divisors = torch.tensor(scaling.divisors(rope["rope_theta"], settings["head_dim"] // 2))
        shapes, tensors = {FREQUENCIES: (len(divisors),), **shapes}, chain([(FREQUENCIES, divisors)], tensors)
    defaults = {name: RopeScaling.model_fields[name].default for name in ("beta_fast", "beta_slow", "attention_factor")}
    if rope["rope_type"] == "yarn" and any(rope.get(name, usual) != usual for name, usual in defaults.items()):
        raise ConfigError("GGUF has only the usual settings of yarn: export with --format hf")
    text = {**gguf_tokenizer(tokenizer, settings["vocab_size"]), **special}
    for prefix, values in ((architecture, own), ("tokenizer", text)):
        for name, value in values.items():
            if value not in (None, []):
                kind = types.UINT32 if type(value) is int else types.get_type(value)
                writer.add_key_value(f"{prefix}.{name}", value, kind)

    def kind_of(shape: Shape) -> Any:
        fits = len(shape) > 1 and (dtype != "Q8_0" or shape[-1] % 32 == 0)
        return kinds[dtype] if fits else kinds["F32" if len(shape) == 1 else "F16"]

    for name, shape in shapes.items():
        kind = kind_of(shape)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        stored = math.prod(shape) // block * size
        # With bytes as the type of values the shape would be one of bytes.
        writer.add_tensor_info(gguf_name(names, name)[0], shape, np.dtype(np.float32), stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        ordered = reorder_heads(tensor, name, settings, to_gguf=True) if architecture == "llama" else tensor
        writer.write_tensor_data(quantize(ordered.float().numpy(), kind_of(tuple(tensor.shape))))
    writer.close()


def _metadata(settings: Settings) -> dict[str, Any]:
    """The fields of a config.json under GGUF's names."""
    own = {ours: settings.get(theirs) for ours, theirs in FIELDS.items()}
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    own |= {**dict.fromkeys(sizes, settings["head_dim"]), "vocab_size": settings["vocab_size"]}
    rope = settings["rope_parameters"]
    if rope["rope_type"] in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return own
