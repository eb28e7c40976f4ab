"""Tables in Arrow memory: Parquet files, the data that comes with the package, and the `datasets` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from openm6.core.errors import DataError, first_line, nearest
from openm6.data.records import check_columns
from openm6.data.source import Neighbour, Source, SourceConfig, Split
from openm6.data.storage import find_files, is_remote, refuse_foreign
from openm6.data.table import ArrowTable, TableConfig, with_known_zones

EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
EMBEDDED = tuple(sorted(path.stem.removesuffix("-train") for path in EMBEDDED_FOLDER.glob("*-train.parquet")))
EMBEDDED_MARK = "embedded:"


def embedded_path(name: str) -> str:
    """The file of an embedded table, such as `emoji-train`; DataError, with the nearest name, if there is none."""
    path = EMBEDDED_FOLDER / f"{name}.parquet"
    if not path.is_file():
        known = sorted(file.stem for file in EMBEDDED_FOLDER.glob("*.parquet"))
        raise DataError(f"no embedded table {name!r}; {nearest(name, known)}")
    return str(path)


class ParquetTable(ArrowTable):
    """The files of a path: a file, a folder, a glob, an address, or `embedded:NAME`."""

    def __init__(self, path: str, max_gib: float = 8.0) -> None:
        self.where = path
        self._max_gib = max_gib
        embedded = path.removeprefix(EMBEDDED_MARK)
        self._files = find_files(path, ParquetConfig.endings) if embedded == path else [embedded_path(embedded)]
        with _open(self._files[0]) as file:
            self.names = list(file.schema_arrow.names)

    def read(self, columns: Sequence[str]) -> None:
        """As Table.read; DataError also for damaged files, unlike columns and more than `max_gib` GiB when unpacked."""
        tables = []
        free = int(self._max_gib * 2**30)
        for path in self._files:
            with _open(path) as file:
                groups = (file.metadata.row_group(group) for group in range(file.metadata.num_row_groups))
                chunks = (group.column(index) for group in groups for index in range(group.num_columns))
                read = (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
                free -= sum(chunk.total_uncompressed_size for chunk in read)
                if free < 0:
                    raise DataError(
                        f"{self.where} takes more than {self._max_gib} GiB of memory: raise max_gib or use a tar source"
                    )
                # A column that is not there would be left out silently.
                check_columns(columns, file.schema_arrow.names, path)
                try:
                    tables.append(file.read(columns=list(columns)))
                except (pa.ArrowException, OSError) as error:
                    raise DataError(f"{path} is damaged: {first_line(error)}") from None
        try:
            self.arrow = with_known_zones(pa.concat_tables(tables, promote_options="permissive"))
        except pa.ArrowException as error:
            raise DataError(f"the files at {self.where} have columns of unlike kinds: {first_line(error)}") from None


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(fsspec.open(path, "rb").open() if is_remote(path) else path)
    except (pa.ArrowException, OSError, ImportError, ValueError) as error:
        refuse_foreign(path, parquet=True)
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from None


class ParquetConfig(TableConfig):
    """Parquet: a file, a folder of them, a glob, or an address; held in memory column by column."""

    endings: ClassVar[tuple[str, ...]] = (".parquet",)
    kind: Literal["parquet"] = "parquet"
    max_gib: float = Field(default=8.0, gt=0)

    def load(self, path: str) -> ParquetTable:
        return ParquetTable(path, self.max_gib)


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
        train, test = (f"{EMBEDDED_MARK}{self.name}-{part}" for part in ("train", "test"))
        source = ParquetConfig(path=train, test_path=test, limit=self.limit).open(name, split, neighbour)
        # Warnings of columns that no task reads are for tables of a user.
        source.columns = {}
        return source


class DatasetsTable(ArrowTable):
    """A `datasets.Dataset` by its Arrow table: images and audio clips stay undecoded, class numbers become names."""

    def __init__(self, dataset: Any, where: str) -> None:
        super().__init__(dataset.with_format("arrow")[:], where)
        features = dataset.features.items()  # types by name: the library is optional
        self._classes = {name: one.names for name, one in features if type(one).__name__ == "ClassLabel"}

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        return {name: self._named(name, cell) for name, cell in super().row(row, columns).items()}

    def column(self, column: str) -> list[Any]:
        return [self._named(column, cell) for cell in super().column(column)]

    def _named(self, column: str, cell: Any) -> Any:
        names = self._classes.get(column, ())
        if names and cell == -1:  # a record without a label
            return None
        return names[cell] if isinstance(cell, int) and 0 <= cell < len(names) else cell


class DatasetsConfig(TableConfig):
    """`path` is a name on the hub or a local folder; needs the extra `[hf]`."""

    kind: Literal["datasets"] = "datasets"
    subset: str | None = None  # the configuration of the data set
    revision: str | None = None
    train_split: str = "train"
    test_split: str | None = None  # the data set's own test split; a stable hash if not set

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        if self.test_split is None:
            return super().open(name, split, neighbour)
        # Test records are read after the training, which a wrong name must not wait for.
        if self.test_split not in (known := self._splits()):
            hint = nearest(self.test_split, known) if known else "leave test_split out"
            raise DataError(f"{self.path} has no split {self.test_split!r}; {hint}")
        own = self.test_split if split == "test" else self.train_split
        # With both splits named, each is a table of its own and nothing is held back from it.
        alone = self.model_copy(update={"train_split": own, "test_split": None, "test_path": self.path})
        return alone.open(name, split, neighbour)

    def load(self, path: str) -> DatasetsTable:
        datasets, folder = _datasets(), Path(path).expanduser()
        try:
            if not _is_saved(folder):
                split = datasets.load_dataset(path, self.subset, split=self.train_split, revision=self.revision)
                return DatasetsTable(split, path)
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, Mapping):
                if self.train_split not in found:
                    known = nearest(self.train_split, [str(key) for key in found])
                    raise DataError(f"{path} has no split {self.train_split!r}; {known}")
                found = found[self.train_split]
            return DatasetsTable(found, path)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"data set {path!r} cannot be loaded: {first_line(error)}") from None

    def _splits(self) -> list[str]:
        """The names of the splits; a data set that was saved alone has none."""
        datasets, folder = _datasets(), Path(self.path).expanduser()
        try:
            if not _is_saved(folder):
                return list(datasets.get_dataset_split_names(self.path, self.subset, revision=self.revision))
            found = datasets.load_from_disk(str(folder))
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"data set {self.path!r} cannot be loaded: {first_line(error)}") from None
        return [str(key) for key in found] if isinstance(found, Mapping) else []


def _datasets() -> Any:
    try:
        import datasets  # noqa: PLC0415 - optional
    except ImportError:
        raise DataError("sources of kind `datasets` need an extra: pip install '.[hf]'") from None
    return datasets


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
