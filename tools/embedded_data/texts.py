"""Three hundred Tang poems and a thousand glosses of WordNet."""

from __future__ import annotations

import json
from pathlib import Path

import opencc

from embedded_data.tables import Row, split_of
from tools.mini.packages import PACKAGES, Packages

NOUNS = Path(__file__).with_name("wordnet_nouns.txt")


def poems_zh(cache: Path) -> list[Row]:
    """The poems in simplified characters: title and author, then one couplet a line."""
    book = Packages(cache).folder("poetry") / "dist" / "mengxue" / "tangshisanbaishou.json"
    simplified = opencc.OpenCC("t2s").convert
    rows: list[Row] = []
    for form in json.loads(book.read_text(encoding="utf-8"))["content"]:
        for poem in form["content"]:
            title, author = simplified(poem["chapter"]), simplified(poem["author"])
            lines = "\n".join(simplified(line) for line in poem["paragraphs"])
            rows.append(
                {
                    "id": f"tang300/{len(rows)}",
                    "source": f"{PACKAGES['poetry'].source} mengxue/tangshisanbaishou",
                    "license": "MIT (poems: public domain)",
                    "split": split_of(title + author),
                    "kind": "text",
                    "text_zh": f"《{title}》 {author}\n{lines}",
                    "tags_zh": [form["type"]],
                    "label": author,
                }
            )
    return rows


def wordnet_en(cache: Path) -> list[Row]:
    """Nouns with their glosses: those whose synset offsets are in `wordnet_nouns.txt`, a random sample."""
    chosen = set(NOUNS.read_text().split())
    nouns = Packages(cache).folder("wordnet") / "usr" / "share" / "wordnet" / "data.noun"
    lines = (line.split(" | ", 1) for line in nouns.read_text(encoding="latin-1").splitlines() if line[:2] != "  ")
    return [_synset(head.split(), gloss.strip()) for head, gloss in lines if head[:8] in chosen]


def _synset(head: list[str], gloss: str) -> Row:
    # Fields of a synset line: offset, file, part of speech, number of words (hexadecimal), then word and id in turn.
    words = [word.replace("_", " ") for word in head[4 : 4 + 2 * int(head[3], 16) : 2]]
    return {
        "id": f"wordnet/{head[0]}",
        "source": "deb:wordnet-base@3.0-39",
        "license": "WordNet-3.0 licence (BSD-like)",
        "split": split_of(head[0]),
        "kind": "text",
        "text_en": f"{', '.join(words)}: {gloss}",
        "label": words[0],
    }
