"""Codecs and encoders by name or file: one safetensors file each, the config in its metadata, or another library's."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from openm6.codecs.audio import AudioCodec, AudioCodecConfig
from openm6.codecs.base import Codec, TrainableCodec
from openm6.codecs.conv_encoder import ConvEncoder
from openm6.codecs.external import ENCODERS, PREFIX, Encoder, load_external
from openm6.codecs.image import ImageCodec, ImageCodecConfig
from openm6.codecs.mel_encoder import MelEncoder, MelEncoderConfig
from openm6.codecs.pixel_encoder import PixelEncoder, PixelEncoderConfig
from openm6.core.config import Config, build
from openm6.core.errors import CheckpointError, ConfigError, nearest
from openm6.core.extensions import installed

CODECS: dict[str, tuple[type[Config], type[TrainableCodec]]] = {
    "image": (ImageCodecConfig, ImageCodec),
    "audio": (AudioCodecConfig, AudioCodec),
}
NETWORKS: dict[str, tuple[type[Config], type[nn.Module]]] = {
    **CODECS,
    "image encoder": (PixelEncoderConfig, PixelEncoder),
    "audio encoder": (MelEncoderConfig, MelEncoder),
}
METADATA_KEY = "openm6_codec"
SHIPPED = Path(__file__).parent / "weights"
ENCODER = "-encoder"  # at the end of the file names of shipped encoders


def shipped_codecs() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.safetensors") if not path.stem.endswith(ENCODER)))


def shipped_encoders() -> tuple[str, ...]:
    """The names of files of encoders, which begin with the modality, without what all of them end with."""
    return tuple(sorted(path.stem.removesuffix(ENCODER) for path in SHIPPED.glob(f"*{ENCODER}.safetensors")))


def save_codec(codec: TrainableCodec | ConvEncoder, path: Path | str, dtype: torch.dtype = torch.float16) -> None:
    """Write weights (matrices as `dtype`, the rest in fp32) and config to one safetensors file.

    Batch norms of an encoder become a part of its convolutions first.
    """
    if isinstance(codec, ConvEncoder):
        codec.fuse()
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
    codec = _read(path, CODECS, "codec")
    assert isinstance(codec, Codec)
    return codec


def load_encoder(name: str, kind: str) -> Encoder:
    """A frozen encoder of `image` or `audio`: a shipped name, a file, openm6:NAME, or transformers:NAME.

    ConfigError: none is called so; CheckpointError: it is not whole, or not an encoder of this kind.
    """
    prefix, _, model = name.partition(":")
    if prefix in ENCODERS:
        return ENCODERS[prefix](model, kind)
    if name.startswith(PREFIX):
        return load_external(name, f"{kind} encoder")
    path = SHIPPED / f"{name}{ENCODER}.safetensors" if name in shipped_encoders() else Path(name)
    if not path.is_file():
        hint = f"{nearest(name, shipped_encoders())}; a model is named as {PREFIX}NAME or openm6:NAME"
        raise ConfigError(f"no encoder {name!r}, neither as a file nor by name; {hint}")
    encoder = _read(path, {key: one for key, one in NETWORKS.items() if key == f"{kind} encoder"}, f"{kind} encoder")
    assert isinstance(encoder, Encoder)
    return encoder


def _read(path: Path, known: Mapping[str, tuple[type[Config], type[nn.Module]]], what: str) -> nn.Module:
    """The network of a file, in fp32 on the CPU, in evaluation mode; CheckpointError: it is none of the `known`."""
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a {what}: {error}") from None
    if about.get("kind") not in known or "config" not in about:
        raise CheckpointError(f"{path} holds no {what}: name a file that its training wrote")
    config_class, network_class = known[about["kind"]]
    network = network_class(build(config_class, about["config"], str(path)))
    if isinstance(network, ConvEncoder):
        network.fuse()
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"the weights in {path} do not fit its config: {reason}") from None
    return network.requires_grad_(False).eval()


def codec_scores(name: str) -> dict[str, float]:
    """Scores on test records that a shipped codec came with, as `source metric`; empty for one of your own."""
    path = SHIPPED / f"{name}.json"
    scores = json.loads(path.read_text(encoding="utf-8"))["test"] if path.is_file() else {}
    return {f"{source} {metric}": v for source, found in scores.items() for metric, v in found.items()}
