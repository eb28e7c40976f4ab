"""Own tasks: the section `tasks:` of a recipe, which a checkpoint keeps, as tasks like the built-in ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from openm6.core.config import Config
from openm6.core.errors import ConfigError, nearest
from openm6.modalities.interface import Part
from openm6.tasks import slots
from openm6.tasks.slots import Record
from openm6.tasks.task import LANGUAGES, Task

Kind = Literal["text", "category", "categories", "image", "audio", "number", "numbers"]
KINDS: tuple[str, ...] = get_args(Kind)
# Of texts: fields that every record has under this name, whichever columns fill them.
RECORD_TEXTS = ("text", "tags", "label", "question", "answer")


class AnyText(slots.Text):
    """A text of any name: a key of records, a column in `extra`, or a category."""

    def value(self, record: Record, language: str) -> Any:
        languages = (language,) if self.language == "own" else (language, *LANGUAGES)
        found = (slots.localised(record, self.name, one) for one in languages)
        present = next((value for value in found if value not in slots.ABSENT), None)
        return slots.categories(record).get(self.name) if present is None else present


@dataclass(frozen=True)
class SomeNumbers(slots.Numbers):
    """Some number columns, or all but the target; one of them must hold a value."""

    columns: tuple[str, ...] = ()
    target: str = ""

    def present(self, record: Record, language: str) -> bool:
        return bool(set(self._shown(record)) & set(slots.observed(record)))

    def part(self, record: Record, language: str) -> Part:
        return Part("numbers", self._shown(record))

    def key(self, record: Record, language: str) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._shown(record).items())

    def _shown(self, record: Record) -> dict[str, float | None]:
        numbers = record.get("numbers") or {}
        return {name: numbers[name] for name in self.columns or numbers if name in numbers and name != self.target}


def for_number(task: Task, column: str) -> Task:
    """The task with this number column as its target; an own task keeps the one that it names."""
    if isinstance(task.target, SomeNumbers):
        return task
    build = partial(slots.hold_out_number if task.optional else slots.hold_out, column=column)
    return replace(task, target=slots.Derived("numbers", build, lambda record, _: column in slots.predictable(record)))


@dataclass(frozen=True)
class Categories(slots.Slot):
    """All category columns but the target and those that fill it, as a text."""

    target: str = ""
    modality = "text"

    def present(self, record: Record, language: str) -> bool:
        return bool(self._shown(record))

    def part(self, record: Record, language: str) -> Part:
        shown = self._shown(record)
        listed = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items())
        return Part("text", listed, {"columns": shown})

    def _shown(self, record: Record) -> dict[str, str]:
        keys = (self.target, *(f"{self.target}_{language}" for language in LANGUAGES))
        hidden = {self.target, *(column for key, column in slots.filled_by(record).items() if key in keys)}
        return {name: value for name, value in slots.categories(record).items() if name not in hidden}


class FieldConfig(Config):
    """What an input or a target is: a kind, as `image`, or a kind and its column, as `{number: price}`."""

    kind: Kind
    columns: tuple[str, ...] = ()
    max_tokens: int | None = Field(default=None, ge=1)

    # Runs before the keys are checked, as the last one that is defined.
    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {values: ()}
        if not isinstance(values, dict) or "kind" in values:
            return values
        kinds = [key for key in values if key != "max_tokens"]
        unknown = next((kind for kind in kinds if kind not in KINDS), None)
        if unknown is not None:
            raise ValueError(f"no kind of field is called {unknown!r}; {nearest(str(unknown), KINDS)}")
        if len(kinds) != 1:
            raise ValueError("must be one kind of field, as image or {number: price}")
        columns = values[kinds[0]]
        listed = [columns] if isinstance(columns, str) else columns
        if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
            raise ValueError(f"{kinds[0]} must name a column, as {{{kinds[0]}: price}}, not {columns!r}")
        rest = {key: value for key, value in values.items() if key == "max_tokens"}
        return {"kind": kinds[0], "columns": tuple(listed), **rest}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.columns) > 1 and self.kind != "numbers":
            raise ValueError(f"{self.kind} is one column: name one, or use numbers")
        if self.max_tokens is not None and self.kind not in ("text", "category"):
            raise ValueError("max_tokens bounds a text or a category: leave it out")
        return self

    def column(self, name: str) -> str:
        """The column of a field that is called `name` unless it names one."""
        return self.columns[0] if self.columns else name

    def slot(self, name: str, target: str, language: Literal["own", "any"]) -> slots.Slot:
        """The slot of a field that is called `name`, in a task that predicts the column `target`."""
        column = self.column(name)
        if self.kind in ("text", "category"):
            default = slots.SHORT if self.kind == "category" else slots.MAX_TOKENS
            return AnyText(column, self.max_tokens or default, language)
        if self.kind in ("image", "audio"):
            return slots.Media(self.kind)
        if self.kind == "number":
            return SomeNumbers(columns=(column,))
        return Categories(target) if self.kind == "categories" else SomeNumbers(columns=self.columns, target=target)


class TaskConfig(Config):
    """An own task: inputs by their names in the prompts, the target, and one or several prompts by language."""

    inputs: dict[str, FieldConfig] = Field(min_length=1)
    target: FieldConfig
    prompts: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(min_length=1)
    metrics: tuple[str, ...] = ()
    summary: str = ""

    @field_validator("inputs")
    @classmethod
    def _named(cls, inputs: dict[str, FieldConfig]) -> dict[str, FieldConfig]:
        for name in inputs:
            if not re.fullmatch(r"\w+", name) or name in ("column", "series"):
                what = "use letters, digits and _, and not column or series"
                raise ValueError(f"an input cannot be called {name!r}: {what}")
        return inputs

    @field_validator("target")
    @classmethod
    def _is_one(cls, target: FieldConfig) -> FieldConfig:
        if target.kind in ("numbers", "categories"):
            one = "number" if target.kind == "numbers" else "category"
            raise ValueError(f"one column is predicted: write {{{one}: COLUMN}}")
        if target.kind in ("number", "category") and not target.columns:
            raise ValueError(f"the column is missing: write {{{target.kind}: COLUMN}}")
        return target

    @field_validator("prompts", mode="before")
    @classmethod
    def _several(cls, prompts: Any) -> Any:
        found = prompts.items() if isinstance(prompts, dict) else ()
        return {key: (one,) if isinstance(one, str) else one for key, one in found} or prompts

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            task = self.task("it")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        for prompt in (prompt for prompts in task.prompts.values() for prompt in prompts):
            lacking = next((name for name in self.inputs if prompt.count(f"{{{name}}}") != 1), None)
            if lacking is not None:
                raise ValueError(f"the prompt {prompt!r} must show the input {{{lacking}}} once")
            if "{column}" in prompt:
                raise ValueError(f"the prompt {prompt!r} must name its column in words, not by {{column}}")
        if (shown := next((x for x in self.inputs.items() if self._is_target(*x)), None)) is not None:
            raise ValueError(f"the input {shown[0]!r} is the target itself: leave it out")
        for kind in ("image", "audio"):
            if len({field.column(name) for name, field in self.inputs.items() if field.kind == kind}) > 1:
                raise ValueError(f"a record has one {kind}: name one input of this kind")
        return self

    def _is_target(self, name: str, field: FieldConfig) -> bool:
        if field.kind in ("image", "audio"):
            return field.kind == self.target.kind
        same = {field.kind, self.target.kind} <= {"text", "category"} or field.kind == self.target.kind == "number"
        return same and field.column(name) == self.target.column("text")

    def task(self, name: str) -> Task:
        languages: Literal["own", "any"] = "own" if set(self.prompts) == set(LANGUAGES) else "any"
        target = self.target.column(self.target.kind)
        return Task(
            name=name,
            summary=self.summary or f"Predict {target} from {', '.join(self.inputs)}",
            inputs={key: field.slot(key, target, languages) for key, field in self.inputs.items()},
            target=self.target.slot(self.target.kind, "", languages),
            prompts=dict(self.prompts),
            metrics=self.metrics,
        )

    def columns(self) -> dict[str, Any]:
        """The columns that the fields name, as they are mapped in `fields` of a source."""
        found: dict[str, Any] = {"extra": [], "numbers": [], "categories": []}
        for name, field in [*self.inputs.items(), (self.target.kind, self.target)]:
            columns: Sequence[str] = field.columns or ((name,) if field.kind not in ("numbers", "categories") else ())
            if field.kind in ("image", "audio"):
                found[field.kind] = columns[0]
            elif field.kind in ("number", "numbers"):
                found["numbers"] += columns
            elif field.kind in ("category", "categories"):
                found["categories"] += [column for column in columns if column not in RECORD_TEXTS]
            else:
                names = [column for column in columns if column not in RECORD_TEXTS]
                found["extra"] += [f"{column}{suffix}" for column in names for suffix in ("", "_en", "_zh")]
        return {key: value for key, value in found.items() if value}
