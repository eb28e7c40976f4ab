"""The content of the columns of a user's table, and the fields, tasks and recipe that follow from it."""

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import PIL.Image

from openm6.core.errors import DataError
from openm6.data.prepare import with_negatives
from openm6.data.records import (
    AUDIO_ENDINGS,
    CANONICAL_KEYS,
    IMAGE_ENDINGS,
    PAIRED_COLUMNS,
    Fields,
    Record,
    as_number,
    as_text,
    is_blank,
    is_no_class,
    unless_broken,
)
from openm6.data.source import Source, split_named
from openm6.modalities.dates import date_formats, is_date
from openm6.modalities.image import read_image
from openm6.tasks.registry import TASKS
from openm6.tasks.slots import Context, categories, input_only, predictable, states
from openm6.tasks.task import Task

Kind = Literal[
    "image", "audio", "number", "category", "free text", "identifier", "date", "split", "list", "mapping",
    "empty", "other",
]  # fmt: skip
Language = Literal["en", "zh"]

MIN_AGREEING = 0.9  # of the cells, before a column is called a kind; the others are reported as broken
MAX_CATEGORIES = 50
MAX_CATEGORY_LETTERS = 40
# Whole numbers stand for categories: 0 or 1 and on, at most so many, each of them in so many cells on average.
MAX_CODES, MIN_REPEATED = 7, 8
IDENTIFIER_NAMES = frozenset({"id", "key", "uuid", "guid", "index", "idx", "row"})
CATEGORY_NAMES = ("label", "class", "category", "target", "species", "kind", "type", "genre", "digit")
# Endings of names, and first bytes.
_MEDIA = {
    "image": (IMAGE_ENDINGS, (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")),
    "audio": (AUDIO_ENDINGS, (b"fLaC", b"OggS", b"ID3", b"\xff\xfb")),
}
_RIFF = {"image": b"WEBP", "audio": b"WAVE"}  # bytes 8 to 12 of a RIFF file
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
CANONICAL_COLUMNS = frozenset(CANONICAL_KEYS) | frozenset(PAIRED_COLUMNS)
DESCRIBING_COLUMNS = frozenset({"split", "kind", "image_w", "image_h", "audio_sr", "audio_sec", "label_id", "choices"})
TEXT_NAMES = ("text", "caption", "title", "description", "sentence", "name", "summary", "body", "content")
NAMED_KEYS = {"question": "question", "answer": "answer", "tags": "tags_en", "keywords": "tags_en"}
TEXT_AND_LABEL = {"en": ("text_en", "label"), "zh": ("text_zh", "label_zh")}
LONG_TEXT = 80  # letters from which a text is worth continuing
MAX_LABELS = 50  # up to so many, labels are categories; more are names
MIN_COLUMNS = 2.5  # from which a record is predicted column by column; an image with its label has two
MIN_RECORDS_FRACTION = 0.5  # of the sample must be able to pose a task
OPENED = 50  # about so many images are opened for their colours
MIN_CHROMA = 10.0  # of 255: mean difference of the largest and smallest of red, green and blue, in images in colour
MIN_PATCHES, MAX_PATCHES = 4, 16  # of 16 x 16 pixels: small images are enlarged to so many, large ones reduced
# Labels that a mirrored image may not have: numbers and letters.
_WRITTEN = re.compile(r"\d|\b(\w|zero|one|two|three|four|five|six|seven|eight|nine)\b", re.IGNORECASE)
_SIDES = {"left": "right", "right": "left", "左": "右", "右": "左", "clockwise": "anticlockwise",
          "anticlockwise": "clockwise", "counterclockwise": "clockwise"}  # fmt: skip
_SIDE = re.compile(r"\b(?:left|right|(?:anti|counter)?clockwise)\b|左|右")
POSED = 3  # records that each task is posed on; every prompt of a task shows all inputs
ALWAYS_READ = ("id", "source", "license", "spoken_language", "extra", "series")  # whatever the tasks are


@dataclass(frozen=True)
class Column:
    """One column: its kind, how full it is, and what its values are like."""

    name: str
    kind: Kind
    language: Language | None  # of categories and free text; none of categories that are whole numbers
    missing: int  # cells of the sample
    distinct: int
    summary: str  # one line for a person
    formats: tuple[str, ...] = ()  # of dates, unless they need none; several if they can be read in several ways

    @property
    def coded(self) -> bool:
        """Whether whole numbers are read as categories."""
        return self.kind == "category" and self.language is None


def column_of(name: str, cells: Sequence[Any]) -> Column:
    """The column type that fits a sample of its cells."""
    filled = [cell for cell in cells if not is_blank(cell)]
    kind = _kind(name, filled)
    if kind == "category" and not all(map(_is_number, filled)):
        filled = [cell for cell in cells if not is_no_class(cell)]
    texts = [str(cell) for cell in filled if isinstance(cell, (str, int, float, bool))]
    language: Language | None = None
    coded = kind == "category" and name.lower() not in CATEGORY_NAMES and all(map(_is_number, filled))
    if kind in ("category", "free text") and not coded:
        chinese, latin = (sum(len(letters.findall(text)) for text in texts) for letters in (_CHINESE, _LATIN))
        language = "zh" if chinese > latin / 2 else "en"
    distinct = len(filled) if kind in _MEDIA else len({str(cell) for cell in filled})
    formats = date_formats(filled) if kind == "date" else ()
    choice = f"; format {' or '.join(formats)}?" if len(formats) > 1 else ""
    return Column(name, kind, language, len(cells) - len(filled), distinct, _summary(kind, filled) + choice, formats)


def _kind(name: str, cells: Sequence[Any]) -> Kind:
    if not cells:
        return "empty"

    def agrees(kind: Kind) -> bool:
        return sum(_fits(kind, cell) for cell in cells) >= MIN_AGREEING * len(cells)

    of_form: tuple[Kind, ...] = ("image", "audio", "list", "mapping", "date")
    found = next((kind for kind in of_form if agrees(kind)), None)
    if found is not None:
        return found
    if sum(unless_broken(as_text, cell, "") is not None for cell in cells) < MIN_AGREEING * len(cells):
        return "other"  # durations or bytes, which no key of a record holds
    texts = [str(cell) for cell in cells]
    name, distinct = name.lower(), set(texts)
    if name == "split" and all(split_named(text) for text in texts):
        return "split"
    unique = len(distinct) == len(texts) > 1
    if unique and name in IDENTIFIER_NAMES:
        return "identifier"
    if agrees("number"):
        # Numbers stand for classes if there are few whole ones, and the name says so or they repeat.
        values = {float(text) for text in texts if _is_number(text)}
        whole = all(value == int(value) for value in values)
        named = name in CATEGORY_NAMES and len(distinct) <= MAX_CATEGORIES
        return "category" if whole and (named or _are_codes(values, len(texts), len(distinct))) else "number"
    spaced = any(" " in text.strip() or _CHINESE.search(text) for text in texts)
    with_digits = sum(any(letter.isdigit() for letter in text) for text in texts)
    if unique and len(texts) >= 10 and not spaced and with_digits > len(texts) / 2:
        return "identifier"
    few = len(distinct) <= max(2, min(MAX_CATEGORIES, 0.4 * len(texts)))
    short = statistics.median(len(text) for text in texts) <= MAX_CATEGORY_LETTERS
    return "category" if few and short and not (unique and len(texts) > 2) else "free text"


def _are_codes(values: set[float], cells: int, distinct: int) -> bool:
    """Whether whole numbers count from 0 or 1 (or are -1 and 1) without large gaps, and each repeats often."""
    if not 2 <= len(values) == distinct <= MAX_CODES or cells < MIN_REPEATED * distinct:
        return False
    return values == {-1, 1} or (min(values) in (0, 1) and max(values) <= MAX_CODES)


def _fits(kind: Kind, cell: Any) -> bool:
    if kind in ("list", "mapping"):
        return isinstance(cell, list if kind == "list" else Mapping)
    if kind not in _MEDIA:
        return is_date(cell) if kind == "date" else _is_number(cell)
    endings, magic = _MEDIA[kind]
    if isinstance(cell, Mapping) and {"bytes", "path"} <= set(cell):
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
    if isinstance(cell, str):
        return cell.lower().endswith(endings)
    return isinstance(cell, bytes) and (cell.startswith(magic) or cell[8:12] == _RIFF[kind])


def _is_number(cell: Any) -> bool:
    return not isinstance(cell, bool) and unless_broken(as_number, cell, "") is not None


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
        lengths = [len(cell) for cell in cells if isinstance(cell, list)]
        return f"{min(lengths)} to {max(lengths)} items, such as {_short(str(cells[0]))}"
    names = [cell for cell in cells if isinstance(cell, str)]
    return f"such as {_short(names[0])!r}" if names else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"


def propose_fields(columns: Sequence[Column]) -> Fields | None:
    """Which column fills which key, usual names first; None if the columns are the record keys themselves."""
    names = {column.name for column in columns}
    if names & CANONICAL_COLUMNS and names <= CANONICAL_COLUMNS | DESCRIBING_COLUMNS:
        return None
    picked: dict[str, Any] = {}

    def pick(key: str, kind: Kind, language: str | None = None, usual: Sequence[str] = ()) -> None:
        free = [c.name for c in columns if c.kind == kind and c.language == language and c.name not in taken]
        if free:
            picked.setdefault(key, min(free, key=lambda name: name.lower() not in usual))

    taken: set[Any] = set()
    pick("image", "image")
    pick("audio", "audio")
    pick("id", "identifier")
    for column in columns:
        named = NAMED_KEYS.get(column.name.lower())
        if named is not None and column.kind in ("free text", "category", "list"):
            picked.setdefault(named, column.name)
    for language, (text, label) in TEXT_AND_LABEL.items():
        taken = set(picked.values())
        pick(text, "free text", language, TEXT_NAMES)
        pick(label, "category", language, CATEGORY_NAMES)
    # Numbered classes are a label if an image, an audio clip or a text has no other.
    if picked.keys() & {"image", "audio", "text_en", "text_zh"} and not picked.keys() & {"label", "label_zh"}:
        taken = set(picked.values())
        pick("label", "category")
    for text, label in TEXT_AND_LABEL.values():
        # An audio clip's transcript is its label, and an image's label is a text to draw it from.
        if "audio" in picked and text in picked:
            picked.setdefault(label, picked[text])
        if "image" in picked and label in picked:
            picked.setdefault(text, picked[label])
    numbers = [column.name for column in columns if column.kind == "number"]
    categories = [column.name for column in columns if column.kind == "category"]
    dates = {x.name: next(iter(x.formats), None) for x in columns if x.kind == "date" and len(x.formats) < 2}
    return Fields(**picked, numbers=numbers or None, categories=categories or None, dates=dates or None)


def _inputs(record: Record) -> int:
    """Columns of a record that hold anything, an image, a recording and a text among them."""
    media = sum(key in record for key in ("image", "audio", "tags_en", "tags_zh"))
    text = any(record.get(x) not in (None, record.get(y)) for x, y in TEXT_AND_LABEL.values())
    columns = [*predictable(record).values(), *categories(record).values(), *([True] if input_only(record) else [])]
    return media + text + len(columns)


def propose_tasks(records: Sequence[Record]) -> list[str]:
    """The tasks that suit these records, each of which most of them can pose."""
    keys = {key for record in records for key in record}
    both = [(record.get(x), record.get(y)) for record in records for x, y in TEXT_AND_LABEL.values()]
    labels = {label for _, label in both if label is not None}
    few_labels = len(labels) <= MAX_LABELS
    names = ["image_categorization" if few_labels else "image_classification"]
    names += [task.name for task in TASKS.values() if task.chat]
    names += ["image_captioning"] if any(text != label for text, label in both) else []
    names += ["visual_question_answering", "text_to_image", "image_regression"]
    if any(text and text == label for text, label in both):
        names += ["speech_recognition", "text_to_speech"]
    else:
        names += ["audio_classification", "audio_regression"]
    names += ["tabular_classification", "tabular_regression", "text_regression"]
    # All columns are predicted from all others, instead of some from one kind.
    if statistics.fmean([_inputs(record) for record in records] or [0]) >= MIN_COLUMNS:
        names = [name for name in names if not name.startswith("tabular") and not name.endswith("regression")]
        names += ["record_classification", "record_regression"]
    if not keys & {"image", "audio"}:
        labelled = [states(text, str(label)) for text, label in both if label and text is not None]
        if sum(labelled) <= MIN_RECORDS_FRACTION * len(labelled):  # to copy a word is not to learn it
            names.append("text_classification" if few_labels and len(labels) > 1 else "reverse_dictionary")
        names += ["question_answering", "keywords_to_text"]
        lengths = [len(text) for text, _ in both if text is not None]
        names += ["text_generation", "text_denoising"] if lengths and statistics.fmean(lengths) >= LONG_TEXT else []
        names += ["translation"] if {"text_en", "text_zh"} <= keys else []
    posable = {name: sum(bool(TASKS[name].languages(record)) for record in records) for name in names}
    return [name for name in names if records and posable[name] / len(records) >= MIN_RECORDS_FRACTION]


def is_coloured(image: PIL.Image.Image) -> bool:
    """Whether an image has colours, as photos have, and most scans of letters and digits have not."""
    levels = np.asarray(image.resize((16, 16)), np.float32)
    return bool((levels.max(-1) - levels.min(-1)).mean() > MIN_CHROMA)


def _may_be_mirrored(records: Sequence[Record]) -> bool:
    """Whether no label is a number, a letter or the mirror image of another, and no text names a side."""
    named = [[record.get("label"), record.get("label_zh"), *(record.get("categories") or {}).values()]
             for record in records]  # fmt: skip
    labels = {str(label).lower() for values in named for label in values if label}
    mirrored = {_SIDE.sub(lambda side: _SIDES[side[0]], label) for label in labels if _SIDE.search(label)}
    texts = [str(record.get(key) or "").lower() for record in records for key in ("text_en", "text_zh", "question")]
    sides = [text for text in texts if text not in labels and _SIDE.search(text)]
    return not (any(map(_WRITTEN.search, labels)) or mirrored & labels or sides)


def propose_images(records: Sequence[Record]) -> dict[str, Any]:
    """Settings of `modalities.image` for records of images; mirrored ones if most are in colour."""
    # A folder is sorted by label, so the opened images are taken at equal distances.
    raws = [record["image"] for record in records if "image" in record]
    opened = [unless_broken(read_image, raw) for raw in raws[:: max(1, len(raws) // OPENED)]]
    coloured = [is_coloured(image) for image in opened if image is not None]
    mirrored = statistics.fmean(coloured or [0]) > 0.5 and _may_be_mirrored(records)
    found = {"stem": "conv", "patch": 16, "min_patches": MIN_PATCHES, "max_patches": MAX_PATCHES}
    return found | ({"flips": True} if mirrored else {})


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
        self._read.add(key)
        return super().get(key, default)


def unused_columns(source: Source, records: Sequence[Record], tasks: Iterable[Task]) -> list[str]:
    """The columns of the source that none of the tasks uses, by a sample of its records."""
    read = set(ALWAYS_READ)
    for task in tasks:
        rng = np.random.default_rng(0)
        # Records of one language may come first.
        for language in task.prompts:
            for record in [record for record in records if language in task.languages(record)][:POSED]:
                with suppress(DataError):  # a broken image or audio: the quarantine names it when it is drawn
                    shown = with_negatives(record, source, rng) if task.needs_negatives else record
                    task.build(_Watched(shown, read), Context(language, rng))
    return [column for column, keys in source.columns.items() if not read & set(keys)]
