"""A model of four modalities small enough for tests: width 64, two layers, four experts, untrained."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from openm6.data.source import Source, SourceConfig
from openm6.data.sources import open_sources
from openm6.evaluate.run import source_configs
from openm6.inference.load import LoadedModel
from openm6.modalities.pool import PoolConfig
from openm6.modalities.registry import Modalities, ModalitiesConfig, PromptAttention, build_modalities
from openm6.modalities.text import train_tokenizer
from openm6.models.config import BackboneConfig
from openm6.models.description import CheckpointConfig, TrainedTask
from openm6.models.omni import Omni
from openm6.nn.config import ExpertsConfig
from openm6.train.run import read_recipe, recipe_path

BACKBONE = BackboneConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    experts=ExpertsConfig(intermediate_size=64, num_experts=4, top_k=2),
)
SCALES = {
    "price": (40.0, 30.0),
    "rating": (4.0, 0.6),
    "monthly_sales": (100.0, 50.0),
    "weekly_sales": (25.0, 15.0),
    "temperature_c": (70.0, 20.0),
    "load_percent": (50.0, 30.0),
    "hours": (9000.0, 5000.0),
    "vibration_mm_s": (4.0, 3.0),
    "mass": (10.0, 2.0),
    "length": (3.0, 0.5),
    "digit": (4.5, 2.0),
    "temp_max": (15.0, 7.0),
    "bill_length_mm": (44.0, 5.5),
    "bill_depth_mm": (17.2, 2.0),
    "flipper_length_mm": (200.0, 14.0),
    "body_mass_g": (4050.0, 800.0),
    "sepal_length_cm": (5.8, 0.9),
    "sepal_width_cm": (3.0, 0.4),
    "petal_length_cm": (4.3, 1.7),
    "petal_width_cm": (1.3, 0.8),
    "latitude": (17.0, 27.0),
    "longitude": (20.0, 70.0),
    "area_km2": (8e4, 4e5),
    "land_neighbours": (3.0, 2.0),
    "languages": (1.0, 1.0),
}
WORDS = ("draw the digit seven", "画数字七", "say zero", "the mass of a small red apple", "What is this?")
TRAINED_TASKS = (
    ("text_to_image", "digits"),
    ("image_inpainting", "digits"),
    ("tabular_regression", "penguins"),
    ("audio_inpainting", "spoken"),
)


@cache
def modalities(prompt_attention: PromptAttention = "bidirectional", stem: str = "linear") -> Modalities:
    """The four modalities with the shipped codecs; made once a process, since nothing in them learns."""
    values = {"prompt_attention": prompt_attention, "image": {"stem": stem}}
    return build_modalities(ModalitiesConfig.model_validate(values), train_tokenizer(WORDS, 320), SCALES)


def omni(seed: int = 0, embedding: PoolConfig | None = None, stem: str = "linear") -> Omni:
    """An untrained model in evaluation mode, its weights large enough for every token to matter."""
    torch.manual_seed(seed)
    model = Omni(BACKBONE, modalities(stem=stem), embedding)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model.eval().requires_grad_(False)


def loaded(
    seed: int = 0,
    trained_tasks: tuple[tuple[str, str], ...] = TRAINED_TASKS,
    prompt_attention: PromptAttention = "bidirectional",
) -> LoadedModel:
    """The untrained model as if it came from a checkpoint."""
    description = CheckpointConfig(
        backbone=BACKBONE,
        modalities=ModalitiesConfig(prompt_attention=prompt_attention),
        scales=SCALES,
        trained_tasks=[TrainedTask(task=task, source=source) for task, source in trained_tasks],
    )
    return LoadedModel(omni(seed), modalities(prompt_attention), description, Path("nowhere/checkpoints/step-1"))


@cache
def embedding_model() -> LoadedModel:
    """The untrained model with a head for embeddings."""
    plain, embedding = loaded(trained_tasks=(("image_text_retrieval", "digits"),)), PoolConfig(size=16)
    description = plain.description.model_copy(update={"embedding": embedding})
    return replace(plain, omni=omni(embedding=embedding), description=description)


@cache
def demo_configs() -> dict[str, SourceConfig]:
    """The sources of the demo recipe, and embedded ones for harder tasks."""
    recipe, values = read_recipe(recipe_path("demo"), [])
    assert recipe.kind == "multimodal"
    more = {
        "emoji": "emoji",
        "poems": "poems_zh",
        "wordnet": "wordnet_en",
    }  # beyond what a short run can learn
    embedded = {name: {"kind": "embedded", "name": found} for name, found in more.items()}
    return source_configs({**values["sources"], **embedded}, "demo")


@cache
def demo_sources(split: str = "train") -> dict[str, Source]:
    """All embedded data as the demo uses it, pairs and windows among it, and questions asked about flags."""
    asked = {"kind": "pairs", "left": "countries", "right": "questions", "key": "text_en"}
    more = {"asked": asked, "countries": {"kind": "embedded", "name": "countries"}}
    fields = {"image": "image", "text_en": "text_en", "tags_en": "tags_en", "categories": ["label"]}
    paths = {"path": "embedded:shop-train", "test_path": "embedded:shop-test"}
    more["goods"] = {"kind": "parquet", **paths, "fields": fields, "limit": 60}
    more |= {name: {"kind": "embedded", "name": name, "limit": 60} for name in ("shop", "machines", "audio_events")}
    configs = {**demo_configs(), **source_configs(more, "more")}
    return open_sources(configs, "train" if split == "train" else "test")
