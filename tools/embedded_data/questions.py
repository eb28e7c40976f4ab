"""Questions about countries and penguins whose answers stand in the text."""

from __future__ import annotations

import re
from pathlib import Path

from embedded_data.images import countries
from embedded_data.numbers import penguins
from embedded_data.tables import Row, split_of

_COUNTRY = re.compile(r"The flag of (?P<country>.+?)\. Capital: (?P<capital>.+?)\. Region: (?P<region>.+?)\.$")
_PENGUIN = re.compile(r"A (?P<sex>\w+) (?P<species>\w+) penguin on (?P<island>\w+) island\.$")
QUESTIONS = {
    "country": "Which country?",
    "capital": "What is the capital?",
    "region": "Which region?",
    "sex": "Male or female?",
    "species": "Which species?",
    "island": "Which island?",
}


def questions(cache: Path) -> list[Row]:
    """One record per fact in a text about a country or a penguin; no text is in both splits."""
    # Penguins alike in sex, species and island have one text, so it is the text that decides the split.
    texts = {row["text_en"]: {**row, "split": split_of(row["text_en"])} for row in penguins(cache)}
    return [
        _question(row, asked, answer)
        for rows, pattern in ((countries(cache), _COUNTRY), (list(texts.values()), _PENGUIN))
        for row in rows
        if (found := pattern.match(row["text_en"]))
        for asked, answer in found.groupdict().items()
    ]


def _question(row: Row, asked: str, answer: str) -> Row:
    copied = {key: row[key] for key in ("source", "license", "split", "text_en")}
    own = {
        "id": f"question/{row['id']}/{asked}",
        "kind": "text",
        "question": QUESTIONS[asked],
        "answer": answer,
    }
    return {**copied, **own}
