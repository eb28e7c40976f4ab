"""Example data made by formula: what the shop, factory and sound recipes run on until they are given a real table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from openm6.base.config import nearest
from openm6.base.seeds import numpy_generator
from openm6.data.made_machines import Machines
from openm6.data.made_record import Maker
from openm6.data.made_shop import Shop
from openm6.data.made_sounds import Sounds
from openm6.data.records import Record
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.split import rows_by_hash

MADE: dict[str, type[Maker]] = {"shop": Shop, "machines": Machines, "sounds": Sounds}


class MadeSource(Source):
    """Records that follow from the seed and their number."""

    def __init__(self, name: str, config: MadeConfig, split: Split) -> None:
        self.name = name
        self._maker = MADE[config.name]()
        self._config = config
        ids = [f"{config.name}/{number}" for number in range(config.records)]
        self._rows = rows_by_hash(ids, config.test_share, split)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return made_record(self._config, int(self._rows[check_index(index, len(self))]), self._maker)


def made_record(config: MadeConfig, number: int, maker: Maker | None = None) -> Record:
    """One record by its number, whichever split it is in."""
    rng = numpy_generator(config.seed, config.name, number)
    record = (maker or MADE[config.name]()).record(rng)
    about = {"id": f"{config.name}/{number}", "source": "made by formula", "license": "CC0-1.0"}
    return {**about, **record}


class MadeConfig(SourceConfig):
    """`records` examples of one kind, made as they are read; names in `MADE`."""

    kind: Literal["made"] = "made"
    name: str
    records: int = Field(default=1000, ge=1, le=10_000_000)
    seed: int = 0
    test_share: float = Field(default=0.1, ge=0, lt=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in MADE:
            raise ValueError(f"no data is made under the name {name!r}; {nearest(name, sorted(MADE))}")
        return name

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The records of one split; see SourceConfig.open."""
        return MadeSource(name, self, split)
