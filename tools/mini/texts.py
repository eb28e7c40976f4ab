"""Couplets and poems of the Tang and the Song, meanings of English nouns, and Chinese terms of kinship."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.mini.corpus import Part, Row, fraction_of, identity, split_of
from tools.mini.images import exported
from tools.mini.packages import Packages

COUPLETS, POEMS, MEANINGS = 60_000, 12_000, 6_000
# Fractions of the regular poems that give the couplets and the whole poems.
OF_COUPLETS, OF_POEMS = 0.6, 0.35
LINE = re.compile(r"([\u4e00-\u9fff]{5}|[\u4e00-\u9fff]{7})，([\u4e00-\u9fff]{5}|[\u4e00-\u9fff]{7})。")
LONGEST_TITLE = 12
LONGEST_POEM = 8  # lines, in pairs of two
LONGEST_GLOSS = 100


def _poems(packages: Packages) -> Iterator[tuple[str, str, str, list[str]]]:
    """Id, title, author and pairs of lines of the regular poems of the Tang and the Song, in traditional characters."""
    root = packages.folder("poetry") / "dist" / "quantangshi"
    for file in sorted(root.glob("poet.*.json")):
        for poem in json.loads(file.read_text(encoding="utf-8")):
            lines = poem["paragraphs"]
            if len(lines) in (2, 4) and all(LINE.fullmatch(line) for line in lines):
                yield poem["id"], poem["title"], poem["author"], lines


def _simplified() -> Callable[[str], str]:
    # Installed by the builder into its cache.
    import opencc  # noqa: PLC0415

    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert


def couplets(packages: Packages) -> Iterator[Row]:
    """Pairs of parallel lines: lines 3–4 and 5–6 of poems of eight; all of a poem are in one split."""
    simplified, found, seen = _simplified(), 0, set()
    for name, _, author, lines in _poems(packages):
        if len(lines) != 4 or fraction_of("couplets", name) > OF_COUPLETS:
            continue
        for number in (1, 2):
            pair = simplified(lines[number])
            first, second = pair[:-1].split("，")
            if pair in seen or len(first) != len(second) or set(first) & set(second):
                continue
            seen.add(pair)
            yield {
                "id": f"couplet/{name}/{number}",
                **identity("poetry"),
                "split": split_of("couplet", name, test=0.03, validation=0.01),
                "text_zh": pair,
                "question": first,
                "answer": second,
                "label": simplified(author),
            }
            found += 1
            if found == COUPLETS:
                return


def poems(packages: Packages) -> Iterator[Row]:
    """Poems of four or eight lines with short titles: `《title》 author`, then a pair of lines on each line."""
    simplified, found = _simplified(), 0
    for name, title, author, lines in _poems(packages):
        short = len(title) <= LONGEST_TITLE and not re.search(r"[\s（(其]", title)
        if not short or fraction_of("poems", name) > OF_POEMS:
            continue
        body = "\n".join(lines)
        yield {
            "id": f"poem/{name}",
            **identity("poetry"),
            "split": split_of("poem", name, test=0.03, validation=0.01),
            "text_zh": simplified(f"《{title}》 {author}\n{body}"),
            "tags_zh": ["绝句" if len(lines) == 2 else "律诗"],
            "label": simplified(author),
        }
        found += 1
        if found == POEMS:
            return


def meanings(packages: Packages) -> Iterator[Row]:
    """The first sense of the nouns that texts use most often, with its gloss."""
    root = packages.folder("wordnet") / "usr" / "share" / "wordnet"
    counts = _uses(root)
    offsets, glosses = _first_senses(root), _glosses(root)
    order = sorted(counts, key=lambda noun: (-counts[noun], noun))
    known = [noun for noun in order if noun in offsets and re.fullmatch("[a-z]{3,}(_[a-z]+)?", noun)]
    for noun in known[:MEANINGS]:
        gloss = glosses[offsets[noun]].split('; "')[0].split("; ")[0].strip()
        word = noun.replace("_", " ")
        if not 12 <= len(gloss) <= LONGEST_GLOSS or re.search(rf"\b{word}\b", gloss):
            continue
        yield {
            "id": f"meaning/{noun}",
            **identity("wordnet"),
            "split": split_of("meaning", noun, test=0.05, validation=0.01),
            "text_en": f"{word}: {gloss}",
            "label": word,
            "question": f"What is {word}?",
            "answer": gloss,
        }


def _uses(root: Path) -> Counter[str]:
    """How often a noun is tagged in its senses."""
    counts: Counter[str] = Counter()
    for line in (root / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, _, count = line.split()
        word, _, sense = key.partition("%")
        if sense.startswith("1:"):
            counts[word] += int(count)
    return counts


def _first_senses(root: Path) -> dict[str, str]:
    """Noun -> the offset of its most frequent sense."""
    found = {}
    for line in (root / "index.noun").read_text(encoding="latin-1").splitlines():
        if not line.startswith(" "):
            fields = line.split()
            found[fields[0]] = fields[-int(fields[2])]
    return found


def _glosses(root: Path) -> dict[str, str]:
    lines = (root / "data.noun").read_text(encoding="latin-1").splitlines()
    return {line[:8]: line.split(" | ", 1)[1] for line in lines if not line.startswith(" ")}


ENGLISH_STEPS = {
    "爸爸": "father", "妈妈": "mother", "哥哥": "elder brother", "弟弟": "younger brother", "姐姐": "elder sister",
    "妹妹": "younger sister", "儿子": "son", "女儿": "daughter", "老公": "husband", "老婆": "wife",
}  # fmt: skip


def kinship(packages: Packages) -> Iterator[Row]:
    """Questions such as 妈妈的哥哥 with the one term for it; a tenth of the longer chains is tested."""
    for entry in exported(packages, ["relationship"], "kinship"):
        chain, names = entry["chain"], entry["names"]
        if len(chain) < 2 or len(names) > 1 or "的" in names[0]:
            continue
        asked = "的".join(chain)
        english = "'s ".join(ENGLISH_STEPS[step] for step in chain)
        split = split_of("kinship", asked) if len(chain) > 2 else "train"
        yield {
            "id": f"kinship/{asked}",
            **identity("relationship"),
            "split": split,
            "label": names[0],
            "label_zh": names[0],
            "text_en": f"my {english}",
            "text_zh": f"我{asked}",
            "question": f"{asked}叫什么？",
            "answer": names[0],
            "numbers": {"steps": float(len(chain))},
        }


PARTS = {
    "couplets": Part(couplets, ("poetry",)),
    "poems": Part(poems, ("poetry",)),
    "meanings": Part(meanings, ("wordnet",)),
    "kinship": Part(kinship, ("relationship",)),
}
