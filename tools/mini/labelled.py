"""Examples with classes, on which the encoders of `mini` are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from openm6.codecs.conv_encoder import ConvEncoder
from openm6.data.source import Split

# Letters: B examples

IGNORED = -1  # a class that an example does not have
Heads = Mapping[str, Sequence[str]]
"""Head -> its classes."""


class Examples(Protocol):
    """What an encoder is trained on: `parts` of the corpus of its examples, and the numbers of their classes."""

    WEIGHTS: ClassVar[Mapping[str, float]]  # how often an example of a part is drawn
    parts: list[str]
    heads: Heads
    classes: dict[str, Tensor]

    def __init__(self, corpus: Path, split: Split, heads: Heads | None = None) -> None: ...

    @staticmethod
    def encoder() -> ConvEncoder:
        """Return a new encoder, with the settings by default."""

    def inputs(self, rows: Tensor) -> Tensor:
        """Return what the encoder reads.  # B ..."""

    def changed(self, rows: Tensor, rng: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return inputs in another way, and which of them lost their class, by head.  # B ..., B"""


def numbered(classes: Sequence[Mapping[str, str]], heads: Heads | None) -> tuple[Heads, dict[str, Tensor]]:
    """Return the classes by head, those found unless given, and their numbers."""
    found: dict[str, set[str]] = {}
    for one in classes:
        for head, name in one.items():
            found.setdefault(head, set()).add(name)
    heads = heads or {head: sorted(names) for head, names in found.items()}
    numbers = {head: {name: number for number, name in enumerate(names)} for head, names in heads.items()}
    return heads, {
        head: torch.tensor([known.get(one.get(head, ""), IGNORED) for one in classes])
        for head, known in numbers.items()
    }  # fmt: skip
