"""What a person asks of a model, and how it becomes a prompt in the words the model was taught."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.base.errors import ConfigError, DataError
from openm6.generate.load import Loaded
from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.registry import MODALITIES
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is given and what is wanted.

    `numbers` maps columns to values (None: missing); `column` names the number wanted; `series` with `ahead` asks for
    a forecast of so many steps. `hole` (left, top, right, bottom as shares of the side) and `gap` (start, end as
    shares of the length) ask for a picture or sound to be filled in there and left alone elsewhere.
    """

    want: str
    text: str | None = None
    image: Path | None = None
    sound: Path | None = None
    numbers: dict[str, float | None] | None = None
    series: NumberSeries | None = None
    column: str | None = None
    ahead: int = 8
    hole: Box | None = None
    gap: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.want not in MODALITIES:
            raise ConfigError(f"--want {self.want!r} is not one of {', '.join(MODALITIES)}")
        if not any((self.text, self.image, self.sound, self.numbers, self.series)):
            raise ConfigError("nothing is given: add --text, --image, --sound, --numbers or --series")
        if self.hole is not None and (self.image is None or self.want != "image"):
            raise ConfigError("--hole fills in a picture: it needs --image and --want image")
        if self.gap is not None and (self.sound is None or self.want != "sound"):
            raise ConfigError("--gap fills in a sound: it needs --sound and --want sound")
        for name, shares in (("--hole", self.hole), ("--gap", self.gap)):
            half = len(shares or ()) // 2
            if shares is not None and not all(
                0 <= a < b <= 1 for a, b in zip(shares, shares[half:], strict=False)
            ):
                raise ConfigError(f"{name} must be shares between 0 and 1, each start below its end")

    @property
    def given(self) -> list[str]:
        """Modalities that are given besides text."""
        numbers = self.numbers is not None or self.series is not None
        found = {"image": self.image is not None, "sound": self.sound is not None, "numbers": numbers}
        return [name for name, there in found.items() if there]

    def wanted_column(self) -> str:
        """The column to predict: the one named, or the one given as missing.

        Raises:
            ConfigError: neither is there.
        """
        missing = [name for name, value in (self.numbers or {}).items() if value is None]
        if self.column is None and len(missing) != 1:
            raise ConfigError(
                "say which number is wanted: add --column NAME, or give it without a value, as NAME="
            )
        return self.column or missing[0]


def read_file(path: Path) -> bytes:
    """The bytes of a picture or sound file.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no file at {path}: check the path") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def prompt_parts(question: Question, loaded: Loaded) -> list[Part]:
    """The parts to read: what is given, then the text; without a text, the first prompt of a task that fits."""
    parts: list[Part] = []
    if question.image is not None:
        parts.append(Part("image", read_file(question.image), {"hole": question.hole}))
    if question.sound is not None:
        # A gap is a share of the length, so what is read must be as long as what will be filled in.
        seconds = None if question.gap is None else loaded.sound.seconds
        parts.append(Part("sound", read_file(question.sound), {"gap": question.gap, "seconds": seconds}))
    if question.numbers is not None:
        wanted = question.wanted_column() if question.want == "numbers" else None
        rest = {name: value for name, value in question.numbers.items() if name != wanted}
        parts += [Part("numbers", rest)] if rest else []
    if question.series is not None:
        parts.append(Part("numbers", question.series))
    text = question.text if question.text is not None else _taught_words(question, loaded)
    before, after = text if isinstance(text, tuple) else ("", (" " if parts else "") + text)
    return [*([Part("text", before)] if before else []), *parts, *([Part("text", after)] if after else [])]


def _taught_words(question: Question, loaded: Loaded) -> tuple[str, str]:
    """The words before and after the slot in the English prompt of the first lesson that reads and gives the same."""
    for lesson in loaded.description.lessons:
        task = TASKS.get(lesson.task)
        if task is not None and _fits(task, question):
            before, after = re.split(r"\{(?!column)\w+\}", task.prompts["en"][0], maxsplit=1)
            column = question.wanted_column().replace("_", " ") if "{column}" in after else ""
            return before, after.replace("{column}", column)
    return "", ""


def _fits(task: Task, question: Question) -> bool:
    fills = task.name.startswith("fill")
    forecasts = task.baseline == "last_value"
    return (
        [task.reads] == question.given
        and task.gives == question.want
        and len(task.given) == 1
        and "en" in task.prompts
        and fills == (question.hole is not None or question.gap is not None)
        and forecasts == (question.series is not None)
    )


def parse_shares(words: str | None, count: int, name: str) -> tuple[float, ...] | None:
    """`0.25,0.25,0.75,0.75` as numbers.

    Raises:
        ConfigError: not `count` numbers.
    """
    if words is None:
        return None
    try:
        shares = tuple(float(word) for word in words.split(","))
    except ValueError:
        shares = ()
    if len(shares) != count:
        raise ConfigError(f"{name} {words!r} must be {count} numbers between 0 and 1, with commas between")
    return shares


def parse_series(words: str | None) -> NumberSeries | None:
    """`temp_max=12.8,10.6,,11.1` as a series; nothing between commas means missing.

    Raises:
        ConfigError: no name, or a value that is not a number.
    """
    if words is None:
        return None
    name, equals, values = words.partition("=")
    try:
        numbers: list[Any] = [float(value) if value.strip() else None for value in values.split(",")]
    except ValueError:
        numbers = []
    if not equals or not name.strip() or not numbers:
        raise ConfigError(f"--series {words!r} must look like temp_max=12.8,10.6,11.7")
    return NumberSeries(name.strip(), numbers)
