"""Tables in Arrow memory: Parquet files, the data that comes with the package, and the `datasets` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from openm6.core.errors import DataError, nearest
from openm6.data.records import RowReader, check_columns
from openm6.data.source import Neighbour, Source, SourceConfig, Split
from openm6.data.storage import TableFolder, find_files, first_line, is_remote, refuse_not_parquet
from openm6.data.table import ArrowTable, ChooseColumns, Table, TableConfig, TableSource

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED = (
    "emoji",
    "countries",
    "digits",
    "espeak_digits",
    "poems_zh",
    "wordnet_en",
    "penguins",
    "iris",
    "questions",
    "shop",
    "machines",
    "audio_events",
)
EMBEDDED_TABLES = ("seattle_weather_daily",)
EMBEDDED_MARK = "embedded:"


def embedded_path(name: str) -> str:
    """The file of an embedded table, such as `emoji-train` or `seattle_weather_daily`.

    Raises:
        DataError: no such table; the sentence names the nearest.
    """
    path = EMBEDDED_FOLDER / f"{name}.parquet"
    if not path.is_file():
        known = sorted(file.stem for file in EMBEDDED_FOLDER.glob("*.parquet"))
        raise DataError(f"no embedded table {name!r}; {nearest(name, known)}")
    return str(path)


def parquet_files(path: str) -> list[str]:
    """The files of `path`: a file, a folder, a glob, an address, or `embedded:NAME`."""
    if path.startswith(EMBEDDED_MARK):
        return [embedded_path(path.removeprefix(EMBEDDED_MARK))]
    return find_files(path, (".parquet",))


def read_parquet(path: str, choose: ChooseColumns = list, max_gib: float = 8.0) -> pa.Table:
    """The Parquet files at a path as one Arrow table in memory, with the columns that `choose` picks.

    Raises:
        DataError: not Parquet, files of unlike columns, or more than `max_gib` GiB when unpacked.
    """
    files = parquet_files(path)
    with _open(files[0]) as file:
        columns = list(choose(file.schema_arrow.names))
    tables = []
    room = int(max_gib * 2**30)
    for file_path in files:
        with _open(file_path) as file:
            room -= _unpacked_bytes(file, columns)
            if room < 0:
                raise DataError(
                    f"{path} takes more than {max_gib} GiB of memory: raise max_gib or use a tar source"
                )
            tables.append(_read(file, file_path, columns))
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"the files at {path} have columns of unlike kinds: {first_line(error)}") from None


def _read(file: pq.ParquetFile, path: str, columns: Sequence[str]) -> pa.Table:
    check_columns(
        columns, file.schema_arrow.names, path
    )  # a column that is not there would be left out silently
    try:
        return file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged: {first_line(error)}") from None


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(fsspec.open(path, "rb").open() if is_remote(path) else path)
    except (pa.ArrowException, OSError, ImportError, ValueError) as error:
        refuse_not_parquet(path)
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from None


def _unpacked_bytes(file: pq.ParquetFile, columns: Sequence[str]) -> int:
    metadata = file.metadata
    total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            if column.path_in_schema.split(".")[0] in columns:
                total += column.total_uncompressed_size
    return total


class ParquetConfig(TableConfig):
    """Parquet: a file, a folder of them, a glob, or an address; held in memory column by column."""

    kind: Literal["parquet"] = "parquet"
    max_gib: float = Field(default=8.0, gt=0)

    def load(self, path: str, choose: ChooseColumns) -> ArrowTable:
        """The chosen columns in Arrow memory."""
        return ArrowTable(read_parquet(path, choose, self.max_gib), path)


class EmbeddedConfig(SourceConfig):
    """A data set that comes with the package, with its own split; names in `EMBEDDED`."""

    kind: Literal["embedded"] = "embedded"
    name: str
    limit: int | None = Field(default=None, ge=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in EMBEDDED:
            raise ValueError(f"no embedded data set {name!r}; {nearest(name, EMBEDDED)}")
        return name

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The records of one split; see SourceConfig.open."""
        path = embedded_path(f"{self.name}-{'train' if split == 'train' else 'test'}")
        table = read_parquet(path)
        reader = RowReader(table.column_names, None, TableFolder(path), path)
        rows = np.arange(0 if split == "validation" else table.num_rows)[: self.limit]
        return TableSource(name, ArrowTable(table, Path(path).name), reader, rows)


class ColumnarDataset(Protocol):
    """What is used of a `datasets.Dataset`."""

    column_names: list[str]
    features: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...

    def cast_column(self, column: str, feature: Any) -> ColumnarDataset: ...

    def select_columns(self, column_names: list[str]) -> ColumnarDataset: ...


class DatasetsTable(Table):
    """A `datasets.Dataset` as a table: images and audio clips stay undecoded, class numbers become names."""

    def __init__(self, dataset: ColumnarDataset, where: str) -> None:
        self.where = where
        self.names = list(dataset.column_names)
        self._dataset = _undecoded(dataset)
        self._classes = {
            name: list(feature.names)
            for name, feature in dataset.features.items()
            if type(feature).__name__ == "ClassLabel"
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The cells of one row; a broken one raises DataError."""
        try:
            cells = self._dataset[row]
        except (OSError, ValueError, ArithmeticError) as error:
            raise DataError(f"the row cannot be read: {error}") from None
        return {name: self._named(name, cells[name]) for name in columns}

    def column(self, column: str) -> list[Any]:
        """A whole column."""
        cells = self._dataset.select_columns([column])[:][column]
        return [self._named(column, cell) for cell in cells]

    def _named(self, column: str, cell: Any) -> Any:
        names = self._classes.get(column)
        known = names is not None and isinstance(cell, int) and 0 <= cell < len(names)
        return names[cell] if names is not None and known else cell


class DatasetsConfig(TableConfig):
    """`path` is a name on the hub or a local folder; needs the extra `[hf]`."""

    kind: Literal["datasets"] = "datasets"
    subset: str | None = None  # the configuration of the data set
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None  # the data set's own test split; a stable hash where not given

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The records of one split; see TableConfig.open."""
        if self.test_split is None:
            return super().open(name, split, neighbour)
        own = self.test_split if split == "test" else self.train_split
        # With both splits named, each is a table of its own and nothing is held back from it.
        alone = self.model_copy(update={"train_split": own, "test_split": None, "test_path": self.path})
        return alone.open(name, split, neighbour)

    def load(self, path: str, choose: ChooseColumns) -> DatasetsTable:
        """The split `train_split` of the data set."""
        table = DatasetsTable(self._dataset(path), path)
        choose(table.names)
        return table

    def _dataset(self, path: str) -> ColumnarDataset:
        library = _library()
        try:
            if Path(path).expanduser().is_dir() and _is_saved(Path(path).expanduser()):
                found = library.load_from_disk(str(Path(path).expanduser()))
                if isinstance(found, Mapping) and self.train_split not in found:
                    known = nearest(self.train_split, [str(key) for key in found])
                    raise DataError(f"{path} has no split {self.train_split!r}; {known}")
                return found[self.train_split] if isinstance(found, Mapping) else found
            return library.load_dataset(path, self.subset, split=self.train_split, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"data set {path!r} cannot be loaded: {first_line(error)}") from None


def _library() -> Any:
    """The optional package, at its one door."""
    try:
        import datasets  # noqa: PLC0415 - optional
    except ImportError:
        raise DataError("sources of kind `datasets` need an extra: pip install 'openm6[hf]'") from None
    return datasets


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _undecoded(dataset: ColumnarDataset) -> ColumnarDataset:
    """The same data set giving `{bytes, path}` for images and audio clips: decoding is the modalities' task."""
    for name, feature in dataset.features.items():
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset
