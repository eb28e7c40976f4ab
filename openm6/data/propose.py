"""What the columns of a user's table hold, and the fields, tasks and recipe that follow from it."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import yaml

from openm6.core.errors import DataError
from openm6.data.prepare import with_negatives
from openm6.data.records import (
    AUDIO_ENDINGS,
    CANONICAL_KEYS,
    IMAGE_ENDINGS,
    MISSING_WORDS,
    PAIRED_COLUMNS,
    Fields,
    Record,
    as_number,
    is_missing,
)
from openm6.data.source import Source, split_named
from openm6.data.windows import is_date
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import Context
from openm6.tasks.task import Task

Kind = Literal[
    "image",
    "audio",
    "number",
    "category",
    "free text",
    "identifier",
    "date",
    "split",
    "list",
    "mapping",
    "empty",
]

MOST = 0.9  # of the cells must agree before a column is called a kind; the others are reported as broken
MAX_CATEGORIES = 50
MAX_CATEGORY_LETTERS = 40
IDENTIFIER_NAMES = frozenset({"id", "key", "uuid", "guid", "index", "idx", "row"})
CATEGORY_NAMES = frozenset(
    {"label", "class", "category", "target", "species", "kind", "type", "genre", "digit"}
)
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")
_AUDIO_MAGIC = (b"fLaC", b"OggS", b"ID3", b"\xff\xfb")
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Column:
    """One column: its kind, how full it is, and what its values are like."""

    name: str
    kind: Kind
    language: Literal["en", "zh"] | None  # of categories and free text
    missing: int  # cells of the sample
    distinct: int
    summary: str  # one line for a person
    odd: int  # cells of the sample that do not fit the kind


def column_of(name: str, cells: Sequence[Any]) -> Column:
    """The column type that fits a sample of its cells."""
    filled = [cell for cell in cells if not _is_absent(cell)]
    kind = _kind(name, filled)
    texts = [str(cell) for cell in filled if isinstance(cell, (str, int, float, bool))]
    odd = sum(not _fits(kind, cell) for cell in filled)
    language = _language(texts) if kind in ("category", "free text") else None
    distinct = len(filled) if kind in ("image", "audio") else len({str(cell) for cell in filled})
    return Column(name, kind, language, len(cells) - len(filled), distinct, _summary(kind, filled), odd)


def _is_absent(cell: Any) -> bool:
    return is_missing(cell) or (isinstance(cell, str) and cell.strip().lower() in MISSING_WORDS)


def _kind(name: str, cells: Sequence[Any]) -> Kind:
    if not cells:
        return "empty"
    for kind in ("image", "audio", "list", "mapping", "date"):
        if _share(kind, cells) >= MOST:
            return kind
    texts = [str(cell) for cell in cells]
    if name.lower() == "split" and all(split_named(text) for text in texts):
        return "split"
    unique = len(set(texts)) == len(texts) > 1
    if unique and name.lower() in IDENTIFIER_NAMES:
        return "identifier"
    if _share("number", cells) >= MOST:
        return "category" if _is_coded_category(name, texts) else "number"
    return _kind_of_text(texts, unique)


def _kind_of_text(texts: Sequence[str], unique: bool) -> Kind:
    spaced = sum(" " in text.strip() or bool(_CHINESE.search(text)) for text in texts)
    if (
        unique
        and len(texts) >= 10
        and spaced == 0
        and sum(any(c.isdigit() for c in text) for text in texts) > len(texts) / 2
    ):
        return "identifier"
    few = len(set(texts)) <= max(2, min(MAX_CATEGORIES, 0.4 * len(texts)))
    short = statistics.median(len(text) for text in texts) <= MAX_CATEGORY_LETTERS
    return "category" if few and short and not (unique and len(texts) > 2) else "free text"


def _is_coded_category(name: str, texts: Sequence[str]) -> bool:
    """Whether numbers stand for classes: a telling name and few whole values."""
    whole = all(float(text) == int(float(text)) for text in texts if _is_number(text))
    return whole and name.lower() in CATEGORY_NAMES and len(set(texts)) <= MAX_CATEGORIES


def _share(kind: Kind, cells: Sequence[Any]) -> float:
    return sum(_fits(kind, cell) for cell in cells) / len(cells)


def _fits(kind: Kind, cell: Any) -> bool:
    """Whether a cell may stand in a column of a kind."""
    if kind in ("image", "audio"):
        return _is_media(cell, IMAGE_ENDINGS, _IMAGE_MAGIC) if kind == "image" else _is_audio(cell)
    if kind == "number":
        return _is_number(cell)
    if kind == "date":
        return is_date(cell)
    if kind in ("list", "mapping"):
        return isinstance(cell, list if kind == "list" else Mapping)
    return isinstance(cell, (str, int, float, bool, Decimal))


def _is_media(cell: Any, endings: tuple[str, ...], magic: tuple[bytes, ...]) -> bool:
    if isinstance(cell, Mapping) and {"bytes", "path"} <= set(cell):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    if isinstance(cell, str):
        return cell.lower().endswith(endings)
    return isinstance(cell, bytes) and (
        cell.startswith(magic) or (b"WEBP" in cell[:16] and b"\x89PNG" in magic)
    )


def _is_audio(cell: Any) -> bool:
    return _is_media(cell, AUDIO_ENDINGS, _AUDIO_MAGIC) or (isinstance(cell, bytes) and cell[8:12] == b"WAVE")


def _is_number(cell: Any) -> bool:
    try:
        return not isinstance(cell, bool) and as_number(cell, "") is not None
    except DataError:
        return False


def _language(texts: Sequence[str]) -> Literal["en", "zh"]:
    chinese = sum(len(_CHINESE.findall(text)) for text in texts)
    return "zh" if chinese > sum(len(_LATIN.findall(text)) for text in texts) / 2 else "en"


def _summary(kind: Kind, cells: Sequence[Any]) -> str:
    if kind == "number":
        numbers = [float(cell) for cell in cells if _is_number(cell)]
        return f"{min(numbers):g} to {max(numbers):g}, mean {statistics.fmean(numbers):.4g}"
    if kind in ("category", "split"):
        common = Counter(str(cell) for cell in cells).most_common(4)
        return ", ".join(f"{_short(text)} ({count})" for text, count in common)
    if kind == "free text":
        lengths = [len(str(cell)) for cell in cells]
        return f"{min(lengths)} to {max(lengths)} letters, such as {_short(str(cells[0]))!r}"
    if kind in ("date", "identifier"):
        return f"{_short(str(cells[0]))} … {_short(str(cells[-1]))}"
    if kind == "list":
        return f"{min(map(len, cells))} to {max(map(len, cells))} items, such as {_short(str(cells[0]))}"
    names = [cell for cell in cells if isinstance(cell, str)]
    return f"such as {_short(names[0])!r}" if names else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"


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
MIN_RECORDS_FRACTION = 0.5  # of the sample must be able to pose a task


def is_canonical(names: Iterable[str]) -> bool:
    """Whether a table uses the record keys as its column names, and no others."""
    found = set(names)
    return bool(found & CANONICAL_COLUMNS) and found <= CANONICAL_COLUMNS | DESCRIBING_COLUMNS


def propose_fields(columns: Sequence[Column]) -> Fields:
    """Which column fills which key; where several could, the one with the telling name, else the first."""
    picked: dict[str, Any] = {}
    for key, kind in (("image", "image"), ("audio", "audio"), ("id", "identifier")):
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
    """An audio clip's transcript is its label, and an image's label is a text to draw it from."""
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
    names = [*_image_tasks(records), *_audio_tasks(records), *_number_tasks(records)]
    if not _holds(records, "image") and not _holds(records, "audio"):
        names += _text_tasks(records)
    return [name for name in names if _posable(name, records) >= MIN_RECORDS_FRACTION]


def _image_tasks(records: Sequence[Record]) -> list[str]:
    captioned = any(record.get(f"text_{x}") != _label(record, x) for record in records for x in ("en", "zh"))
    named = "image_categorization" if len(_labels(records)) <= MAX_LABELS else "image_classification"
    return [
        named,
        *(["image_captioning"] if captioned else []),
        "visual_question_answering",
        "text_to_image",
        "image_regression",
    ]


def _audio_tasks(records: Sequence[Record]) -> list[str]:
    written = any(
        record.get(f"text_{x}") and record.get(f"text_{x}") == _label(record, x)
        for record in records
        for x in ("en", "zh")
    )
    return (
        ["speech_recognition", "text_to_speech"] if written else ["audio_classification", "audio_regression"]
    )


def _number_tasks(records: Sequence[Record]) -> list[str]:
    return ["tabular_classification", "tabular_regression", "text_regression"]


def _text_tasks(records: Sequence[Record]) -> list[str]:
    texts = [record[key] for record in records for key in ("text_en", "text_zh") if key in record]
    long = bool(texts) and sum(map(len, texts)) / len(texts) >= LONG_TEXT
    both = any("text_en" in record and "text_zh" in record for record in records)
    labelled = ["text_classification"] if 1 < len(_labels(records)) <= MAX_LABELS else ["reverse_dictionary"]
    if _text_tells_label(records):  # to copy a word is not to learn it
        labelled = []
    return [
        *labelled,
        "question_answering",
        "keywords_to_text",
        *(["text_generation", "text_denoising"] if long else []),
        *(["translation"] if both else []),
    ]


def _text_tells_label(records: Sequence[Record]) -> bool:
    distinct = [
        str(_label(record, language)).lower() in record[f"text_{language}"].lower()
        for record in records
        for language in ("en", "zh")
        if _label(record, language) and f"text_{language}" in record
    ]
    return sum(distinct) > MIN_RECORDS_FRACTION * len(distinct)


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


POSED = 3  # records that each task is posed on; every prompt of a task shows all that is given
ALWAYS_READ = ("id", "source", "license", "spoken_language", "extra", "series")  # whatever the tasks are


class _Watched(dict[str, Any]):
    """A record that notes which of its keys are read; those of `extra` are noted apart."""

    def __init__(self, record: Record, read: set[str]) -> None:
        super().__init__(record)
        self._read = read
        if isinstance(record.get("extra"), dict):
            self["extra"] = _Watched(record["extra"], read)

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, which counts as read."""
        self._read.add(key)
        return super().get(key, default)


def unused_columns(source: Source, records: Sequence[Record], tasks: Iterable[Task]) -> list[str]:
    """The columns of the source that none of the tasks uses, by a sample of its records."""
    read = set(ALWAYS_READ)
    for task in tasks:
        read |= _keys_read(source, records, task)
    return [column for column, keys in source.columns.items() if not read & set(keys)]


def _keys_read(source: Source, records: Sequence[Record], task: Task) -> set[str]:
    read: set[str] = set()
    rng = np.random.default_rng(0)
    fitting = [record for record in records if task.languages(record)][:POSED]
    for record in fitting:
        try:
            shown = with_negatives(record, source, rng) if task.needs_negatives else record
            for language in task.languages(shown):
                task.build(_Watched(shown, read), Context(language, rng))
        except DataError:  # a broken image or audio: the quarantine names it when it is drawn
            continue
    return read
