"""The pictures and sounds that examples name: `emoji#emoji/1FAB4` is one record of the data in the package."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from openm6.base.errors import ConfigError
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Record
from openm6.models.description import ModelDescription
from openm6.serve.scenarios.scenario import Language, Scenario

EMBEDDED = "embedded:"
KEYS = {"image": "image", "sound": "audio"}


@cache
def example_record(name: str) -> Record:
    """The record that `data#id` names, from the embedded data.

    Raises:
        ConfigError: there is no such data or record.
    """
    data, _, key = name.partition("#")
    for split in ("test", "train"):
        source = EmbeddedConfig(name=data).open(data, split, _no_neighbour)
        ids = source.values("id")
        if key in ids:
            return source[ids.index(key)]
    raise ConfigError(f"no record is called {name!r}: name one as emoji#emoji/1FAB4")


def _no_neighbour(name: str) -> Any:
    raise ConfigError(f"the data in the package stands alone and has no {name!r}")


def example_values(scenario: Scenario, language: Language) -> dict[str, Any]:
    """The inputs of a scenario's example, pictures and sounds as bytes of a file."""
    values = dict(scenario.examples[language])
    for name, given in scenario.inputs.items():
        if given.kind in KEYS:
            values[name] = example_record(values[name])[KEYS[given.kind]]
    return values


def example_fits(scenario: Scenario, language: Language, description: ModelDescription) -> bool:
    """Whether a model was trained on such things as the example holds: its columns, and data of the package.

    A checkpoint that does not say where its records came from is not doubted.
    """
    example = scenario.examples[language]
    known = _package_data(description, {lesson.source for lesson in description.lessons})
    taught = {lesson.source for lesson in description.lessons if lesson.task in scenario.tasks}
    for name, given in scenario.inputs.items():
        value = example[name]
        columns = (
            list(value) if given.kind == "numbers" else [value["name"]] if given.kind == "series" else []
        )
        if not set(columns) <= set(description.scales):
            return False
        if description.sources and given.kind in KEYS and value.partition("#")[0] not in known:
            return False
    return not description.sources or bool(_package_data(description, taught))


def _package_data(description: ModelDescription, names: Iterable[str]) -> set[str]:
    """Names of the embedded data behind some sources, also where one refers to another."""
    found: set[str] = set()
    for name in names:
        source = description.sources.get(name, {})
        if source.get("kind") == "embedded":
            found.add(source["name"])
        words = [value for key, value in source.items() if isinstance(value, str) and key != "name"]
        found |= {word.removeprefix(EMBEDDED) for word in words if word.startswith(EMBEDDED)}
        found |= _package_data(
            description, [word for word in words if word in description.sources and word != name]
        )
    return found
