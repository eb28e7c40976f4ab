"""A trained model as a frozen encoder of images or audio for another one: `modalities.image.encoder: openm6:NAME`."""

# Shapes: N tokens, or h w patches, of F features; S samples; T tokens of the question, D width

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from openm6.checkpoint.folder import MODEL_FILE, SHIPPED, latest
from openm6.codecs.external import Encoder
from openm6.core.errors import ConfigError, nearest
from openm6.inference.load import LoadedModel, load
from openm6.inference.question import Question, trained_prompt
from openm6.modalities.audio import Audio
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.image import Image
from openm6.modalities.interface import Part, Rng
from openm6.modalities.registry import opened, source_segments, split_opening

READ = {"text", "image_in", "audio_in"}  # kinds of tokens in the prompts of an encoder


class TrainedEncoder(Encoder):
    """What the model `name` makes of an image or a recording, in a question that it was trained to answer with text.

    The features of a token are its own state and, the same for all of them, that of the token where the answer begins,
    from which its first word is predicted. Both are outputs of the last layer but one: nothing in its training has read
    those of the last one at tokens of a prompt. `name` is that of a model of the package, or a path with a slash.
    ConfigError: there is no such model, or it was not trained to answer such inputs with text; CheckpointError: there
    is no run at the path.
    """

    augments: ClassVar[bool] = True

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        shipped = sorted(folder.name for folder in SHIPPED.glob("*") if (folder / MODEL_FILE).is_file())
        if "/" not in name and name not in shipped:
            hint = f"{nearest(name, shipped)}; the path of a run has a slash, as ./{name}"
            raise ConfigError(f"openm6:{name} is no model of the package; {hint}")
        loaded = _headless(latest(Path(name) if "/" in name else SHIPPED / name))
        given = Question(output="text", image=b"") if kind == "image" else Question(output="text", audio=b"")
        prompt = trained_prompt(given, loaded)
        if prompt is None:
            raise ConfigError(f"{name} was not trained to answer {kind} with text: name a model that was")
        self.before, self.after = prompt
        self.modality, self.modalities = loaded.modalities[kind], loaded.modalities
        self.omni, self.text = loaded.omni, loaded.text
        self.width = 2 * loaded.description.backbone.hidden_size
        # Submodules, as their weights are among those that must match.
        if isinstance(self.modality, Image):
            self.pixel_encoder = self.modality.pixel_encoder
        if isinstance(self.modality, Audio):
            self.step = self.modality.step
            self.mel_encoder = self.modality.mel_encoder

    @torch.inference_mode()
    def forward(self, raw: Any, rng: Rng = None) -> np.ndarray:
        """Features in half precision; a generator asks for the augmentation of the model.  # H W -> h w F, S -> N F"""
        parts = [Part("text", self.before), Part(self.modality.name, raw), Part("text", self.after)]
        given = [part for part in parts if part.modality != "text" or part.raw]
        prompt, opening = split_opening(source_segments(given, self.modalities, rng))
        row = [*prompt, opened(self.text.target(""), opening)]
        batch = collate([[build_sequence(row)]], sum(map(len, row)))
        hidden = self.omni(batch.groups, batch.meta)[0][0]  # T D
        index = next(index for index, one in enumerate(row) if one.kind != "text")
        first, segment = sum(map(len, row[:index])), row[index]
        own, answer = hidden[first : first + len(segment)], hidden[sum(map(len, prompt))]
        features = torch.cat([own, answer.expand_as(own)], 1).half().numpy()
        if isinstance(self.modality, Audio):
            return features
        down = len(np.unique(segment.arrays["positions"][:, 0]))
        return features.reshape(down, len(features) // down, -1)


@functools.lru_cache(2)
def _headless(checkpoint: Path) -> LoadedModel:
    """The model of a checkpoint with what reads texts, images and audio alone, but for the last layer."""
    loaded = load(checkpoint, "cpu")
    omni = loaded.omni
    for kind in set(omni.adapters) - READ:
        del omni.adapters[kind]
    omni.backbone.layers = omni.backbone.layers[:-1]
    used = {number for kind in omni.adapters for number in omni.modality_experts_of(kind)}
    for block in omni.backbone.blocks:
        for number in range(len(block.modality_experts)):
            if number not in used:  # an empty module holds its place
                block.modality_experts[number] = nn.Module()
    return loaded
