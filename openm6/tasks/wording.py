"""How much text a question holds, counted alike in any language."""

from __future__ import annotations

import re
from collections.abc import Iterable

from openm6.modalities.interface import Part

_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")


def words_of(text: str) -> list[str]:
    """Words of Latin letters and digits in lower case, and single Chinese characters."""
    return _WORD.findall(text.lower())


def word_count(parts: Iterable[Part]) -> int:
    """Words of all text among the parts."""
    return sum(len(words_of(str(part.raw))) for part in parts if part.modality == "text")
