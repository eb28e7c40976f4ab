"""What a scenario is: a use of a model with its inputs, prompt, decoding settings, tasks and an example that runs."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from openm6.base.config import Config, nearest
from openm6.inference.sampling import Decoding
from openm6.tasks.registry import TASKS

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
InputKind = Literal["text", "image", "sound", "numbers", "series", "candidates", "box", "stretch"]
Output = Literal["text", "image", "sound", "numbers", "ranking", "embedding"]
PROMPTED: tuple[InputKind, ...] = (
    "text",
    "image",
    "sound",
    "numbers",
    "series",
)  # the others steer the answer
_SLOT = re.compile(r"\{(\w+)\}")


class Words(Config):
    """The same in both languages."""

    en: str = Field(min_length=1)
    zh: str = Field(min_length=1)

    def said(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


KINDS: dict[InputKind, Words] = {
    "text": Words(en="Text", zh="文本"),
    "image": Words(en="Picture", zh="图片"),
    "sound": Words(en="Sound", zh="声音"),
    "numbers": Words(en="Numbers", zh="数值"),
    "series": Words(en="Series", zh="序列"),
    "candidates": Words(en="Candidates", zh="候选"),
    "box": Words(en="Box", zh="区域"),
    "stretch": Words(en="Stretch", zh="区间"),
}


class Input(Config):
    """One thing to give; without a title it is called after its kind."""

    kind: InputKind
    title: Words | None = None

    def said(self, language: Language) -> str:
        return (self.title or KINDS[self.kind]).said(language)


class Scenario(Config):
    """One use.

    prompt: the words in which a task was taught; `{name}` is where an input goes, `{column}` the number wanted
    ahead: steps of a series that are forecast; column: the number that is predicted
    tasks: what a model must have been trained on; recipe: the shipped one that teaches it
    examples: inputs to try, for each language; pictures and sounds are named as `data#id` (see examples.py)
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: Words
    summary: Words
    inputs: dict[str, Input] = Field(min_length=1)
    gives: Output
    prompt: Words
    column: str | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    decoding: Decoding = Decoding()
    tasks: list[str] = Field(min_length=1)
    recipe: str
    examples: dict[Language, dict[str, Any]]

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"no task is called {task!r}; {nearest(task, sorted(TASKS))}")
        return tasks

    @model_validator(mode="after")
    def _complete(self) -> Scenario:
        prompted = {name for name, given in self.inputs.items() if given.kind in PROMPTED}
        for language in LANGUAGES:
            named = set(_SLOT.findall(self.prompt.said(language))) - {"column"}
            if named != prompted:
                raise ValueError(f"the {language} prompt must name {sorted(prompted)}, not {sorted(named)}")
            if set(self.examples.get(language, {})) != set(self.inputs):
                raise ValueError(f"the {language} example must give {sorted(self.inputs)}")
        wants_number = self.gives == "numbers" and "series" not in {x.kind for x in self.inputs.values()}
        if wants_number != (self.column is not None):
            raise ValueError("name the column that is predicted, where a number is, and only there")
        kinds = {given.kind for given in self.inputs.values()}
        if ("candidates" in kinds) != (self.gives == "ranking"):
            raise ValueError("a ranking needs candidates, and nothing else does")
        return self

    def kind_of(self, kind: InputKind) -> str | None:
        """The name of the first input of a kind."""
        return next((name for name, given in self.inputs.items() if given.kind == kind), None)


class Domain(Config):
    """A file of scenarios that belong together."""

    title: Words
    scenarios: list[Scenario] = Field(min_length=1)
