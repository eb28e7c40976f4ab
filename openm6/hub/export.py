"""`openm6 export`: the text path of a run as a decoder that other programs read, as safetensors or GGUF."""

from __future__ import annotations

import json
import math
from collections import ChainMap
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from openm6.checkpoint.folder import EXPONENT, SEPARATOR, latest
from openm6.checkpoint.folder import MODEL_FILE as WEIGHTS_FILE
from openm6.checkpoint.load import open_reader, read_weight
from openm6.checkpoint.reader import CheckpointReader
from openm6.checkpoint.save import Shard, write_shards, write_tensors
from openm6.core.errors import ConfigError
from openm6.core.files import new_folder
from openm6.hub.addition import export_addition
from openm6.hub.architectures import EMBEDDING, HEAD, StoredTensor, layer_tensors, outer_tensors, settings_of
from openm6.hub.gguf_file import write_gguf
from openm6.hub.peft import write_adapter
from openm6.inference.load import load, read_texts
from openm6.modalities.text import ROLES, ImportedText, Text, read_tokenizer
from openm6.models.description import TOKENIZER_FILE, CheckpointConfig
from openm6.tasks.registry import all_tasks
from openm6.tasks.task import Task

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADDITION_TYPES = {"int8", "bf16", "fp32"}
GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
ONE_FILE = 2**31  # bytes of weights from which on each layer has a file of its own
MARKS = ("<|start|>", "<|end|>", "<|mask|>", *(f"<|{role}|>" for role in ROLES))
# The turns of our chats, as `chat_parts` reads them.
CHAT_TEMPLATE = (
    "{% for message in messages if message.content | trim %}<|{{ message.role }}|>{{ message.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def export_run(
    run: Path, out: Path, form: str, dtype: str | None = None, text_only: bool = False, fused: bool = False
) -> str:
    """Write the text path of a run's newest checkpoint to `out`; return what was written, and what is left out.

    form: `hf`, a folder for `AutoModelForCausalLM`, in the stored dtype by default; `gguf`, a file in fp16 by
    default; `peft`, low-rank adapters alone, which are merged otherwise, see `write_adapter` for `fused`; `addition`,
    what it adds to an imported decoder, in int8 by default. Written under a temporary name, so that `out` is whole or
    not there. ConfigError if no plain decoder computes the same, unless `text_only` accepts that for prompts and
    modalities.
    """
    allowed = {"gguf": GGUF_TYPES, "addition": ADDITION_TYPES}.get(form, DTYPES)
    if dtype is not None and dtype not in allowed:
        raise ConfigError(f"--dtype {dtype} is not one of {', '.join(allowed)} for --format {form}")
    folder = latest(run)
    if form == "addition":
        return export_addition(run, folder, out, dtype or "int8")
    description, content = read_texts(folder)
    left_out = _inexpressible(description)
    if left_out and not text_only:
        raise ConfigError(
            f"a plain decoder cannot express {' and '.join(left_out)}: add --text-only to export the text path without"
        )
    config, reader = description.backbone, open_reader(folder)
    tokenizer, text = _exported_text(description, content, str(folder / TOKENIZER_FILE))
    # A run may cut texts short.
    context = text.context or description.modalities.text.max_tokens
    settings = settings_of(config, text.vocab_size, text.tie_word_embeddings, context)
    settings |= {"bos_token_id": text.bos, "eos_token_id": text.eos}
    kind = settings["model_type"]
    layers = [layer_tensors(kind, config, layer) for layer in range(config.num_layers)]
    groups = [outer_tensors(config, text.vocab_size, text.tie_word_embeddings), *layers]
    with new_folder(out) as partial_out:
        if form == "peft":
            write_adapter(partial_out, reader, kind, config, description.to_publish().base_model, fused)
        else:
            write = _write_hf if form == "hf" else _write_gguf
            merged = load(folder, "cpu").omni.state_dict() if config.lora is not None else {}
            read = partial(_read, reader, text.vocab_size, merged)
            write(partial_out, groups, read, settings, tokenizer, text, dtype)
    without = f"; left out: {' and '.join(left_out)}" if left_out else ""
    # Texts pass no experts of other modalities.
    differ = "" if description.modalities.prompt_attention == "causal" else ", so answers differ from ours"
    return f"{out}: {kind}, {config.num_layers} layers{without}{differ}"


def _inexpressible(description: CheckpointConfig) -> list[str]:
    """What of a run a decoder of text does not have."""
    attention = description.modalities.prompt_attention
    found = [] if attention == "causal" else [f"prompts with {attention} attention"]
    tasks, imported = _tasks(description), description.modalities.text.imported
    used = {slot.modality for task in tasks for slot in task.inputs.values()} | {task.output_modality for task in tasks}
    used |= {modality for one in description.trained_tasks for modality in one.modalities}
    others, experts = sorted(used - {"text"}), description.backbone.modality_experts
    found += [f"the modalities {', '.join(others)}"] if others else []
    # Roles have tokens of ours, which an imported tokenizer lacks.
    unmarked = imported is not None and imported.chat_template is None and any(task.chat for task in tasks)
    found += ["the turns of chats"] if unmarked else []
    return [*found, *(f"the experts of {', '.join(one.modalities)}" for one in experts)]


def _tasks(description: CheckpointConfig) -> list[Task]:
    known = all_tasks(description.tasks)
    return [known[one.task] for one in description.trained_tasks if one.task in known]


def _exported_text(description: CheckpointConfig, content: str, where: str) -> tuple[Tokenizer, ImportedText]:
    """The tokenizer with a token for every mark in use, and how texts open and close."""
    tokenizer, config = read_tokenizer(content, where), description.modalities.text
    if config.imported is not None:
        return tokenizer, config.imported
    text = Text(tokenizer, config.max_tokens)
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    if tokenizer.token_to_id(MARKS[1]) != text.end:
        raise ConfigError(f"{where} leaves ids unused before its last one, so our marks have no place in it")
    template = CHAT_TEMPLATE if any(task.chat for task in _tasks(description)) else None
    return tokenizer, ImportedText(vocab_size=text.vocab_size, eos=text.end, chat_template=template)


@torch.no_grad()
def _read(
    reader: CheckpointReader, rows: int, merged: dict[str, Tensor], stored: StoredTensor, dtype: torch.dtype | None
) -> Tensor:
    """A tensor of ours, `merged` with its low-rank update if it has one; of embedding and head the first rows."""
    if stored.ours in merged:
        tensor = merged[stored.ours]
    elif f"{stored.ours}{SEPARATOR}{EXPONENT}" in reader:
        tensor = torch.empty(stored.shape)
        read_weight(reader, stored.ours, tensor)
    else:
        tensor = reader.read(stored.ours)
    tensor = tensor[:rows] if stored.ours in (EMBEDDING, HEAD) else tensor
    return tensor if dtype is None else tensor.to(dtype)


def _write_hf(
    out: Path, groups: list[list[StoredTensor]], read: Any, settings: dict[str, Any], tokenizer: Tokenizer,
    text: ImportedText, dtype: str | None,
) -> None:  # fmt: skip
    """config.json, weights with experts one by one, tokenizer and chat template."""

    def shard(group: list[StoredTensor]) -> Shard:
        return Shard({name: part for one in group for name, part in one.split(read(one, DTYPES.get(dtype or "")))})

    first = shard(groups[0])
    stored = first.model["model.embed_tokens.weight"].dtype
    elements = sum(math.prod(shape) for group in groups for one in group for _, shape in one.parts())
    if elements * stored.itemsize > ONE_FILE:
        write_shards(out, first, map(shard, groups[1:]), len(groups) - 1)
    else:
        others = [shard(group).model for group in groups[1:]]
        write_tensors(out / WEIGHTS_FILE, dict(ChainMap(first.model, *others)))
    settings = {**settings, "torch_dtype": str(stored).removeprefix("torch.")}
    marks = {name: token for name, token in (("bos_token", text.bos), ("eos_token", text.eos)) if token is not None}
    about = {
        **text.names,
        **{name: tokenizer.id_to_token(token) for name, token in marks.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if text.chat_template is not None:
        about["chat_template"] = text.chat_template
        (out / "chat_template.jinja").write_text(text.chat_template, encoding="utf-8", newline="\n")
    ends: dict[str, Any] = {f"{name}_id": token for name, token in marks.items()}
    if text.stops:
        ends["eos_token_id"] = [text.eos, *text.stops]
    files = {"config.json": settings, "generation_config.json": ends, "tokenizer_config.json": about}
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8", newline="\n")
    (out / TOKENIZER_FILE).write_text(tokenizer.to_str(), encoding="utf-8", newline="\n")


def _write_gguf(
    out: Path, groups: list[list[StoredTensor]], read: Any, settings: dict[str, Any], tokenizer: Tokenizer,
    text: ImportedText, dtype: str | None,
) -> None:  # fmt: skip
    """`model.gguf`, with the tokenizer and the chat template in it."""
    tensors = [one for group in groups for one in group]
    shapes = {name: shape for one in tensors for name, shape in one.parts(stacked=True)}
    values = (item for one in tensors for item in one.split(read(one, None), stacked=True))
    special = {
        "ggml.bos_token_id": text.bos, "ggml.eos_token_id": text.eos, "ggml.add_bos_token": text.bos is not None,
        "ggml.padding_token_id": tokenizer.token_to_id(text.names.get("pad_token", "")),
        "ggml.eot_token_id": next(iter(text.stops), None), "chat_template": text.chat_template,
    }  # fmt: skip
    write_gguf(out / "model.gguf", settings, shapes, values, tokenizer, special, GGUF_TYPES[dtype or "fp16"])
