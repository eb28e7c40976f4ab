"""Raw images and audio of a recipe's sources, decoded once, and random numbers for batches made on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from openm6.core.errors import DataError
from openm6.core.log import get_log
from openm6.data.source import Source, SourceConfig, Split
from openm6.data.sources import open_sources

Raw = TypeVar("Raw")  # a decoded image or clip


def read_records(
    sources: Mapping[str, SourceConfig], split: Split, key: str, read: Callable[[bytes], Raw]
) -> dict[str, list[Raw]]:
    """Return the decoded images or audio of each source that has some in this split; broken ones are logged.

    Raises:
        DataError: a source of training records has none.
    """
    found: dict[str, list[Raw]] = {}
    for name, source in open_sources(sources, split).items():
        records = list(_decoded(source, key, read))
        if not records and split == "train":
            raise DataError(
                f"source {name!r} has no usable {key} in its records: map a column with fields, or drop it"
            )
        if records:
            found[name] = records
    return found


def _decoded(source: Source, key: str, read: Callable[[bytes], Raw]) -> Iterator[Raw]:
    for index in range(len(source)):
        try:
            data = source[index].get(key)
            if data is not None:
                yield read(data)
        except DataError as error:
            get_log().warning(f"source {source.name!r}, record {index} is left out: {error}")


def hold_out(records: dict[str, list[Raw]], every: int) -> tuple[dict[str, list[Raw]], dict[str, list[Raw]]]:
    """Each source's records without, and only, the second of every `every`.

    Raises:
        DataError: no source has two records.
    """
    kept = {
        name: [raw for index, raw in enumerate(part) if index % every != 1] for name, part in records.items()
    }
    held = {name: part[1::every] for name, part in records.items()}
    if not any(held.values()):
        raise DataError("no source has two records, one to train on and one to evaluate on: add records")
    return kept, held


class DeviceRng:
    """Draws from one generator, so that the same seed makes the same batch."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Evenly spread numbers."""
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Gaussian numbers of unit variance."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Whole numbers from low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def bernoulli(self, share: float, *shape: int) -> Tensor:
        """True with probability `share`."""
        return self.uniform(*shape) < share
