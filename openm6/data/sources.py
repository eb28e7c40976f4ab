"""The list of source kinds, opening all sources of a recipe, and pairs of records of two sources."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, WrapValidator

from openm6.core.errors import DataError, nearest
from openm6.core.extensions import installed
from openm6.core.seeds import mix, text_hash
from openm6.data.chat import ChatConfig
from openm6.data.media import FolderConfig, TarConfig
from openm6.data.parquet import DatasetsConfig, EmbeddedConfig, ParquetConfig
from openm6.data.records import CANONICAL_KEYS, TEXT_KEYS, Record
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.synthetic import SyntheticSeriesConfig
from openm6.data.text_tables import CsvConfig, JsonlConfig
from openm6.data.windows import WindowsConfig

_JOINED = ("id", "source", "license")


class PairsConfig(SourceConfig):
    """Joins two sources of the recipe by a key; test pairs consist of test records only."""

    kind: Literal["pairs"] = "pairs"
    left: str
    right: str
    key: str = "label"
    left_keys: list[str] | None = None  # record keys of the left source; all if not set
    right_keys: list[str] | None = None

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        for key in (self.key, *(self.left_keys or ()), *(self.right_keys or ())):
            if key not in CANONICAL_KEYS:
                raise DataError(f"pairs {name!r}: {key!r} is no record key; {nearest(key, CANONICAL_KEYS)}")
        if self.key not in TEXT_KEYS:
            raise DataError(
                f"pairs {name!r}: key {self.key!r} holds no single text, so records cannot be joined by it: "
                f"use one of {', '.join(TEXT_KEYS)}"
            )
        left, right = neighbour(self.left), neighbour(self.right)
        found = PairSource(name, left, right, self)
        # The few validation or test records of one side may have no partner among those of the other.
        if split == "train" and not len(found) and len(left) and len(right):
            raise DataError(f"pairs {name!r}: no {self.key!r} of {left.name!r} is found in {right.name!r}")
        return found


class PairSource(Source):
    """Every left record that has a partner, with a right record of equal key, another one each epoch.

    Keys of `left` win over those of `right`; `extra` is merged; `id`, `source` and `license` name both.
    """

    def __init__(self, name: str, left: Source, right: Source, config: PairsConfig) -> None:
        self.name, self._left, self._right = name, left, right
        self._left_keys = frozenset(CANONICAL_KEYS if config.left_keys is None else config.left_keys)
        self._right_keys = frozenset(CANONICAL_KEYS if config.right_keys is None else config.right_keys)
        self._seed = text_hash(name)
        self._partners: dict[Any, list[int]] = defaultdict(list)
        for index, value in enumerate(right.values(config.key)):
            if value is not None:
                self._partners[value].append(index)
        keys = left.values(config.key)
        self._rows = [index for index, value in enumerate(keys) if value in self._partners]
        self._keys = [keys[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> Record:
        """The pair of an index in an epoch: a pure function of both."""
        index = check_index(index, len(self))
        partners = self._partners[self._keys[index]]
        chosen = partners[mix(self._seed, epoch, index) % len(partners)]
        left, right = self._left.at(self._rows[index], epoch), self._right.at(chosen, epoch)
        taken = {key: right[key] for key in right if key in self._right_keys}
        taken |= {key: left[key] for key in left if key in self._left_keys}
        for key in _JOINED:
            first, second = left.get(key, right.get(key)), right.get(key, left.get(key))
            if first is not None:
                taken[key] = str(first) if first == second else f"{first} + {second}"
        extra = {**right.get("extra", {}), **left.get("extra", {})}
        return {**taken, "extra": extra} if extra else taken

    def values(self, key: str) -> list[Any]:
        """One key of every pair, without opening images or audio clips if the left side alone fills it."""
        if key not in _JOINED and key in self._left_keys:
            values = self._left.values(key)
            found = [values[row] for row in self._rows]
            if None not in found:
                return found
        return super().values(key)


def _open_kind(values: Any, check: Callable[[Any], SourceConfig]) -> SourceConfig:
    """The config of a built-in kind, or of one that an installed package adds by an entry point of its name."""
    kind = values.get("kind") if isinstance(values, dict) else None
    added = installed("openm6.sources", SourceConfig).get(kind) if isinstance(kind, str) else None
    return check(values) if added is None else added.model_validate(values)


AnySourceConfig = Annotated[
    EmbeddedConfig
    | ParquetConfig
    | JsonlConfig
    | ChatConfig
    | CsvConfig
    | FolderConfig
    | TarConfig
    | DatasetsConfig
    | PairsConfig
    | WindowsConfig
    | SyntheticSeriesConfig,
    Field(discriminator="kind"),
    WrapValidator(_open_kind),
]
"""The config of any kind of source; a new kind is one line here, or an entry point `openm6.sources`."""


def open_sources(
    configs: Mapping[str, SourceConfig], split: Split, names: Iterable[str] | None = None
) -> dict[str, Source]:
    """The sources of a recipe, or those named, in one split; DataError: no data, no training records, or a circle."""
    opened: dict[str, Source] = {}

    def open_one(name: str, path: tuple[str, ...]) -> Source:
        """The source `name`, to which the sources in `path` have led."""
        if name in path:
            raise DataError(f"sources refer to one another in a circle: {' → '.join((*path, name))}")
        if name not in configs:
            raise DataError(
                f"source {path[-1]!r} refers to {name!r}, which is not a source; {nearest(name, list(configs))}"
            )
        if name not in opened:
            source = configs[name].open(name, split, lambda other: open_one(other, (*path, name)))
            if split == "train" and len(source) == 0:
                raise DataError(
                    f"source {name!r} has no training records: check its path, split column or test_fraction"
                )
            opened[name] = source
        return opened[name]

    return {name: open_one(name, ()) for name in (configs if names is None else names)}
