"""The pictures and sounds that examples name: `emoji#emoji/1FAB4` is one record of the data in the package."""

from __future__ import annotations

from functools import cache
from typing import Any

from openm6.base.errors import ConfigError
from openm6.data.made import MADE, MadeConfig, made_record
from openm6.data.parquet import EmbeddedConfig
from openm6.data.records import Record
from openm6.serve.scenarios.scenario import Language, Scenario

KEYS = {"image": "image", "sound": "audio"}


@cache
def example_record(name: str) -> Record:
    """The record that `data#id` names, from the embedded or the made data.

    Raises:
        ConfigError: there is no such data or record.
    """
    data, _, key = name.partition("#")
    if data in MADE:
        return made_record(MadeConfig(name=data), int(key.rpartition("/")[2]))
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
