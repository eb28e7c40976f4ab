"""Settings from files and the command line; what is wrong is said with its place and its mend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from openm6.core.config import Config, apply_overrides, build, read_yaml
from openm6.core.errors import ConfigError, nearest

PACKAGE = Path(__file__).parents[2] / "openm6"


class Csv(Config):
    kind: Literal["csv"] = "csv"
    path: str
    delimiter: str = ","


class Folder(Config):
    kind: Literal["folder"] = "folder"
    root: str


class Rate(Config):
    warmup: int = 3


class Toy(Config):
    steps: int = 10
    rate: Rate = Rate()
    sources: dict[str, Annotated[Csv | Folder, Field(discriminator="kind")]] = {}
    rates: list[Rate] = []


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"step": 3}, "unknown key 'step'; did you mean 'steps'"),
        ({"rate": {"warm_up": 3}}, "unknown key 'rate.warm_up'; did you mean 'warmup'"),
        ({"rates": [{"warmpu": 3}]}, "did you mean 'warmup'"),
        ({"sources": {"mine": {"kind": "csv", "path": "a", "delimeter": ";"}}}, "did you mean 'delimiter'"),
        ({"sources": {"mine": {"kind": "folder", "root": "a", "rot": "b"}}}, "did you mean 'root'"),
        ({True: 3}, "unknown key 'True'; known: steps"),
        ({"rate": {1: 3}}, "unknown key 'rate.1'; known: warmup"),
        ({"sources": {"mine": {"kind": "csv"}}}, "sources.mine.csv.path' is missing: add it"),
        ({"steps": "many"}, "steps: "),
    ],
)
def test_what_is_wrong_is_named(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(Toy, values, "toy.yaml")
    assert str(refusal.value).startswith("toy.yaml: ")
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Toy().steps = 3  # type: ignore[misc]


def test_overrides_reach_into_mappings_and_lists() -> None:
    values = {"steps": 1, "rates": [{"warmup": 1}, {"warmup": 2}]}
    changed = apply_overrides(values, ["steps=7", "rates.1.warmup=9", "rate.warmup=5"])
    assert changed == {"steps": 7, "rates": [{"warmup": 1}, {"warmup": 9}], "rate": {"warmup": 5}}
    assert values == {"steps": 1, "rates": [{"warmup": 1}, {"warmup": 2}]}


@pytest.mark.parametrize("override", ["steps", "=3", "steps.deeper=1", "rates.5.warmup=1", "steps=[1"])
def test_overrides_that_lead_nowhere(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"steps": 1, "rates": []}, [override])


@pytest.mark.parametrize("content", [b"\xff\xfe", b"steps: [1", b"- 1\n- 2\n"])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="recipe.yaml"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="no recipe at .*missing.yaml: check the path"):
        read_yaml(tmp_path / "missing.yaml")


def test_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: 4\nsources:\n  mine: {kind: csv, path: a.csv}\n")
    config = build(Toy, apply_overrides(read_yaml(path), ["sources.mine.path=b.csv"]), "recipe.yaml")
    assert config == Toy(steps=4, sources={"mine": Csv(path="b.csv")})


def test_nearest_names_the_known_ones_where_nothing_is_near() -> None:
    assert nearest("zzz", ["apple", "pear"]) == "known: apple, pear"


def test_a_word_that_means_something_else_is_not_suggested() -> None:
    known = ["draw", "speak", "transcribe"]
    assert "did you mean" not in nearest("describe", known) and "known: draw" in nearest("describe", known)
    assert nearest("transcibe", known).startswith("did you mean 'transcribe'?")


def test_where_nothing_is_known_it_is_said() -> None:
    assert nearest("mass", []) == "none is known"


def keys_given_twice(text: str) -> set[str]:
    """Keys that one mapping has twice: YAML keeps the last of them and says nothing."""
    found: set[str] = set()
    nodes = [yaml.compose(text, Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            found |= {name for name in names if names.count(name) > 1}
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
    return found


def test_no_file_of_the_package_has_a_key_twice() -> None:
    files = sorted(PACKAGE.rglob("*.yaml"))
    assert {"built_in.yaml", "demo.yaml"} <= {path.name for path in files}
    assert {path.name: keys_given_twice(path.read_text(encoding="utf-8")) for path in files} == {
        path.name: set() for path in files
    }
    assert keys_given_twice("a: 1\nb: [{c: 1, d: 2, c: 3}]\na: 2") == {"a", "c"}
