"""Tiny random codecs and encoders of `transformers`, saved as published models are; no test needs the network."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from openm6.codecs.external import PREFIX
from openm6.modalities.registry import Modalities, ModalitiesConfig, build_modalities
from openm6.modalities.text import train_tokenizer
from tests.small_model import SCALES, WORDS

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT: dict[str, Any] = {**SIZE, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
VQ: dict[str, Any] = {
    "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 8, "embed_dim": 4,
    "num_embeddings": 64, "num_patches": 8, "projection_dim": 32, "image_token_embed_dim": 32,
}  # fmt: skip
WHISPER: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_layers": 1,
    "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 64, "max_source_positions": 100,
    "num_mel_bins": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
    "output_dim": 32, "downsample_hidden_size": 8,
}  # fmt: skip
MIMI: dict[str, Any] = {
    **SIZE, "num_key_value_heads": 2, "head_dim": 16, "num_filters": 4, "upsample_groups": 32, "codebook_size": 32,
    "codebook_dim": 8, "vector_quantization_hidden_dimension": 8, "num_quantizers": 4,
}  # fmt: skip
SQUARE = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
OWN_ASPECT = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 16}
# Those of parts of models are saved without the rest.
NAMES = ("siglip", "siglip part", "siglip2", "whisper", "whisper part", "qwen3_asr part", "janus", "janus part", "mimi")


def build(name: str) -> Any:
    """A model, and the settings of its processor or the processor itself."""
    vision = {**SIZE, "image_size": 32, "patch_size": 8}
    vq = transformers.JanusVQVAEConfig(**VQ)
    match name:
        case "siglip":
            config = transformers.SiglipConfig(text_config=dict(SIZE, vocab_size=64), vision_config=vision)
            return transformers.SiglipModel(config), SQUARE
        case "siglip part":
            return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)), SQUARE
        case "siglip2":
            config = transformers.Siglip2VisionConfig(**SIZE, patch_size=8, num_patches=16)
            return transformers.Siglip2VisionModel(config), OWN_ASPECT
        case "whisper":
            model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER))
            return model, transformers.WhisperFeatureExtractor(20, chunk_length=2)
        case "whisper part":
            model = WhisperEncoder(transformers.WhisperConfig(**WHISPER))
            return model, transformers.WhisperFeatureExtractor(20, chunk_length=2)
        case "qwen3_asr part":
            model = transformers.Qwen3ASREncoder(transformers.Qwen3ASREncoderConfig(**QWEN))
            return model, transformers.Qwen3ASRFeatureExtractor(16)
        case "janus":
            vision = transformers.JanusVisionConfig(**SIZE, image_size=64, patch_size=8, projection_dim=32)
            parts = {"text_config": transformers.LlamaConfig(**TEXT), "vision_config": vision, "vq_config": vq}
            return transformers.JanusForConditionalGeneration(transformers.JanusConfig(**parts)), None
        case "janus part":
            return transformers.JanusVQVAE(vq), None
        case _:
            return transformers.MimiModel(transformers.MimiConfig(**MIMI)), None


def publish(name: str, folder: Path, seed: int = 0) -> Any:
    """Save a model whose weights all matter; return it."""
    torch.manual_seed(seed)
    model, processor = build(name)
    for key, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(std=1.5 * tensor[0].numel() ** -0.5)
        elif "bias" in key:
            tensor.normal_(std=0.2)
        if "embed_sum" in key:
            tensor.normal_(std=0.3)
    model.save_pretrained(folder)
    if isinstance(processor, dict):
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    elif processor is not None:
        processor.save_pretrained(folder)
    return model.eval()


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def published(name: str) -> str:
    """The name under which a model is found, once it is saved."""
    folder = Path(_home().name) / name.replace(" ", "_")
    publish(name, folder)
    return f"{PREFIX}{folder}"


def settings(image: str = "siglip2") -> dict[str, Any]:
    """Modalities of a recipe, of which images and audio are read and written by models of `transformers`."""
    return {
        "image": {"codec": published("janus"), "encoder": published(image), "side": 32},
        "audio": {"codec": published("mimi"), "codebooks": 3, "encoder": published("whisper")},
    }


@functools.cache
def external_modalities() -> Modalities:
    """All modalities with these settings."""
    return build_modalities(ModalitiesConfig.model_validate(settings()), train_tokenizer(WORDS, 320), SCALES)
