"""From drawn tokens to what a reader may see: no halves of characters, nothing that may become a stop string."""

from __future__ import annotations

from openm6.inference.text import DecodeSequence
from openm6.modalities.text import Text
from openm6.serve.requests import Scored

HALF = "\N{REPLACEMENT CHARACTER}"  # how the tokenizer shows a character whose bytes are not all there yet


def shown_text(text: Text, row: DecodeSequence, stop: tuple[str, ...], over: bool) -> tuple[str, bool]:
    """What may be shown of a row's text so far, and whether a stop string has ended it."""
    tokens = row.tokens[:-1] if row.tokens and row.tokens[-1] == text.end else row.tokens
    written = text.decode(tokens)
    places = [place for word in stop if (place := written.find(word)) >= 0]
    if places:
        return written[: min(places)], True
    if over:
        return written, False
    written = written.rstrip(HALF)
    return written[: len(written) - max((_begun(written, word) for word in stop), default=0)], False


def _begun(written: str, word: str) -> int:
    """Length of the longest end of a text that is the beginning of a word."""
    longest = min(len(word) - 1, len(written))
    return next((size for size in range(longest, 0, -1) if word.startswith(written[-size:])), 0)


def scored_tokens(text: Text, row: DecodeSequence) -> list[Scored]:
    """The tokens of a row with their scores, the mark at its end left out."""
    return [
        Scored(text.decode([token]), value, tuple((text.decode([rival]), score) for rival, score in rivals))
        for token, (value, rivals) in zip(row.tokens, row.scores, strict=True)
        if token != text.end
    ]
