"""Reading settings: YAML file, then `key.path=value` overrides, checked against the fields of a config class."""

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from openm6.core.errors import ConfigError, nearest
from openm6.core.files import renamed


class Config(BaseModel):
    """Base class of all configs: frozen, keyword-only; unknown keys raise."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Raise for the first unknown key; `extra="forbid"` would not report which class it was meant for."""
        for key in values if isinstance(values, dict) else ():
            if key not in cls.model_fields:
                context = {"key": key, "new": renamed(cls.__name__).get(key), "known": list(cls.model_fields)}
                raise PydanticCustomError("unknown_key", "unknown key '{key}'", context)
        return values


AnyConfig = TypeVar("AnyConfig", bound=Config)
_LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # as safe, and eight times as fast


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise ConfigError if it is no file, not UTF-8, not YAML, or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error}): save it again as UTF-8") from None
    try:
        content = yaml.load(text, _LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{where}: fix its indentation or quotes there") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, as the files in recipes/ do")
    return content


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `values` with each `key.path=value` set (YAML; indices in paths); ConfigError if wrong."""
    result = yaml.safe_load(yaml.safe_dump(values))  # a deep copy of plain data
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r} must look like key.path=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
        _set(result, path.split("."), value, override)
    return result


def _set(node: Any, path: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(path):
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(path[: depth + 1])} does not lead anywhere")
        if depth == len(path) - 1:
            node[index] = value
        else:
            node = node.setdefault(index, {}) if isinstance(node, dict) else node[index]


def build(config_class: type[AnyConfig], values: dict[str, Any], where: str) -> AnyConfig:
    """Return `config_class` from plain values; ConfigError, after `where`, if a key or a value is wrong."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}{_line_in(where, error)}: {_sentence(error)}") from None


def _line_in(where: str, error: ValidationError) -> str:
    """Return `, line N` of the first error of pydantic if `where` is the YAML file that holds its value, or nothing."""
    first = error.errors()[0]
    unknown = first["type"] == "unknown_key"
    try:
        node: Any = yaml.compose(Path(where).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return ""
    line = found = None
    for key in [*first["loc"], *([first["ctx"]["key"]] if unknown else [])]:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(key)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            found = (node.value[key], node.value[key])
        if found is not None:
            line, node = found[0].start_mark.line + 1, found[1]
    # Another value (or name of a key), or an unknown key that is not there, comes from the command line.
    elsewhere = unknown and found is None
    if found is not None and not unknown:
        value = yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))
        elsewhere = first["input"] not in (value, first["loc"][-1])
    return "" if line is None or elsewhere else f", line {line}"


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unknown_key":
        key, new, known = first["ctx"].values()
        path = f"{path}.{key}" if path else str(key)
        if new:
            return f"the key {path!r} was renamed to {new!r}"
        return f"unknown key {path!r}; {nearest(str(key), known)}"  # YAML reads `on` and `1` as keys that are no text
    if first["type"] == "union_tag_invalid":
        known = re.findall(r"'([^']+)'", first["ctx"]["expected_tags"])
        return f"{path}: no kind is called {first['ctx']['tag']!r}; {nearest(first['ctx']['tag'], known)}"
    if first["type"] == "union_tag_not_found":
        return f"the key '{path}.kind' is missing: add it"
    if first["type"] == "missing":
        return f"the key {path!r} is missing: add it"
    message = str(first["msg"]).removeprefix("Value error, ")
    given = "" if isinstance(first["input"], (dict, list)) else f" (given: {first['input']!r})"
    return f"{path}: {message}{given}" if path else f"{message}{given}"
