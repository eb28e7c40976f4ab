"""GGUF files: a published decoder and its tokenizer read under the names of Hugging Face, and written."""

# Dimensions: H heads, d size of a head, D hidden size, E experts

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer
from torch import Tensor

from openm6.core.errors import CheckpointError, ConfigError
from openm6.hub.architectures import THEIR_HEAD, Settings, Shape
from openm6.nn.config import RopeScaling

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a blank in the tokens of SentencePiece
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Names of llama.cpp for the rules by which byte-level BPE divides a text into words.
PRE_TOKENIZERS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
ALIASES = {"olmo": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def _pre_tokenizer(name: str) -> PreTokenizer:
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name in ("gpt-2", "smollm"))
    if name == "gpt-2":
        return by_bytes
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_bytes])
    pattern = _LLAMA3 if name == "llama-bpe" else _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), by_bytes])


def read_gguf_tokenizer(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a tokenizer.json, and the fields of `ImportedText`; ConfigError if unreadable."""
    model, pre = fields.get("ggml.model"), fields.get("ggml.pre", "default")
    pre = ALIASES.get(pre, pre)
    if model not in ("gpt2", "llama") or (model == "gpt2" and pre not in PRE_TOKENIZERS):
        raise ConfigError(
            f"the tokenizer {model!r} with pre-tokenizer {pre!r} in the GGUF cannot be read: import the safetensors of "
            "this model, with their tokenizer.json"
        )
    try:
        return _read(fields, model, pre)
    except KeyError as missing:
        raise ConfigError(f"the GGUF lacks tokenizer.{missing.args[0]}: download it again") from None
    # The library raises bare Exception, of merges without their tokens.
    except Exception as error:
        raise ConfigError(f"the tokenizer in the GGUF is broken ({error}): download it again") from None


def _read(fields: Mapping[str, Any], model: str, pre: str) -> tuple[str, dict[str, Any]]:
    tokens, types = fields["ggml.tokens"], fields["ggml.token_type"]
    tokenizer = _byte_level(fields, pre) if model == "gpt2" else _scored_bpe(fields)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    user_defined = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
    ids = {name: fields.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "eot", "padding", "unknown")}
    keys = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    names = {keys[name]: tokens[token] for name, token in ids.items() if name in keys and token is not None}
    bos, eos = ids["bos"], ids["eos"]
    stops = () if ids["eot"] in (None, eos) else (ids["eot"],)
    if bos is not None and fields.get("ggml.add_bos_token", model == "llama" or pre == "llama-bpe"):
        pair = [(tokens[bos], bos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=pair)
    else:
        bos = None
    template = fields.get("chat_template")
    return tokenizer.to_str(), {"bos": bos, "eos": eos, "stops": stops, "chat_template": template, "names": names}


def _byte_level(fields: Mapping[str, Any], pre: str) -> Tokenizer:
    # Names of unused rows only fill up the list, and no text is to show them.
    kinds = enumerate(zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True))
    vocabulary = {token: index for index, (token, kind) in kinds if kind != UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = _pre_tokenizer(pre), decoders.ByteLevel()
    return tokenizer


def _scored_bpe(fields: Mapping[str, Any]) -> Tokenizer:
    """BPE whose merges follow from the scores: of two tokens that stand side by side, the best one they make."""
    tokens, scores = fields["ggml.tokens"], fields["ggml.scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    ranked = []
    for token, score in zip(tokens, scores, strict=True):
        halves = ((token[:index], token[index:]) for index in range(1, len(token)))
        found = [(left, right) for left, right in halves if left in vocabulary and right in vocabulary]
        found.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ranked += [(-score, len(left), len(right), left, right) for left, right in found]
    ranked.sort(key=lambda merge: (merge[0], -merge[1], -merge[2]))
    merges = [(left, right) for *_, left, right in ranked]
    merged = {part for left, right in merges for part in (left, right, left + right)}
    unused = {token for token, kind in zip(tokens, fields["ggml.token_type"], strict=True) if kind == UNUSED}
    vocabulary = {token: index for token, index in vocabulary.items() if token not in unused - merged}
    unknown = tokens[fields.get("ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    first = [normalizers.Prepend(SPACE)] if fields.get("ggml.add_space_prefix", True) else []
    tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if first else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def gguf_tokenizer(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a tokenizer of `rows` tokens, byte-level BPE or SentencePiece; ConfigError if llama.cpp lacks its
    rules.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    found: dict[str, Any] = {
        "ggml.tokens": [names.get(index, f"[unused{index}]") for index in range(rows)],
        "ggml.token_type": [added.get(index, NORMAL if index in names else UNUSED) for index in range(rows)],
    }
    pre = next((name for name in PRE_TOKENIZERS if _rules(_pre_tokenizer(name)) == _rules(content)), None)
    # llama.cpp changes no character first; NFC, which Qwen's tokenizers ask for, it leaves out.
    plain = (content["normalizer"] or {"type": "NFC"})["type"] == "NFC"
    if model["type"] == "BPE" and pre is not None and plain:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        return {"ggml.model": "gpt2", "ggml.pre": pre, **found, "ggml.merges": merges}
    if model["type"] == "BPE" and model["byte_fallback"] and model["unk_token"] in found["ggml.tokens"]:
        _add_scores(found, content)
        again = json.loads(_read(found, "llama", "")[0])
        model["vocab"] = again["model"]["vocab"]  # they differ in unused rows and added tokens
        rules = ("model", "normalizer", "pre_tokenizer", "decoder", "added_tokens")
        if all(again[part] == content[part] for part in rules):
            return found
    raise ConfigError("llama.cpp has no rules that give the tokens of this tokenizer: export with --format hf")


def _add_scores(fields: dict[str, Any], content: dict[str, Any]) -> None:
    """The fields of SentencePiece: a token scores by the rank of the first merge that makes it."""
    model, tokens, kinds = content["model"], fields["ggml.tokens"], fields["ggml.token_type"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    unknown = tokens.index(model["unk_token"])
    for index, token in enumerate(tokens):
        if kinds[index] == NORMAL and re.fullmatch("<0x[0-9A-F]{2}>", token):
            kinds[index] = BYTE
    if kinds[unknown] == CONTROL:
        kinds[unknown] = UNKNOWN
    fields |= {
        "ggml.model": "llama", "ggml.pre": "default", "ggml.unknown_token_id": unknown,
        "ggml.scores": [float(-ranks.get(token, len(ranks))) for token in tokens],
        "ggml.add_space_prefix": "Prepend" in json.dumps(content["normalizer"]),
    }  # fmt: skip


def _rules(source: Any) -> str:
    """The pre-tokenizer as plain data, without what has no effect on tokens."""
    if isinstance(source, PreTokenizer):
        blank = Tokenizer(models.BPE())
        blank.pre_tokenizer = source
        source = json.loads(blank.to_str())
    found = source["pre_tokenizer"]
    return json.dumps(found, sort_keys=True).replace('"trim_offsets": false', '"trim_offsets": true')


# Names of architectures: GGUF's, and Hugging Face's; a llama with experts is mixtral.
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
        # It takes a third of a second to import.
        import gguf  # noqa: PLC0415
        from gguf.quants import dequantize  # noqa: PLC0415

        self.path, self._dequantize = path, dequantize
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise CheckpointError(
                f"{path} is cut short, of an unknown type, or no GGUF file ({error}): download it again"
            ) from None
        if (parts := int(self.fields.get("split.count", 1))) > 1:
            raise CheckpointError(f"{path} is one of {parts} parts: join them with llama-gguf-split --merge")
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
        if "num_attention_heads" in settings:
            settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
        if self.architecture == "llama" and (biases := [name for name in self.tensors if name.endswith("bias")]):
            raise ConfigError(f"{self.path} has {biases[0]}: a Llama with biases is not supported")
        rotated = own.get("rope.dimension_count", size)
        rope = {"rope_theta": settings.get("rope_theta", 10_000.0), "partial_rotary_factor": 1.0}
        if rotated != size:
            rope["partial_rotary_factor"] = rotated / size
        factor = own.get("rope.scaling.factor") or own.get("rope.scale_linear")  # the latter in older files
        scaled = own.get("rope.scaling.type", "linear" if factor else "none")
        if scaled != "none":
            original = own.get("rope.scaling.original_context_length")
            rope |= {"rope_type": scaled, "factor": factor}
            rope |= {"original_max_position_embeddings": original} if original else {}
        if FREQUENCIES in self.tensors:
            found = self._array(FREQUENCIES)
            scaling = RopeScaling(rope_type="llama3", factor=float(found.max()))
            if not np.allclose(found, scaling.divisors(rope["rope_theta"], len(found)), rtol=1e-4):
                raise ConfigError(f"{self.path} scales rotary positions by divisors of its own, which is not supported")
            rope |= scaling.model_dump(exclude_none=True)
        settings["rope_parameters"] = rope
        return settings

    def _array(self, name: str, index: int | slice | None = None) -> np.ndarray:
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

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or rows of an embedding or a head: fp16 and bf16 as they are, the others as fp32.

        Attention heads have the order of Hugging Face.
        """
        own, expert = gguf_name(self._names, name)
        index = expert if rows is None else rows
        values, kind = torch.from_numpy(self._array(own, index)), self.tensors[own].tensor_type.name
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
    """Write a decoder; matrices as F32, F16, BF16 or Q8_0, vectors and routers as F32. ConfigError if GGUF lacks it.

    shapes: of all tensors, experts stacked, whose values `tensors` yields in the same order; special: further fields of
    the tokenizer.
    """
    # It takes a third of a second to import.
    import gguf  # noqa: PLC0415
    from gguf.quants import quantize  # noqa: PLC0415

    known = {theirs: ours for ours, theirs in ARCHITECTURES.items()} | {"mixtral": "llama"}
    architecture = known[settings["model_type"]]
    _refuse_lacking(architecture, settings)
    kinds, types = gguf.GGMLQuantizationType, gguf.GGUFValueType
    writer = gguf.GGUFWriter(path, architecture)
    kind_of_model = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind_of_model, settings["num_hidden_layers"])
    own, rope = _metadata(settings), settings["rope_parameters"]
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(**{key: value for key, value in rope.items() if key in RopeScaling.model_fields})
        divisors = torch.tensor(scaling.divisors(rope["rope_theta"], settings["head_dim"] // 2))
        shapes, tensors = {FREQUENCIES: (len(divisors),), **shapes}, chain([(FREQUENCIES, divisors)], tensors)
    text = {**gguf_tokenizer(tokenizer, settings["vocab_size"]), **special}
    for prefix, values in ((architecture, own), ("tokenizer", text)):
        for name, value in values.items():
            if value not in (None, []):
                kind = types.UINT32 if type(value) is int else types.get_type(value)
                writer.add_key_value(f"{prefix}.{name}", value, kind)

    stored_as: dict[str, Any] = {}
    for name, shape in shapes.items():
        theirs, fits = gguf_name(names, name)[0], dtype != "Q8_0" or shape[-1] % 32 == 0
        exact = len(shape) == 1 or theirs.endswith("ffn_gate_inp.weight")
        stored_as[name] = kinds["F32" if exact else dtype if fits else "F16"]
        block, size = gguf.GGML_QUANT_SIZES[stored_as[name]]
        # With bytes as the type of values the shape would be one of bytes.
        writer.add_tensor_info(theirs, shape, np.dtype(np.float32), math.prod(shape) // block * size, stored_as[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        ordered = reorder_heads(tensor, name, settings, to_gguf=True) if architecture == "llama" else tensor
        writer.write_tensor_data(quantize(ordered.float().numpy(), stored_as[name]))
    writer.close()


def _refuse_lacking(architecture: str, settings: Settings) -> None:
    """Raise ConfigError if llama.cpp computes something else for this architecture."""
    rope, norm, width = settings["rope_parameters"], settings.get("norm_topk_prob"), settings["hidden_size"]
    usual = {name: RopeScaling.model_fields[name].default for name in ("beta_fast", "beta_slow", "attention_factor")}
    olmoe, sizes = architecture == "olmoe", [settings[f"num_{one}_heads"] for one in ("attention", "key_value")]
    lacking = {
        "dense layers": settings.get("mlp_only_layers") or settings.get("decoder_sparse_step", 1) > 1,
        "gates that do not sum to 1": norm is False and not olmoe,
        "gates that sum to 1": norm and olmoe,
        "grouped queries": olmoe and any(heads * settings["head_dim"] != width for heads in sizes),
        "a tied output layer": olmoe and settings["tie_word_embeddings"],
        "rotary positions scaled as in Llama 3": rope["rope_type"] == "llama3" and architecture != "llama",
        "settings of yarn other than the usual ones": any(rope.get(name, one) != one for name, one in usual.items()),
    }
    found = [feature for feature, present in lacking.items() if present]
    if found:
        raise ConfigError(f"llama.cpp has no {architecture} with {', '.join(found)}: export with --format hf")


def _metadata(settings: Settings) -> dict[str, Any]:
    """The fields of a config.json under GGUF's names."""
    own = {ours: settings.get(theirs) for ours, theirs in FIELDS.items()}
    own["expert_count"] = settings.get("num_experts") or settings.get("num_local_experts")
    sizes = ("rope.dimension_count", "attention.key_length", "attention.value_length")
    own |= {**dict.fromkeys(sizes, settings["head_dim"]), "vocab_size": settings["vocab_size"]}
    rope = settings["rope_parameters"]
    if rope["rope_type"] in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        own["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    return own
