"""Embeddings: texts, pictures and sounds as unit vectors of one space, in which like means near."""

# Letters: B inputs, E size of an embedding

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from openm6.base.errors import ConfigError
from openm6.generate.load import Loaded
from openm6.modalities.batch import PackedExample, build_sequence, collate
from openm6.modalities.interface import Part, Segment
from openm6.modalities.pool import POOL, PoolAdapter, pooled
from openm6.modalities.registry import source_segments

ROW, ROWS = 512, 4  # tokens of a row, rows of a pass


def embedding_size(loaded: Loaded) -> int:
    """How many numbers an embedding of this model has.

    Raises:
        ConfigError: the model was not taught to embed.
    """
    return taught_pool(loaded).project.out_features


def taught_pool(loaded: Loaded) -> PoolAdapter:
    """The part that makes embeddings; raises ConfigError where the model was not taught to embed."""
    pool = loaded.omni.pool
    if pool is None:
        raise ConfigError(
            "this model makes no embeddings: needs training on pair_picture or pair_sound, as in recipes/embed.yaml"
        )
    return pool


def embed(loaded: Loaded, inputs: Sequence[list[Part]]) -> np.ndarray:
    """The embedding of each input (a text, a picture, a sound, or several parts together), of length 1.  # -> B E

    Raises:
        ConfigError: the model was not taught to embed.
        DataError: an input is empty, broken or out of bounds.
    """
    return embed_tokens(loaded, [source_segments(parts, loaded.modalities) for parts in inputs])


def embed_tokens(loaded: Loaded, inputs: Sequence[list[Segment]]) -> np.ndarray:
    """The same of inputs that are source tokens already.  # -> B E"""
    size = embedding_size(loaded)
    sequences = [build_sequence(pooled(pieces)) for pieces in inputs]
    found = [_vectors(loaded, rows) for rows in packed(sequences)]
    return np.concatenate(found) if found else np.zeros((0, size), np.float32)


def packed(sequences: list[PackedExample]) -> list[list[list[PackedExample]]]:
    """Passes of a few rows of whole sequences, in order."""
    passes: list[list[list[PackedExample]]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room or not passes:
            if not passes or len(passes[-1]) == ROWS:
                passes.append([])
            passes[-1].append([])
            room = max(ROW, len(sequence))
        passes[-1][-1].append(sequence)
        room -= len(sequence)
    return passes


@torch.inference_mode()
def _vectors(loaded: Loaded, rows: list[list[PackedExample]]) -> np.ndarray:
    length = max(sum(map(len, row)) for row in rows)
    batch = collate(rows, length).to(loaded.omni.device)
    hidden, _ = loaded.omni(batch.kinds, batch.layout)  # R S D
    index = batch.kinds[POOL].index
    return taught_pool(loaded).vectors(hidden.flatten(0, 1)[index]).cpu().numpy()
