"""A published model opened: a folder of safetensors, a GGUF file, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from openm6.checkpoint.folder import INDEX_FILE
from openm6.checkpoint.folder import MODEL_FILE as WEIGHTS_FILE
from openm6.checkpoint.reader import CheckpointReader
from openm6.core.errors import CheckpointError, ConfigError, first_line
from openm6.hub.architectures import THEIR_EMBEDDING, THEIR_HEAD, Settings
from openm6.hub.decoders import sha256_of
from openm6.hub.gguf_file import GgufFile, read_gguf_tokenizer
from openm6.modalities.text import ImportedText, read_tokenizer
from openm6.models.description import TOKENIZER_FILE

# No format that could run code is ever fetched.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "README.md")
TWICE = "*consolidated*"  # all weights of Mistral's models once more, under other names
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?")
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
ROWS = 8192  # of a matrix that are read at once
ADDITION_FILE = "addition.json"  # of what belongs on an imported decoder, see hub/addition.py


@dataclass(frozen=True)
class Pretrained:
    """A published decoder: its config.json, its weights, the text of its tokenizer.json, and how texts open and close.

    path: the folder or the GGUF file.
    """

    path: Path
    settings: Settings
    weights: CheckpointReader | GgufFile
    tokenizer: str
    text: ImportedText


def open_pretrained(source: str, sha256: str | None = None) -> Pretrained:
    """The model in a folder, a GGUF file, or `OWNER/NAME` on the Hub (of a GGUF repository `OWNER/NAME/FILE.gguf`).

    `OWNER/NAME@REVISION` is a branch, a tag or a commit. If `sha256` is given, that of the file is checked first.
    Headers and metadata are read, no weights. CheckpointError if it is not there, not whole, or its parts do not fit
    one another, ConfigError if something of it is not supported.
    """
    path = Path(source)
    try:
        path = path if path.exists() else download(source)
        if sha256 is not None and path.is_dir():
            raise ConfigError(f"sha256 is for a single file, and {path} is a folder: leave it out")
        if sha256 is not None and (own := sha256_of(path)) != sha256.strip().lower():
            raise CheckpointError(f"{path} has the sha256 {own}, not {sha256}: download it again, or check the number")
        file = GgufFile(path) if path.is_file() else None
    except ModuleNotFoundError as error:
        raise ConfigError(f"{source} needs an optional package: pip install {error.name}") from None
    if file is not None:
        return _opened(path, file.settings, file, *read_gguf_tokenizer(file.tokenizer_fields))
    index = read_json(path / INDEX_FILE).get("weight_map") or {}
    if missing := sorted({name for name in index.values() if not (path / name).is_file()}):
        raise CheckpointError(f"{path} lacks {missing[0]}, which {INDEX_FILE} names: download the whole model")
    if not (path / WEIGHTS_FILE).exists() and not any(path.glob("model-*.safetensors")):
        raise CheckpointError(
            f"{source} holds no safetensors file: download the whole model, convert it to safetensors, or name a GGUF "
            "file, as OWNER/NAME/FILE.gguf"
        )
    settings = read_json(path / "config.json", needed=True)
    if not (path / TOKENIZER_FILE).exists():
        raise CheckpointError(f"{path} lacks {TOKENIZER_FILE}: save the fast tokenizer of this model there")
    tokenizer = read_text(path / TOKENIZER_FILE)
    special = _special_tokens(path, settings, read_tokenizer(tokenizer, str(path / TOKENIZER_FILE)))
    return _opened(path, settings, CheckpointReader(path, "model"), tokenizer, special)


def _opened(
    path: Path, settings: Settings, weights: CheckpointReader | GgufFile, tokenizer: str,
    special: dict[str, Any],
) -> Pretrained:  # fmt: skip
    """Raise CheckpointError if the tokenizer has ids that the embedding lacks."""
    if THEIR_EMBEDDING not in weights:
        raise CheckpointError(f"{path} lacks the tensor {THEIR_EMBEDDING}: download the whole model")
    rows = weights.shape(THEIR_EMBEDDING)[0]
    largest = max(read_tokenizer(tokenizer, str(path)).get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"{path}: the tokenizer has ids up to {largest}, but the embedding {rows} rows: it is that of another model"
        )
    tied = bool(settings.get("tie_word_embeddings", THEIR_HEAD not in weights))
    if tied and isinstance(weights, CheckpointReader) and THEIR_HEAD in weights:
        tied = _same(weights, THEIR_HEAD, THEIR_EMBEDDING)  # as transformers 5: a head of other values is not tied
    context = settings.get("max_position_embeddings")
    text = ImportedText(vocab_size=rows, tie_word_embeddings=tied, context=context, **special)
    return Pretrained(path, settings, weights, tokenizer, text)


def _same(weights: CheckpointReader, one: str, other: str) -> bool:
    """Whether two matrices are equal, read in parts."""
    rows = weights.shape(one)[0]
    parts = (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))
    return weights.shape(one) == weights.shape(other) and all(
        torch.equal(weights.read(one, part), weights.read(other, part)) for part in parts
    )


def _special_tokens(path: Path, settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields of `ImportedText`: what the tokenizer puts before a text, what ends one, chat template and names."""
    own = read_json(path / "tokenizer_config.json")
    plain, opened = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    bos = opened[0] if len(opened) > len(plain) and opened[-len(plain) :] == plain else None
    named = {name: value.get("content") if isinstance(value := own.get(name), dict) else value for name in NAMED}
    names = {name: value for name, value in named.items() if isinstance(value, str)}
    eos = None if "eos_token" not in names else tokenizer.token_to_id(names["eos_token"])
    found: Any = read_json(path / "generation_config.json").get("eos_token_id", settings.get("eos_token_id"))
    ends = [token for token in (found if isinstance(found, list) else [found]) if token is not None]
    eos = eos if eos is not None else next(iter(ends), None)
    template = own.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one["name"] == "default"), None)
    file = path / "chat_template.jinja"
    template = read_text(file) if file.exists() else template
    stops = tuple(token for token in ends if token != eos)
    return {"bos": bos, "eos": eos, "stops": stops, "chat_template": template, "names": names}


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): download the whole model") from None


def read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none and it is not needed."""
    try:
        found = json.loads(read_text(path)) if needed or path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download the whole model") from None
    return found if isinstance(found, dict) else {}


def split_revision(name: str) -> tuple[str, str | None]:
    """The parts of OWNER/NAME@REVISION of the Hub; anything else as it is, and None."""
    found = HUB_ID.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def download(source: str, options: Mapping[str, Any] | None = None) -> Path:
    """A model of the Hub in the local cache: its settings and safetensors, or one file; CheckpointError if it fails.

    options: further arguments of huggingface_hub's functions, such as `token`.
    """
    parts = source.split("/")
    if len(parts) not in (2, 3) or not all(parts) or source.startswith((".", "~")):
        raise CheckpointError(f"there is no model at {source}: name a folder, a GGUF file or OWNER/NAME of the Hub")
    # An optional dependency.
    import huggingface_hub  # noqa: PLC0415

    name, revision = split_revision("/".join(parts[:2]))
    options = {"revision": revision, **(options or {})}
    try:
        if len(parts) == 3:
            return Path(huggingface_hub.hf_hub_download(name, parts[2], **options))
        files: dict[str, Any] = {"allow_patterns": list(HUB_FILES), "ignore_patterns": TWICE}
        return Path(huggingface_hub.snapshot_download(name, **files, **options))
    # The library raises errors of its own, of its HTTP client and of the system.
    except Exception as error:
        raise CheckpointError(
            f"{source} is neither a local path nor can it be downloaded ({first_line(error)}): check name and network"
        ) from None
