"""Examples packed into rows of tokens, with a cursor from which the next batch can be built again."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from openm6.core.config import Config
from openm6.core.errors import ConfigError, DataError, MissingFieldError, TrainingError
from openm6.data.mixture import DataShard, SampleIndex, merge
from openm6.data.prepare import ExampleTransform
from openm6.data.quarantine import Quarantine, merge_counts
from openm6.modalities.batch import Batch, PackedExample, collate, shortened
from openm6.modalities.codes import encode_together

DEFAULT_ROWS = 4  # of a batch
ENOUGH = 200  # draws in a row without an example, before they are a reason to stop


class PackingConfig(Config):
    """A batch is `batch_size` rows of `seq_len` tokens; up to `buffer_size` examples wait for the next one.

    The rows are divided among `num_shards`, the data shards, each of which packs its own; a shard belongs to one rank.
    `auto`: one shard for one rank, one per row for several.
    """

    # auto: on a GPU, as many as fit into its memory (train/recipe.py); on a CPU, DEFAULT_ROWS
    batch_size: int | Literal["auto"] = "auto"
    seq_len: int = Field(default=512, ge=16)
    buffer_size: int = Field(default=8, ge=1)
    num_shards: int | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _shards_divide(self) -> Self:
        if self.rows < 1:
            raise ValueError("batch_size must be at least 1, or auto")
        if isinstance(self.num_shards, int) and (self.num_shards < 1 or self.rows % self.num_shards):
            raise ValueError(
                f"batch_size={self.rows} must be a multiple of num_shards={self.num_shards}: change one of them"
            )
        return self

    @property
    def rows(self) -> int:
        return DEFAULT_ROWS if self.batch_size == "auto" else self.batch_size

    def shards_for(self, size: int) -> int:
        """The number of data shards of a run on `size` ranks; ConfigError if some rank would have none."""
        automatic = self.rows if size > 1 else 1
        count = automatic if self.num_shards == "auto" else self.num_shards
        if count < size:
            raise ConfigError(
                f"packing has {count} data shards for {size} ranks, so some would have nothing to do: "
                f"raise packing.batch_size to a multiple of {size}"
            )
        return count


class Packer:
    """First fit: each example goes into the first row with enough space; those that fit none start the next batch.

    A shard's rows are closed when `buffer_size` examples did not fit. They are kept as sample indices, not tokens, so
    the cursor stays small and a resumed run builds the same rows. Each rank packs the rows of its own shards.
    """

    def __init__(
        self, transform: ExampleTransform, config: PackingConfig, quarantine: Quarantine, rank: int = 0, size: int = 1
    ) -> None:
        self.transform, self.config, self.quarantine = transform, config, quarantine
        self.sampler, self.rank, self.size = transform.sampler, rank, size
        # Of the samples in the buffers, by global index: what they become, kept to save time.
        self._built: dict[int, PackedExample] = {}
        # By component: samples since the last that became an example.
        self._fruitless = [0] * len(transform.sampler.components)
        self.sampler.set_shards(config.shards_for(size), rank, size)

    def state(self) -> dict[str, Any]:
        """JSON-able: position in the mixture, buffers of this rank's shards, and the quarantine's counts."""
        return {**self.sampler.state(), "quarantine": self.quarantine.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position that `merge_cursors` put together; a number of shards that still fits is kept."""
        self._built.clear()
        count = state["num_shards"]
        fits = count >= self.size and self.config.rows % count == 0
        self.sampler.set_shards(count if fits else self.config.shards_for(self.size), self.rank, self.size)
        self.sampler.restore(state)
        if self.rank == 0:  # which holds the counts of all ranks from now on
            self.quarantine.restore(state["quarantine"])

    def batches(self) -> Iterator[Batch]:
        """An endless stream of this rank's part of each packed batch."""
        while True:
            with encode_together():
                filled = [self._fill(shard) for shard in self.sampler.shards]
            rows = [[example for _, example in row] for rows in filled for row in rows]
            samples = [sample for rows in filled for row in rows for sample, _ in row]
            yield replace(collate(rows, self.config.seq_len, self.state()), samples=samples)

    def _fill(self, shard: DataShard) -> list[list[tuple[SampleIndex, PackedExample]]]:
        count = self.config.rows // self.sampler.num_shards
        rows: list[list[tuple[SampleIndex, PackedExample]]] = [[] for _ in range(count)]
        free = [self.config.seq_len] * count
        earlier, shard.buffer = shard.buffer, []
        while len(shard.buffer) < self.config.buffer_size and any(free):
            sample = earlier.pop(0) if earlier else self.sampler.take(shard)
            example = self._built.pop(sample.global_index, None) or self._example(sample)
            if example is None:
                continue
            row = next((row for row, left in enumerate(free) if left >= len(example)), None)
            if row is None:
                shard.buffer.append(sample)  # counted only when it is in a row
                self._built[sample.global_index] = example
            else:
                self.quarantine.accept()
                if example.truncated:
                    self.quarantine.count("truncated", self.sampler.components[sample.component].source.name)
                rows[row].append((sample, example))
                free[row] -= len(example)
        shard.buffer.extend(earlier)
        return rows

    def _example(self, sample: SampleIndex) -> PackedExample | None:
        """The sample as tokens, cut to a row; None if it cannot be used, which is counted; TrainingError if none is."""
        length, components = self.config.seq_len, self.sampler.components
        try:
            example = self.transform(sample)
            if len(example) > length:
                example = shortened(example, length)
            if len(example) <= length:
                self._fruitless[sample.component] = 0
                return example
            reason: Exception = DataError(
                f"{len(example)} tokens do not fit a row of {length}: raise packing.seq_len or shorten it"
            )
            self.quarantine.add(*self.transform.name(sample), reason, "too_long")
        except MissingFieldError as error:
            self.quarantine.count("not_applicable", components[sample.component].key)
            reason = error
        except DataError as error:
            self.quarantine.add(*self.transform.name(sample), error)
            reason = error
        self._fruitless[sample.component] += 1
        # Otherwise packing would search forever for the first record that can be used.
        if all(n >= max(ENOUGH, len(one.source)) for n, one in zip(self._fruitless, components, strict=True)):
            names = ", ".join(component.key for component in components)
            raise TrainingError(f"no record of {names} can be used; the last one: {reason}")
        return None


def merge_cursors(states: list[dict[str, Any]]) -> dict[str, Any]:
    return {**merge(states), "quarantine": merge_counts([state["quarantine"] for state in states])}
