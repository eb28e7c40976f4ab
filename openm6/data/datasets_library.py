"""Data sets of the optional `datasets` library: by name on its hub, or a folder written by `save_to_disk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from openm6.base.config import nearest
from openm6.base.errors import DataError
from openm6.data.source import Neighbour, Source, Split
from openm6.data.table import ChooseColumns, Table, TableConfig


class ColumnarDataset(Protocol):
    """What is used of a `datasets.Dataset`."""

    column_names: list[str]
    features: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...

    def cast_column(self, column: str, feature: Any) -> ColumnarDataset: ...

    def select_columns(self, column_names: list[str]) -> ColumnarDataset: ...


class DatasetsTable(Table):
    """A `datasets.Dataset` as a table: pictures and sounds stay undecoded, class numbers become names."""

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
            raise DataError(
                f"data set {path!r} cannot be loaded: {str(error).splitlines()[0][:300]}"
            ) from None


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
    """The same data set giving `{bytes, path}` for pictures and sounds: decoding is the modalities' task."""
    for name, feature in dataset.features.items():
        if type(feature).__name__ in ("Image", "Audio"):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset
