"""Codecs by name or file: one safetensors file each, the config in its metadata, or a folder of another library."""

import json
from pathlib import Path
from types import FunctionType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.codecs.base import Codec, TrainableCodec
from openm6.codecs.external import PREFIX, load_external
from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.core.config import Config, build
from openm6.core.errors import CheckpointError, ConfigError, nearest
from openm6.core.extensions import installed

CODECS: dict[str, tuple[type[Config], type[TrainableCodec]]] = {
    "image": (ImageCodecConfig, ImageCodec),
    "audio": (AudioCodecConfig, AudioCodec),
}
METADATA_KEY = "openm6_codec"
SHIPPED = Path(__file__).parent / "weights"


def shipped_codecs() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.safetensors")))


def save_codec(codec: TrainableCodec, path: Path | str, dtype: torch.dtype = torch.float16) -> None:
    """Write weights (matrices as `dtype`, the rest in fp32) and config to one safetensors file."""
    state = codec.state_dict().items()
    tensors = {name: one.to(dtype if one.dim() > 1 else torch.float32).contiguous().cpu() for name, one in state}
    about = {"kind": codec.kind, "config": codec.config.model_dump(mode="json")}
    # A single key: safetensors writes several in random order, and equal codecs should be equal files.
    save_file(tensors, str(path), {METADATA_KEY: json.dumps(about)})


def load_codec(name_or_path: Path | str, codebooks: int | None = None) -> Codec:
    """A codec in fp32 on the CPU, in evaluation mode, without gradients; of an external one the first codebooks.

    Other packages add codecs by entry points `openm6.codecs`: functions that return one. ConfigError: neither a shipped
    or installed name nor a file; CheckpointError: the file is no codec, or its weights do not fit its config.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name.startswith(PREFIX):
        return load_external(name, "codec", codebooks)
    if codebooks is not None:
        raise ConfigError(f"codebooks={codebooks} is for a codec from transformers, which {name} is not: leave it out")
    if "/" not in name and (shipped := SHIPPED / f"{name}.safetensors").is_file():
        path = shipped
    elif not path.is_file():
        added = installed("openm6.codecs", FunctionType)
        if name in added:
            codec = added[name]()
            return codec.requires_grad_(False).eval()
        known = (*shipped_codecs(), *added)
        raise ConfigError(f"no codec {name!r}, neither as a file nor by name; {nearest(name, known)}")
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a codec: {error}") from None
    if about.get("kind") not in CODECS or "config" not in about:
        raise CheckpointError(f"{path} holds no codec: name a file written by training a codec-… recipe")
    config_class, codec_class = CODECS[about["kind"]]
    codec = codec_class(build(config_class, about["config"], str(path)))
    try:
        codec.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the weights in {path} do not fit its config: {reason}") from None
    return codec.requires_grad_(False).eval()


def codec_scores(name: str) -> dict[str, float]:
    """Scores on test records that a shipped codec came with, as `source metric`; empty for one of your own."""
    path = SHIPPED / f"{name}.json"
    scores = json.loads(path.read_text(encoding="utf-8"))["test"] if path.is_file() else {}
    return {f"{source} {metric}": v for source, found in scores.items() for metric, v in found.items()}
