"""Codecs and encoders of the library `transformers`, by a name on the Hugging Face Hub or a folder; always frozen."""

# Shapes: B batch, H W pixels, h w positions, S samples, T positions, G codebooks of C vectors, N tokens of F features

import hashlib
import os
import re
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from pydantic import AfterValidator
from torch import Tensor, nn

from openm6.codecs.base import Codec, CodesShape
from openm6.core.errors import CheckpointError, ConfigError, DataError, OpenM6Error, first_line
from openm6.ops.audio import resample

PREFIX = "transformers:"
RATE = 16_000
STACK = 4  # of Whisper's 20 ms in one token, which then lasts as long as one of log-mels


class ExternalCodec(Codec):
    """A codec of `model`, whose codes stand for the vectors in `tables`, one per codebook."""

    def __init__(self, model: Any, tables: list[Tensor], codebooks: int | None) -> None:
        super().__init__()
        if codebooks is not None and not 1 <= codebooks <= len(tables):
            raise ConfigError(f"codebooks={codebooks} must be from 1 to {len(tables)}, the codebooks of this codec")
        self.model, self.tables = model, torch.stack(tables[:codebooks])
        self.config = CodesShape(*self.tables.shape[:2])

    def vectors(self) -> Tensor:
        """With unit variance in each codebook: those of a later residual are smaller."""
        return F.layer_norm(self.tables, self.tables.shape[1:])


class JanusCodec(ExternalCodec):
    """The image codec of Janus: one code per position."""

    kind: ClassVar[str] = "image"

    def __init__(self, model: Any, codebooks: int | None) -> None:
        super().__init__(model, [F.normalize(model.quantize.embedding.weight, dim=-1)], codebooks)
        self.step = 2 ** (len(model.config.channel_multiplier) - 1)

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        sides, step = raw.shape[2:], self.step
        if raw.dim() != 4 or raw.shape[1] != 3 or any(side % step or side == 0 for side in sides):
            raise DataError(f"images of shape {tuple(raw.shape)} do not fit the codec: sides are multiples of {step}")
        return self.model.encode(raw).image_tokens.view(len(raw), sides[0] // step, sides[1] // step, 1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        self.model.quantize.quant_state_dims = list(codes.shape[1:3])  # the library decodes images of one size alone
        return self.model.decode(codes.flatten(1)).clamp(-1.0, 1.0)


class MimiCodec(ExternalCodec):
    """Mimi, an audio codec of residual codebooks, the first of them trained to carry the words."""

    kind: ClassVar[str] = "audio"

    def __init__(self, model: Any, codebooks: int | None) -> None:
        parts = model.quantizer.semantic_residual_vector_quantizer, model.quantizer.acoustic_residual_vector_quantizer
        super().__init__(model, [layer.codebook.embed for part in parts for layer in part.layers], codebooks)
        self.rate = model.config.sampling_rate
        self.step = model.config.frame_size * RATE // self.rate

    @torch.no_grad()
    def encode(self, raw: Tensor) -> Tensor:
        if raw.dim() != 2 or raw.shape[1] == 0:
            raise DataError(f"audio of shape {tuple(raw.shape)} does not fit the codec: it reads B samples, not empty")
        samples = _resampled(F.pad(raw, (0, -raw.shape[1] % self.step)), RATE, self.rate)
        return self.model.encode(samples[:, None], num_quantizers=self.config.groups).audio_codes.mT  # B T G

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        return _resampled(self.model.decode(codes.mT).audio_values[:, 0], self.rate, RATE).clamp(-1.0, 1.0)


def _resampled(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """# B S -> B S"""
    return torch.from_numpy(np.stack([resample(one, rate, new_rate) for one in samples.numpy()]))


class Encoder(nn.Module):
    """Frozen features of images (h w F) or of samples at 16 kHz (N F, one for each `step` of them), `width` of each.

    `augments`: it takes a generator beside the input, and then reads it a little changed, as in training.
    """

    augments: ClassVar[bool] = False
    width: int
    step: int


# Other encoders by the prefix of their names, made of the rest of it and of `image` or `audio`.
ENCODERS: dict[str, Callable[[str, str], Encoder]] = {}


def _absolute(name: str | None) -> str | None:
    prefix, _, path = (name or "").partition(":")
    return f"{prefix}:{os.path.abspath(os.path.expanduser(path))}" if prefix == "openm6" and "/" in path else name


# Of a run as an encoder, the path from anywhere.
EncoderName = Annotated[str | None, AfterValidator(_absolute)]


class ImageEncoder(Encoder):
    """SigLIP and SigLIP 2, for which an image becomes a square or keeps its aspect; `width` features per patch."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor, self.width = model, processor, int(model.config.hidden_size)

    @torch.no_grad()
    def forward(self, image: PIL.Image.Image) -> np.ndarray:
        """Features in half precision.  # H W -> h w F"""
        inputs = self.processor(images=image, return_tensors="pt")
        features = self.model(**inputs).last_hidden_state[0].half().numpy()
        sides = [side // self.model.config.patch_size for side in inputs["pixel_values"].shape[2:]]
        down, across = inputs["spatial_shapes"][0].tolist() if "spatial_shapes" in inputs else sides
        return features[: down * across].reshape(down, across, -1)


class AudioEncoder(Encoder):
    """The encoder of Qwen3-ASR: `width` features for each `step` samples at 16 kHz."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor, self.width = model, processor, int(model.config.hidden_size)
        frames = 2 * getattr(model.config, "n_window", 1)  # three convolutions halve the number of frames in a window
        self.step = round(frames * processor.hop_length / -(-frames // 8))

    @torch.no_grad()
    def forward(self, samples: np.ndarray) -> np.ndarray:
        """Features in half precision, of as many samples at a time as the model was trained on.  # S -> N F"""
        limit = self.processor.n_samples
        parts = [self.encode(samples[start : start + limit]) for start in range(0, len(samples), limit)]
        return torch.cat(parts).half().numpy()

    def encode(self, samples: np.ndarray) -> Tensor:
        settings = {"padding": "longest", "return_attention_mask": True, "return_tensors": "pt"}
        inputs = self.processor(samples, sampling_rate=RATE, **settings)
        return self.model(inputs["input_features"], inputs["attention_mask"]).last_hidden_state


class WhisperEncoder(AudioEncoder):
    """The encoder of Whisper, which reads silence to the end of its 30 s; the features of the audio are kept."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.width, self.step = STACK * self.width, 2 * STACK * processor.hop_length

    def encode(self, samples: np.ndarray) -> Tensor:
        inputs = self.processor(samples, sampling_rate=RATE, return_tensors="pt")
        features = self.model(inputs["input_features"]).last_hidden_state[0]
        return features.unflatten(0, (-1, STACK)).flatten(1)[: -(-len(samples) // self.step)]


# By `model_type`: what it can be, its class in `transformers`, what uses it here, and its name within a larger model.
MODELS: dict[str, tuple[str, str, Any, str]] = {
    "janus": ("codec", "JanusVQVAE", JanusCodec, "vqmodel"),
    "mimi": ("codec", "MimiModel", MimiCodec, "mimi"),
    "siglip": ("image encoder", "SiglipVisionModel", ImageEncoder, "vision_model"),
    "siglip2": ("image encoder", "Siglip2VisionModel", ImageEncoder, "vision_model"),
    "whisper": ("audio encoder", "models.whisper.modeling_whisper.WhisperEncoder", WhisperEncoder, "encoder"),
    "qwen3_asr": ("audio encoder", "Qwen3ASREncoder", AudioEncoder, "audio_tower"),
}
PART = re.compile("_(vqgan|vision_model|encoder)$")  # of the type of one that is saved without the larger model


def load_external(name: str, role: str, codebooks: int | None = None) -> Any:
    """What is named after PREFIX as a `codec`, `image encoder` or `audio encoder`, in fp32 on the CPU.

    Only safetensors and JSON are read, and no code that comes with them is run. ConfigError: `transformers` is missing,
    or this is another model; CheckpointError: there is none, or it is not whole, or too new for the library.
    """
    source = name.removeprefix(PREFIX)
    if source == name:
        raise ConfigError(f"{name} is no {role}: name a model as {PREFIX}NAME")
    if not Path(source).is_dir() and (source.count("/") != 1 or source.startswith((".", "~", "/"))):
        raise CheckpointError(f"there is no folder {source}: name one with a model, or OWNER/NAME of the Hub")
    try:
        # An optional dependency, which takes seconds to import.
        import transformers  # noqa: PLC0415

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind = str(transformers.PreTrainedConfig.get_config_dict(source)[0].get("model_type"))
        found = MODELS.get(PART.sub("", kind))
        if found is None or found[0] != role:
            known = ", ".join(key for key, one in MODELS.items() if one[0] == role)
            raise ConfigError(f"{name} is of type {kind}, which is no {role}: name a model of type {known}")
        _, theirs, ours, prefix = found
        model, info = attrgetter(theirs)(transformers).from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
            key_mapping={rf"^(model\.|thinker\.)?{prefix}\.": ""},
        )  # fmt: skip
        if info["missing_keys"]:
            raise CheckpointError(f"{name} lacks the tensor {min(info['missing_keys'])}: download the whole model")
        model.requires_grad_(False).eval()
        if role == "codec":
            return ours(model, codebooks)
        if role == "audio encoder":
            return ours(model, transformers.AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False))
        loader = transformers.AutoImageProcessor
        # The same pixels with torchvision and without.
        return ours(model, loader.from_pretrained(source, trust_remote_code=False, backend="pil"))
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} needs the package {error.name}: pip install '.[hub]'") from None
    except OpenM6Error:
        raise
    # The library raises errors of its own, of its HTTP client and of the system.
    except Exception as error:
        raise CheckpointError(f"{name} cannot be loaded ({first_line(error)}): check files and network") from None


def weights_sha256(network: nn.Module) -> str:
    """A hash of all weights in fp32, whatever files and names the library stores them under."""
    tensors = (one.flatten().float().numpy() for one in network.state_dict().values() if one.dim())
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(one.tobytes()).digest() for one in tensors))).hexdigest()
