"""Folders of images or audio, WebDataset tars, and the reader that fits a path."""

import codecs
import json
import os
import re
import tarfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from openm6.core.errors import DataError
from openm6.data import records
from openm6.data.parquet import EMBEDDED_MARK, ParquetConfig
from openm6.data.source import Neighbour, Source, SourceConfig, Split, present_split, rows_by_hash, split_named
from openm6.data.storage import find_files, is_remote, open_binary, read_beside
from openm6.data.table import Table, TableConfig, TableSource
from openm6.data.text_tables import HEADER_LINES, CsvConfig, JsonlConfig

MAX_BYTES = dict.fromkeys(records.IMAGE_ENDINGS, records.MAX_IMAGE_BYTES)
MAX_BYTES |= dict.fromkeys(records.AUDIO_ENDINGS, records.MAX_AUDIO_BYTES)
MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Column -> the endings of the files that fill it.
_FILLED_BY = {"image": records.IMAGE_ENDINGS, "audio": records.AUDIO_ENDINGS, "text_en": (".txt",), "label": (".cls",)}


def split_of(file: Path) -> Split | None:
    """The split that a file's first folder names (`train/…`, `test/…`, `val/…`), if it names one."""
    return split_named(file.parts[0]) if len(file.parts) > 1 else None


def name_splits(named: Collection[Split | None]) -> bool:
    """Whether first folders that are called as splits are splits; beside `car/` and `bus/`, `train/` is a class."""
    return None not in named or ("train" in named and ("test" in named or "validation" in named))


def media_files(root: Path) -> list[Path]:
    """Every image and audio file below a folder, relative to it, sorted; hidden files are passed over."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        shown = [name for name in names if not name.startswith(".")]
        found += [Path(folder, name).relative_to(root) for name in shown if name.lower().endswith(tuple(MAX_BYTES))]
    return sorted(found)


class FolderConfig(SourceConfig):
    """A local folder of images or audio clips: `cat/1.jpg`, or `train/cat/1.jpg` and `test/cat/2.jpg`."""

    kind: Literal["folder"] = "folder"
    path: str
    labels: bool = True  # the subfolder's name becomes `label`
    captions: bool = True  # `1.txt` beside `1.jpg` becomes the text
    language: Literal["en", "zh"] = "en"  # of the captions
    test_fraction: float = Field(default=0.1, ge=0.0, le=0.9)  # by a stable hash of the name, without train/ and test/
    validation_fraction: float = Field(default=0.0, ge=0.0, le=0.5)  # of the training files, if no folder holds any
    limit: int | None = Field(default=None, ge=1)

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        root, files = self._files(name)
        named = [split_of(file) for file in files]
        by_split = name_splits(named)
        if by_split and "train" in named and len(set(named)) > 1:
            divided = split == "test" or {"validation", "test"} <= set(named)
            chosen, test_fraction = present_split(split, named) if divided else "train", 0.0
            files = [file for file, side in zip(files, named, strict=True) if side == chosen]
        else:
            divided, test_fraction = False, self.test_fraction
        if not divided:
            names = [file.as_posix() for file in files]
            files = [files[row] for row in rows_by_hash(names, test_fraction, split, self.validation_fraction)]
        return self._source(name, root, files[: self.limit], by_split)

    def open_held_out(self, name: str) -> Source:
        """The files of the folder of the test split (or else of validation), or all if there is none."""
        root, files = self._files(name)
        named = [split_of(file) for file in files]
        chosen = present_split("test", named)
        held_out = [file for file, side in zip(files, named, strict=True) if side == chosen]
        return self._source(name, root, held_out or files, bool(held_out) or name_splits(named))

    def _source(self, name: str, root: Path, files: list[Path], by_split: bool) -> Source:
        table = FolderTable(self, root, files, by_split)
        reader = records.RowReader(table.names, None, table.open_file, self.path)
        return TableSource(name, table, reader, np.arange(len(files)))

    def _files(self, name: str) -> tuple[Path, list[Path]]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"there is no folder {self.path}: check the path of source {name!r}")
        files = media_files(root)
        if not files:
            raise DataError(f"no images or audio clips below {self.path} (looked for {' '.join(MAX_BYTES)})")
        return root, files


class FolderTable(Table):
    """One row per file: its name, the label of its subfolder, the caption beside it."""

    def __init__(self, config: FolderConfig, root: Path, files: list[Path], by_split: bool) -> None:
        self.where, self._by_split = config.path, by_split
        self.names = ["id", "image", "audio", "label", f"text_{config.language}"]
        self._config, self._root, self._files = config, root, files
        self.open_file = partial(read_beside, str(root / "any"))  # reads nothing outside the folder, links included

    def __len__(self) -> int:
        return len(self._files)

    def row_name(self, row: int) -> str:
        return f"file {self._files[row].as_posix()}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        file = self._files[row]
        kind = "image" if file.suffix.lower() in records.IMAGE_ENDINGS else "audio"
        cells: dict[str, Any] = {"id": file.as_posix(), kind: file.as_posix()}
        if self._config.labels:
            # The innermost folder, unless that is the split's.
            folders = file.parts[1 if self._by_split and split_of(file) else 0 : -1]
            cells["label"] = folders[-1] if folders else None
        text, caption = self.names[-1], file.with_suffix(".txt")
        if self._config.captions and text in columns and (self._root / caption).is_file():
            content = self.open_file(caption.as_posix(), records.MAX_TEXT_BYTES)
            cells[text] = records.decode_utf8(content.removeprefix(codecs.BOM_UTF8), caption.name).strip()
        return cells


class _Sample(NamedTuple):
    """The files of one record: ending -> where its bytes begin in the shard, and their number."""

    shard: str
    key: str
    files: dict[str, tuple[int, int]]


class TarTable(Table):
    """Rows are samples; columns are endings of files (`jpg`, `txt`), what these fill (`image`), and keys of JSON."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._samples = [sample for shard in shards(path) for sample in _samples(shard)]
        if not self._samples:
            raise DataError(f"{path} holds no files: is it a WebDataset tar?")
        endings = sorted({ending for sample in self._samples for ending in sample.files})
        some = self._samples[:: -(-len(self._samples) // HEADER_LINES)]
        keys = [key for sample in some for key in records.unless_broken(_json_of, sample) or {}]
        filled = [column for column in _FILLED_BY if _ending_for(column, endings)]
        self.names = list(dict.fromkeys(["id", *filled, *keys, *endings]))

    def __len__(self) -> int:
        return len(self._samples)

    def row_name(self, row: int) -> str:
        return f"sample {self._samples[row].key!r} in {self._samples[row].shard}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        sample = self._samples[row]
        cells = {**_json_of(sample), "id": sample.key}
        for column in columns:
            ending = _ending_for(column, sample.files)
            if ending is not None:
                content = _bytes_of(sample, ending)
                is_text = ending in ("cls", "txt")
                cells[column] = content.removeprefix(codecs.BOM_UTF8).strip() if is_text else content
        return cells

    def column(self, column: str) -> list[Any]:
        return [sample.key for sample in self._samples] if column == "id" else super().column(column)


class TarConfig(TableConfig):
    """WebDataset: uncompressed tars by path, folder, glob, `{000..012}` or address; never unpacked as a whole."""

    endings: ClassVar[tuple[str, ...]] = (".tar",)
    kind: Literal["tar"] = "tar"

    def load(self, path: str) -> TarTable:
        return TarTable(path)


def shards(path: str) -> list[str]:
    """The tar files that a path stands for; `{000..012}` counts with leading zeros. DataError for none or too many."""
    found = _RANGE.search(path)
    if found is None:
        return find_files(path, TarConfig.endings)
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise DataError(f"{path} counts from {first} to {last}: write the smaller number first")
    before, after, digits = path[: found.start()], path[found.end() :], len(found[1])
    names = [f"{before}{index:0{digits}d}{after}" for index in range(first, last + 1)]
    return [file for name in names for file in find_files(name, TarConfig.endings)]


def _samples(shard: str) -> list[_Sample]:
    """The samples of a shard; the key of a file ends at the first dot of its own name (`a/b.seg.png`: `a/b`)."""
    samples: dict[str, _Sample] = {}
    try:
        with open_binary(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                stem, dot, ending = path.name.partition(".")
                if member.isfile() and stem and dot:
                    key = str(path.parent / stem)
                    sample = samples.setdefault(key, _Sample(shard, key, {}))
                    sample.files[ending.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as a plain tar: {error}") from None
    return list(samples.values())


def _bytes_of(sample: _Sample, ending: str) -> bytes:
    name, limit = f"{sample.key}.{ending}", MAX_BYTES.get(f".{ending}", records.MAX_TEXT_BYTES)
    start, size = sample.files[ending]
    if size > limit:
        raise DataError(f"{name} has {size:,} bytes; the most allowed is {limit:,}: shrink or cut it")
    try:
        with open_binary(sample.shard) as file:
            file.seek(start)
            content = file.read(size)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    if len(content) < size:
        raise DataError(f"{name} is cut off: the tar is incomplete")
    return content


def _json_of(sample: _Sample) -> dict[str, Any]:
    if "json" not in sample.files:
        return {}
    try:
        found = json.loads(_bytes_of(sample, "json"))
    except (ValueError, RecursionError):
        raise DataError(f"{sample.key}.json is not JSON") from None
    return found if isinstance(found, dict) else {}


def _ending_for(column: str, endings: Collection[str]) -> str | None:
    if column in endings:
        return column
    return next((ending for ending in endings if f".{ending}" in _FILLED_BY.get(column, ())), None)


TABLES: tuple[type[TableConfig], ...] = (CsvConfig, JsonlConfig, ParquetConfig, TarConfig)
TABLE_ENDINGS = tuple(ending for config in TABLES for ending in config.endings)


def table_config(path: str) -> TableConfig:
    """The config that reads the table at a path, by its ending (Parquet if the ending says nothing)."""
    fitting = (one for one in TABLES if path.lower().endswith(one.endings))
    config: Callable[..., TableConfig] = next(fitting, ParquetConfig)
    return config(path=path)


def data_config(path: str) -> TableConfig | FolderConfig:
    """The config that reads what is at a path: a table, a folder of Parquet files, tars or media; DataError if none."""
    here = Path(path).expanduser()
    if here.is_dir():
        names = [file.name for file in here.iterdir()]
        for config in (TarConfig, ParquetConfig):
            if any(name.endswith(config.endings) for name in names):
                return config(path=path)
        return FolderConfig(path=path)
    if not (here.exists() or is_remote(path) or path.startswith(EMBEDDED_MARK) or "*" in path):
        raise DataError(f"there is nothing at {path}: check the path")
    return table_config(path)


def load_table(path: str, columns: Sequence[str] | None = None) -> Table:
    """The table at a path with these columns, or all; raises DataError if it cannot be read."""
    table = table_config(path).load(path)
    table.read(table.names if columns is None else columns)
    return table
