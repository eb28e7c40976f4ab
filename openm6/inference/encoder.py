"""A trained model as a frozen encoder of images or audio for another one: `modalities.image.encoder: openm6:NAME`."""

# Shapes: N tokens, or h w patches, of F features; S samples

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from openm6.checkpoint.folder import MODEL_FILE, SHIPPED, latest
from openm6.codecs.external import Encoder
from openm6.core.errors import ConfigError, nearest
from openm6.inference.load import LoadedModel, load
from openm6.modalities.audio import Audio
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Rng
from openm6.tasks.registry import all_tasks


class TrainedEncoder(Encoder):
    """The features of each token that the model `name` reads an image or a recording as.

    They are the outputs of its last layer but one: nothing in its training has read those of the last one at tokens of
    a prompt. `name` is that of a model of the package, or a path with a slash. ConfigError: there is no such model, or
    it was not trained on such inputs; CheckpointError: there is no run at the path.
    """

    augments: ClassVar[bool] = True

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        shipped = sorted(folder.name for folder in SHIPPED.glob("*") if (folder / MODEL_FILE).is_file())
        if "/" not in name and name not in shipped:
            hint = f"{nearest(name, shipped)}; the path of a run has a slash, as ./{name}"
            raise ConfigError(f"openm6:{name} is no model of the package; {hint}")
        loaded = _headless(latest(Path(name) if "/" in name else SHIPPED / name))
        known, trained = all_tasks(loaded.description.tasks), loaded.description.trained_tasks
        inputs = {slot.modality for one in trained if one.task in known for slot in known[one.task].inputs.values()}
        if kind not in inputs.union(*(one.modalities for one in trained)):
            raise ConfigError(f"{name} was not trained on inputs of {kind}: name a model that was")
        self.modality, self.omni = loaded.modalities[kind], loaded.omni
        self.width = loaded.description.backbone.hidden_size
        if isinstance(self.modality, Audio):
            self.step = self.modality.step

    @torch.inference_mode()
    def forward(self, raw: Any, rng: Rng = None) -> np.ndarray:
        """Features in half precision; a generator asks for the augmentation of the model.  # H W -> h w F, S -> N F"""
        segment = self.modality.source(raw, rng)
        batch = collate([[build_sequence([segment])]], len(segment))
        hidden, _ = self.omni(batch.groups, batch.meta)
        features = hidden[0].half().numpy()
        if isinstance(self.modality, Audio):
            return np.asarray(features)
        down = len(np.unique(segment.arrays["positions"][:, 0]))
        return np.asarray(features.reshape(down, len(features) // down, -1))


@functools.lru_cache(2)
def _headless(checkpoint: Path) -> LoadedModel:
    """The model of a checkpoint without its last layer; one for images and audio."""
    loaded = load(checkpoint, "cpu")
    loaded.omni.backbone.layers = loaded.omni.backbone.layers[:-1]
    return loaded
