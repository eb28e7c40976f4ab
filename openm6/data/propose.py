"""From what a table holds to a recipe: which column fills which key, and which tasks its records can pose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from openm6.data.columns import CATEGORY_NAMES, Column
from openm6.data.fields import PAIRED_COLUMNS, Fields
from openm6.data.records import CANONICAL_KEYS, Record
from openm6.tasks.registry import TASKS

CANONICAL_COLUMNS = frozenset(CANONICAL_KEYS) | frozenset(PAIRED_COLUMNS)
DESCRIBING_COLUMNS = frozenset(
    {"split", "kind", "image_w", "image_h", "audio_sr", "audio_sec", "label_id", "choices"}
)
TEXT_NAMES = ("text", "caption", "title", "description", "sentence", "name", "summary", "body", "content")
NAMED_KEYS = {
    "question": "question",
    "answer": "answer",
    "tags": "tags_en",
    "keywords": "tags_en",
}
LONG_TEXT = 80  # letters from which a text is worth going on with
MAX_LABELS = 50  # up to so many, labels are categories; more are names
MOST_RECORDS = 0.5  # of the sample must be able to pose a task


def is_canonical(names: Iterable[str]) -> bool:
    """Whether a table uses the record keys as its column names, and no others."""
    found = set(names)
    return bool(found & CANONICAL_COLUMNS) and found <= CANONICAL_COLUMNS | DESCRIBING_COLUMNS


def propose_fields(columns: Sequence[Column]) -> Fields:
    """Which column fills which key; where several could, the one with the telling name, else the first."""
    picked: dict[str, Any] = {}
    for key, kind in (("image", "picture"), ("audio", "sound"), ("id", "identifier")):
        _pick(picked, key, [column.name for column in columns if column.kind == kind])
    for column in columns:
        named = NAMED_KEYS.get(column.name.lower())
        if named is not None and column.kind in ("free text", "category", "list"):
            picked.setdefault(named, column.name)
    for language in ("en", "zh"):
        texts = [c.name for c in columns if c.kind == "free text" and c.language == language]
        labels = [c.name for c in columns if c.kind == "category" and c.language == language]
        taken = set(picked.values())
        _pick(picked, f"text_{language}", _by_name([t for t in texts if t not in taken], TEXT_NAMES))
        label = "label" if language == "en" else "label_zh"
        _pick(picked, label, _by_name([name for name in labels if name not in taken], tuple(CATEGORY_NAMES)))
    _fill_gaps(picked)
    numbers = [column.name for column in columns if column.kind == "number"]
    return Fields(**picked, numbers=numbers or None)


def _fill_gaps(picked: dict[str, Any]) -> None:
    """A sound's transcript is its label, and a picture's label is a text to draw it from."""
    for text, label in (("text_en", "label"), ("text_zh", "label_zh")):
        if "audio" in picked and text in picked and label not in picked:
            picked[label] = picked[text]
        if "image" in picked and label in picked and text not in picked:
            picked[text] = picked[label]


def _pick(picked: dict[str, Any], key: str, names: Sequence[str]) -> None:
    if names:
        picked.setdefault(key, names[0])


def _by_name(names: Sequence[str], telling: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: name.lower() not in telling)


def propose_tasks(records: Sequence[Record]) -> list[str]:
    """The tasks that suit these records, each of which most of them can pose."""
    wanted = [*_picture_tasks(records), *_sound_tasks(records), *_number_tasks(records)]
    if not _holds(records, "image") and not _holds(records, "audio"):
        wanted += _text_tasks(records)
    return [name for name in wanted if _posable(name, records) >= MOST_RECORDS]


def _picture_tasks(records: Sequence[Record]) -> list[str]:
    captioned = any(record.get(f"text_{x}") != _label(record, x) for record in records for x in ("en", "zh"))
    named = "classify_picture" if len(_labels(records)) <= MAX_LABELS else "name_picture"
    return [named, *(["describe_picture"] if captioned else []), "ask_picture", "draw", "number_from_picture"]


def _sound_tasks(records: Sequence[Record]) -> list[str]:
    written = any(
        record.get(f"text_{x}") and record.get(f"text_{x}") == _label(record, x)
        for record in records
        for x in ("en", "zh")
    )
    return ["transcribe", "speak"] if written else ["name_sound", "number_from_sound"]


def _number_tasks(records: Sequence[Record]) -> list[str]:
    return ["classify_numbers", "predict_number", "number_from_text"]


def _text_tasks(records: Sequence[Record]) -> list[str]:
    texts = [record[key] for record in records for key in ("text_en", "text_zh") if key in record]
    long = bool(texts) and sum(map(len, texts)) / len(texts) >= LONG_TEXT
    both = any("text_en" in record and "text_zh" in record for record in records)
    labelled = ["classify_text"] if 1 < len(_labels(records)) <= MAX_LABELS else ["define"]
    if _text_tells_label(records):  # to copy a word is not to learn it
        labelled = []
    return [
        *labelled,
        "answer",
        "write",
        *(["continue", "denoise"] if long else []),
        *(["translate"] if both else []),
    ]


def _text_tells_label(records: Sequence[Record]) -> bool:
    told = [
        str(_label(record, language)).lower() in record[f"text_{language}"].lower()
        for record in records
        for language in ("en", "zh")
        if _label(record, language) and f"text_{language}" in record
    ]
    return sum(told) > MOST_RECORDS * len(told)


def _label(record: Record, language: str) -> Any:
    return record.get("label" if language == "en" else "label_zh")


def _labels(records: Sequence[Record]) -> set[str]:
    return {record[key] for record in records for key in ("label", "label_zh") if key in record}


def _holds(records: Sequence[Record], key: str) -> bool:
    return any(key in record for record in records)


def _posable(name: str, records: Sequence[Record]) -> float:
    return sum(bool(TASKS[name].languages(record)) for record in records) / len(records) if records else 0.0


def recipe_text(sources: dict[str, dict[str, Any]], tasks: dict[str, list[str]]) -> str:
    """A recipe as YAML: the smallest model, these sources, their tasks, ten minutes."""
    recipe = {
        "kind": "multimodal",
        "model": {"preset": "nano"},
        "sources": sources,
        "mixture": [{"source": source, "task": task} for source, names in tasks.items() for task in names],
        "loop": {"steps": "auto", "minutes": 10},
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)
