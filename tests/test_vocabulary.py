"""One word for one concept, and that word is the field's: words of version 0.1 that nothing may use again."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(path for folder in ("openm6", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py"))
TEXT = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "openm6").rglob("*.yaml"),
        *(ROOT / "openm6").rglob("*.html"),
        ROOT / "openm6" / "evaluate" / "card.md",
    ]
)
# The page that lists the changes.
EXEMPT = {ROOT / "CHANGELOG.md"}
# Word of a name -> what the field says.
NAMES = {
    "picture": "image", "pictures": "images", "sound": "audio", "sounds": "audio clips", "want": "output",
    "wanted": "target, expected", "hole": "mask_box", "judge": "evaluate", "judged": "evaluated",
    "judging": "evaluation", "lesson": "trained_task, component", "lessons": "trained_tasks, mixture",
    "resident": "on_device", "streamed": "offloaded", "lane": "shard, stream", "lanes": "shards",
    "share": "fraction", "shares": "fractions", "twin": "reference", "tell": "log, report", "told": "reported",
    "mend": "fix", "anew": "again", "fewest": "min", "crew": "worker pool", "dice": "rng", "parcel": "chunk",
    "canvas": "state", "canvases": "states", "desk": "scratch slot", "shelf": "KV slots",
    "ticket": "request handle", "catalogue": "CheckpointReader", "contender": "candidate", "peer": "baseline",
    "anchor": "calibration run", "binds": "bottleneck", "slab": "pinned buffer", "born": "created_at",
    "mute": "suppress", "unsayable": "suppress_tokens", "strangers": "negatives", "maker": "generator",
    "serial": "global_index", "centre": "loc", "spread": "scale", "edges": "non_block parameters",
    "speaker": "text head", "recognised": "knn_accuracy", "sets": "layers", "piece": "segment, chunk",
    "pieces": "segments, chunks", "room": "capacity, space", "place": "position", "places": "positions",
    "nats": "nll", "taught": "trained", "foreseen": "predicted", "ledger": "tracker", "untaught": "untrained",
}  # fmt: skip
# Words of text: docstrings, comments, messages, pages, recipes.
WORDS = {
    r"pictures?": "image", r"sounds?(?! (like|as|the same))": "audio", r"bits gained": "information gain",
    r"judge[sd]?|judging|judge?ments?": "evaluate", r"lessons?|lectures?": "trained task, mixture component",
    r"resident": "on the device", r"twins?": "reference implementation", r"mend(s|ed|ing)?": "fix",
    r"anew": "again", r"fewest": "minimum", r"strangers?": "negatives", r"by chance": "at random, stochastic",
    r"parcels?": "chunk", r"canvas(es)?": "state", r"unsayable": "suppressed", r"tells?|told": "report, return",
    r"foresees?|foreseen": "predict", r"bytes a parameter": "bytes per parameter",
    r"(a|the|each) giants?": "large model", r"houses?|parlours?": "package", r"taught|untaught": "trained",
    r"knows?|hears?|sees itself": "has, depends on",
}  # fmt: skip
# Attributes whose names are those of parameters in checkpoints.
PARAMETERS = {"codes.py": {"place"}}
# Prompts of tasks, `{image} Name it.`: a trained model depends on their words.
PROMPT = re.compile(r'"[^"\n]*\{\w+\}')


def words_of(name: str) -> list[str]:
    """`PinnedArena`, `max_places` -> their words in lower case."""
    return [word.lower() for part in name.split("_") for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", part)]


def is_old(name: str, word: str) -> bool:
    """Whether a word of a name is an old one. As verbs, at the beginning of a name, `place` and `share` are fine."""
    words = words_of(name)
    return word in NAMES and not (word in ("place", "share", "shares", "sets") and words[-1] != word)


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that a file defines or assigns to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment and of each string of more than one word."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and " " in token.string):
            yield token.start[0], token.string


def old_names(path: Path) -> list[str]:
    found = {
        (line, name, word)
        for line, name in names(ast.parse(path.read_text(encoding="utf-8")))
        for word in words_of(name)
        if is_old(name, word) and name not in PARAMETERS.get(path.name, ())
    }
    return [f"{path.name}:{line}: {name}: say {NAMES[word]}" for line, name, word in sorted(found)]


def old_words(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        # Prompts that models are trained on, and keys: their names are those of the code.
        text = re.sub(r"`[^`\n]*`", "", text)
    if path.suffix == ".yaml":
        text = re.sub(PROMPT.pattern + r'[^"\n]*"', "", text)
    lines = texts(text) if path.suffix == ".py" else enumerate(text.splitlines(), 1)
    return [
        f"{path.name}:{line}: {found[0]!r}: say {better}"
        for line, part in lines
        for pattern, better in WORDS.items()
        if (found := re.search(rf"\b({pattern})\b", part, re.IGNORECASE))
        and "prompt" not in part
        and not PROMPT.match(part)
    ]


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_those_of_the_field(path: Path) -> None:
    if path in EXEMPT:
        return
    assert not old_names(path)


@pytest.mark.parametrize("path", [*CODE, *TEXT], ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_use_the_words_of_the_field(path: Path) -> None:
    if path in EXEMPT:
        return
    assert not old_words(path)


def test_the_lists_bite(tmp_path: Path) -> None:
    file = tmp_path / "old.py"
    file.write_text('def draw_picture(wanted):\n    """A picture of a giant."""\n', encoding="utf-8")
    assert len(old_names(file)) == 2 and len(old_words(file)) == 2
    file = tmp_path / "tasks.yaml"
    file.write_text('summary: Draw a picture\nen: ["draw {text}", "a picture of {text}"]\n', encoding="utf-8")
    assert old_words(file) == ["tasks.yaml:1: 'picture': say image"]
