"""What a run adds to an imported decoder, without the decoder: experts, low-rank updates, encoders and heads.

`openm6 export --format addition` writes it, and `openm6 import --adapter` puts it onto the decoder again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openm6.checkpoint.folder import EXPONENT, MODEL_FILE, PREDICTORS_FILE, SEPARATOR
from openm6.checkpoint.load import open_reader
from openm6.checkpoint.reader import CheckpointReader, bytes_of
from openm6.checkpoint.save import named_tensors, write_tensors
from openm6.core.errors import CheckpointError, ConfigError
from openm6.core.files import new_folder
from openm6.hub.architectures import StoredTensor, backbone_config, layer_tensors, outer_tensors
from openm6.hub.decoders import packaged_decoder
from openm6.hub.pretrained import ADDITION_FILE, Pretrained, open_pretrained, read_json, read_text
from openm6.inference.load import read_texts
from openm6.models.description import MODEL_FILE as DESCRIPTION_FILE
from openm6.models.description import CheckpointConfig, read_description
from openm6.optim.low_precision import LEVELS, fit_exponent, from_levels, to_levels
from openm6.tasks.registry import all_tasks

# Smaller tensors keep their precision: norms, biases, scales.
SMALL = 4096
WHOLE = 1e-3  # of a level: rounding of fp32 products is far below it
CARD_FILE = "README.md"
REPORTS = (CARD_FILE, "report.json")
# Beside the weights of a model.
BESIDE = (*REPORTS, "NOTICE", "examples.yaml", "*.png", "*.flac", "*.wav", "*.ogg")


class Addition(NamedTuple):
    """An addition that was read: the description of the whole model, its weights in fp32, and files of a checkpoint."""

    description: CheckpointConfig
    weights: dict[str, Tensor]
    files: dict[str, str | bytes]


def base_tensors(pretrained: Pretrained) -> list[list[StoredTensor]]:
    """The tensors of a published decoder: those outside of layers, and those of each layer."""
    config, kind = backbone_config(pretrained.settings), pretrained.settings["model_type"]
    outer = outer_tensors(config, pretrained.text.vocab_size, pretrained.text.tie_word_embeddings)
    return [outer, *(layer_tensors(kind, config, layer) for layer in range(config.num_layers))]


def fingerprint(tensors: Iterable[StoredTensor], read: Callable[[StoredTensor], Tensor]) -> str:
    """The sha256 of the values of a decoder, whatever they are stored in; one tensor is in memory at a time."""
    digest = hashlib.sha256()
    for one in tensors:
        # Of the embedding, rows that an import adds are left out.
        digest.update(bytes_of(read(one)[: one.shape[0]].float().contiguous()))
    return digest.hexdigest()


def export_addition(run: Path, folder: Path, out: Path, dtype: str) -> str:
    """Write what the checkpoint `folder` of a run adds to its decoder; return what was written.

    ConfigError if it adds nothing, or if training has changed the weights of the decoder.
    """
    description, _ = read_texts(folder)
    if not description.base_model:
        raise ConfigError(f"{run} was not trained from an imported decoder: export it as hf, or use save_pretrained")
    pretrained, reader = open_pretrained(description.base_model), open_reader(folder)
    tensors = [one for group in base_tensors(pretrained) for one in group]
    base = fingerprint(tensors, lambda one: one.read(pretrained.weights))
    if missing := [one.ours for one in tensors if one.ours not in reader]:
        raise ConfigError(
            f"{run} has no {missing[0]}, as with --experts or offloaded weights in int8: an addition is beside the "
            "decoder as it was imported; export the run as hf"
        )
    if base != fingerprint(tensors, lambda x: reader.read(x.ours)):
        raise ConfigError(
            f"training has changed the weights of {description.base_model}, so there is no addition to it: "
            "train with model.freeze=[text], or with lora"
        )
    left_out = unused_names(description)
    names = set(reader.names) - {one.ours for one in tensors}
    weights = {name: reader.read(name) for name in names if SEPARATOR not in name and not name.startswith(left_out)}
    if not weights:
        raise ConfigError(f"{run} is {description.base_model} as it was imported: train something beside it first")
    description.refuse_local()
    published = description.to_publish().model_copy(update={"backbone": description.backbone})
    with new_folder(out) as partial:
        write_tensors(partial / MODEL_FILE, compact(weights, dtype))
        (partial / DESCRIPTION_FILE).write_text(published.to_json(), encoding="utf-8", newline="\n")
        about: dict[str, Any] = {"base_model": published.base_model, "sha256": base}
        copy_beside(folder, partial)
        for file in (folder / PREDICTORS_FILE, *(run / name for name in REPORTS)):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        if (decoder := packaged_decoder(pretrained.path)) is not None:
            about["decoder"] = decoder.model_dump()
            card = partial / CARD_FILE
            if card.is_file() and "\nbase_model: " not in (text := card.read_text(encoding="utf-8")):
                named = text.replace("\nlicense: ", f"\nbase_model: {decoder.model}\nlicense: ", 1)
                card.write_text(named, encoding="utf-8", newline="\n")
        (partial / ADDITION_FILE).write_text(json.dumps(about, indent=1), encoding="utf-8", newline="\n")
        size = sum(file.stat().st_size for file in partial.iterdir())
    return f"{out}: addition to {published.base_model} in {dtype}, {size / 1e6:.1f} MB"


def copy_beside(source: Path, target: Path) -> None:
    """Copy the card, the report, the notice and the examples of a model, as far as it has them."""
    for file in (file for pattern in BESIDE for file in source.glob(pattern)):
        # A link in a folder of someone else's may lead anywhere.
        if file.is_file() and not file.is_symlink():
            shutil.copyfile(file, target / file.name)


def unused_names(description: CheckpointConfig) -> tuple[str, ...]:
    """The names of weights that no trained task uses; an import draws their first values again."""
    known = all_tasks(description.tasks)
    tasks = [known[one.task] for one in description.trained_tasks if one.task in known]
    targets = {task.output_modality for task in tasks}.union(*(one.modalities for one in description.trained_tasks))
    inputs = {slot.modality for task in tasks for slot in task.inputs.values()}
    # An input and an output have weights in common, under the name of the input.
    unused = [name for name in ("image", "audio") if name not in targets | inputs]
    heads = [f"adapters.{name}_out." for name in ("image", "audio") if name not in targets]
    return (*(f"adapters.{name}_" for name in unused), *heads)


@torch.no_grad()
def compact(whole: dict[str, Tensor], weights: str) -> dict[str, Tensor]:
    """Large matrices in bf16, or as int8 levels with the exponents of their blocks; all else as it is.

    What was read from such a file gives the same file again.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        if weights == "fp32" or tensor.dim() < 2 or tensor.numel() < SMALL or not tensor.is_floating_point():
            found[name] = tensor
        elif weights == "bf16":
            found[name] = tensor.to(torch.bfloat16)
        else:
            found[name], found[f"{name}{SEPARATOR}{EXPONENT}"] = _levels(tensor.float())
    return found


def _levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest levels, and exponents; those of values that are whole in units of a scale stay as they were."""
    exponent = fit_exponent(values)
    # Rounding makes the largest value of a block smaller, so it may fit the next scale now.
    coarser = (exponent.to(torch.int16) + 1).clamp(max=127).to(torch.int8)
    whole = []
    for one in (exponent, coarser):
        levels = to_levels(values, one)
        whole.append(((levels - levels.round()).abs() < WHOLE).unflatten(-1, (one.shape[-1], -1)).all(-1))
    exponent = torch.where(whole[1] & ~whole[0], coarser, exponent)
    return to_levels(values, exponent).round().clamp(-LEVELS, LEVELS).to(torch.int8), exponent


def read_addition(folder: Path, pretrained: Pretrained) -> Addition:
    """The addition in a folder for this decoder; CheckpointError if it is not whole, or for other weights."""
    about, path = read_json(folder / ADDITION_FILE, needed=True), folder / DESCRIPTION_FILE
    tensors = [one for group in base_tensors(pretrained) for one in group]
    if fingerprint(tensors, lambda one: one.read(pretrained.weights)) != about.get("sha256"):
        base = about.get("base_model")
        raise CheckpointError(f"{folder} is an addition to {base}, and {pretrained.path} is not: import that model")
    if not path.is_file():
        raise CheckpointError(f"{folder} lacks {path.name}: copy the whole folder")
    description = read_description(read_text(path), str(path))
    backbone = description.backbone.model_copy(update={"lora": None, "modality_experts": ()})
    if not _equal(backbone.model_dump(), backbone_config(pretrained.settings).model_dump()):
        raise CheckpointError(f"{path} describes another decoder than {pretrained.path}: copy the whole folder again")
    reader = CheckpointReader(folder, "model")
    weights = {name: _restored(reader, name) for name in reader.names if SEPARATOR not in name}
    kept = folder / PREDICTORS_FILE
    return Addition(description, weights, {kept.name: kept.read_bytes()} if kept.is_file() else {})


def _restored(reader: CheckpointReader, name: str) -> Tensor:
    tensor, key = reader.read(name), f"{name}{SEPARATOR}{EXPONENT}"
    if tensor.dtype == torch.int8:
        if key not in reader or reader.read(key).shape != fit_exponent(tensor.float()).shape:
            raise CheckpointError(f"{reader.folder} has no exponents that fit {name}: copy the whole folder again")
        return from_levels(tensor, reader.read(key), torch.float32)
    return tensor.float() if tensor.is_floating_point() else tensor


def _equal(first: Any, second: Any) -> bool:
    """Whether settings are equal; a GGUF file has numbers in fp32."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(one, second[name]) for name, one in first.items())
    if isinstance(first, float) and isinstance(second, float):
        return math.isclose(first, second, rel_tol=1e-6)
    return bool(first == second)


def check_weights(added: dict[str, Tensor], base: list[StoredTensor], model: nn.Module, where: str) -> None:
    """Raise CheckpointError unless a decoder and what is added to it are the weights that the model has."""
    shapes = {name: tuple(tensor.shape) for name, tensor in added.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    for name in sorted(shapes.keys() | expected.keys() - {one.ours for one in base}):
        if shapes.get(name) != expected.get(name):
            raise CheckpointError(f"{where}: {name} does not fit its {DESCRIPTION_FILE}: copy the whole folder again")
