"""Folders of images or audio, WebDataset tars, and the reader that fits a path."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from pydantic import Field

from openm6.core.errors import DataError
from openm6.data.parquet import EMBEDDED_MARK, ParquetConfig
from openm6.data.records import (
    AUDIO_ENDINGS,
    IMAGE_ENDINGS,
    MAX_AUDIO_BYTES,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Record,
    as_text,
)
from openm6.data.source import (
    Neighbour,
    Source,
    SourceConfig,
    Split,
    check_index,
    present_split,
    rows_by_hash,
    split_named,
)
from openm6.data.storage import TableFolder, find_files, is_remote, open_binary
from openm6.data.table import ChooseColumns, Table, TableConfig
from openm6.data.text_tables import CsvConfig, JsonlConfig

CAPTION_ENDING = ".txt"


class FolderSource(Source):
    """One record a file: its bytes, the label of its subfolder, the caption beside it."""

    def __init__(self, name: str, root: Path, files: list[Path], config: FolderConfig) -> None:
        self.name = name
        self._root = root
        self._files = files
        self._config = config
        self._open_file = TableFolder(str(root / "any"))  # reads nothing outside the folder, links included

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        file = self._files[check_index(index, len(self))]
        try:
            return self._record(file)
        except DataError as error:
            raise DataError(f"{self.name}, file {file.as_posix()}: {error}") from None

    def _record(self, file: Path) -> Record:
        key, limit = ("image", MAX_IMAGE_BYTES) if is_image(file) else ("audio", MAX_AUDIO_BYTES)
        record: Record = {"id": file.as_posix(), key: self._open_file(file.as_posix(), limit)}
        if not record[key]:
            raise DataError("the file is empty")
        label = label_of(file)
        if self._config.labels and label is not None:
            record["label"] = label
        caption = file.with_suffix(CAPTION_ENDING)
        if self._config.captions and (self._root / caption).is_file():
            text = as_text(self._open_file(caption.as_posix(), MAX_TEXT_BYTES), caption.name)
            if text is not None and text.strip():
                record[f"text_{self._config.language}"] = text.strip()
        return record


def is_image(file: Path) -> bool:
    """Whether a file's ending is that of an image."""
    return file.suffix.lower() in IMAGE_ENDINGS


def split_of(file: Path) -> Split | None:
    """The split that a file's first folder names (`train/…`, `test/…`, `val/…`), if it names one."""
    return split_named(file.parts[0]) if len(file.parts) > 1 else None


def label_of(file: Path) -> str | None:
    """The label of a file: its innermost folder, where that is not the split's."""
    folders = file.parts[1:-1] if split_of(file) is not None else file.parts[:-1]
    return folders[-1] if folders else None


def media_files(root: Path) -> list[Path]:
    """Every image and audio below a folder, relative to it, sorted; hidden files are passed over."""
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        wanted = [name for name in names if name.lower().endswith((*IMAGE_ENDINGS, *AUDIO_ENDINGS))]
        found += [Path(place, name).relative_to(root) for name in wanted if not name.startswith(".")]
    return sorted(found)


class FolderConfig(SourceConfig):
    """A local folder of images or audio clips: `cat/1.jpg`, or `train/cat/1.jpg` and `test/cat/2.jpg`."""

    kind: Literal["folder"] = "folder"
    path: str
    labels: bool = True  # the subfolder's name becomes `label`
    captions: bool = True  # `1.txt` beside `1.jpg` becomes the text
    language: Literal["en", "zh"] = "en"  # of the captions
    test_share: float = Field(
        default=0.1, ge=0.0, le=0.9
    )  # by a stable hash of the name, without train/ and test/
    limit: int | None = Field(default=None, ge=1)

    def open(self, name: str, split: Split, neighbour: Neighbour) -> Source:
        """The files of one split; see SourceConfig.open."""
        root, files = self._files(name)
        return FolderSource(name, root, self._of_split(files, split)[: self.limit], self)

    def open_held_out(self, name: str) -> Source:
        """The files of the folder of the test split (or else of validation), or all where there is none."""
        root, files = self._files(name)
        wanted = present_split("test", {split_of(file) for file in files})
        return FolderSource(name, root, [file for file in files if split_of(file) == wanted] or files, self)

    def _files(self, name: str) -> tuple[Path, list[Path]]:
        root = Path(self.path).expanduser()
        if not root.is_dir():
            raise DataError(f"there is no folder {self.path}: check the path of source {name!r}")
        files = media_files(root)
        if not files:
            endings = " ".join((*IMAGE_ENDINGS, *AUDIO_ENDINGS))
            raise DataError(f"no images or audio clips below {self.path} (looked for {endings})")
        return root, files

    def _of_split(self, files: list[Path], split: Split) -> list[Path]:
        named = [split_of(file) for file in files]
        if "train" in named and ("test" in named or "validation" in named):
            wanted = present_split(split, named)
            return [file for file, side in zip(files, named, strict=True) if side == wanted]
        rows: np.ndarray = rows_by_hash([file.as_posix() for file in files], self.test_share, split)
        return [files[row] for row in rows]


MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class _Part:
    """Where the bytes of one file lie in a shard."""

    start: int
    size: int


@dataclass
class _Sample:
    """The files of one record, by ending."""

    shard: int
    key: str
    parts: dict[str, _Part] = field(default_factory=dict)


class TarTable(Table):
    """Rows are samples; columns are endings of their files (`jpg`, `txt`, `cls`) and keys of their JSON.

    Only the headers are read when it is opened. `image`, `audio`, `text_en` and `label` name whichever image,
    audio, `txt` and `cls` file a sample has.
    """

    def __init__(self, path: str) -> None:
        self.where = path
        self._shards = shards(path)
        self._samples = [sample for number in range(len(self._shards)) for sample in self._index(number)]
        if not self._samples:
            raise DataError(f"{path} holds no files: is it a WebDataset tar?")
        endings = {ending for sample in self._samples for ending in sample.parts}
        keys = self._json_of(self._samples[0]) if "json" in self._samples[0].parts else {}
        self.names = list(dict.fromkeys(["id", *_standing_for(endings), *keys, *sorted(endings)]))

    def __len__(self) -> int:
        return len(self._samples)

    def place(self, row: int) -> str:
        """Where a row is, for a person: its key and shard."""
        sample = self._samples[row]
        return f"sample {sample.key!r} in {self._shards[sample.shard]}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The named columns of one sample; see the class."""
        sample = self._samples[row]
        cells = self._json_of(sample) if "json" in sample.parts else {}
        for column in columns:
            ending = _ending_for(column, sample.parts)
            if ending is not None:
                cells[column] = self._bytes(sample, ending)
            elif column == "id":
                cells.setdefault("id", sample.key)
        return cells

    def column(self, column: str) -> list[Any]:
        """One column of every sample, None where it is absent or cannot be read."""
        if column == "id":
            return [sample.key for sample in self._samples]
        return [self._quiet(row, column) for row in range(len(self))]

    def _quiet(self, row: int, column: str) -> Any:
        try:
            return self.row(row, (column,)).get(column)
        except DataError:
            return None

    def _index(self, number: int) -> list[_Sample]:
        samples: dict[str, _Sample] = {}
        try:
            with open_binary(self._shards[number]) as file, tarfile.open(fileobj=file, mode="r:") as shard:
                for member in shard:
                    key, dot, ending = _split_name(member.name)
                    if member.isfile() and dot:
                        sample = samples.setdefault(key, _Sample(number, key))
                        sample.parts[ending] = _Part(member.offset_data, member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{self._shards[number]} cannot be read as a plain tar: {error}") from None
        return list(samples.values())

    def _bytes(self, sample: _Sample, ending: str) -> bytes:
        part = sample.parts[ending]
        limit = _limit(f".{ending}")
        if part.size > limit:
            raise DataError(
                f"{sample.key}.{ending} has {part.size:,} bytes; the most allowed is {limit:,}: shrink or cut it"
            )
        with open_binary(self._shards[sample.shard]) as file:
            return _read_at(file, part, f"{sample.key}.{ending}")

    def _json_of(self, sample: _Sample) -> dict[str, Any]:
        try:
            found = json.loads(self._bytes(sample, "json"))
        except (ValueError, RecursionError):
            raise DataError(f"{sample.key}.json is not JSON") from None
        return found if isinstance(found, dict) else {}


class TarConfig(TableConfig):
    """WebDataset: uncompressed tars by path, folder, glob, `{000..012}` or address; never unpacked as a whole."""

    kind: Literal["tar"] = "tar"

    def load(self, path: str, choose: ChooseColumns) -> TarTable:
        """The index of the tars."""
        table = TarTable(path)
        choose(table.names)
        return table


def shards(path: str) -> list[str]:
    """The tar files that a path stands for; `{000..012}` counts with leading zeros.

    Raises:
        DataError: nothing is there, or too much.
    """
    found = _RANGE.search(path)
    if found is None:
        return find_files(path, (".tar",))
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_SHARDS:
        raise DataError(f"{path} counts from {first} to {last}: write the smaller number first")
    names = [
        f"{path[: found.start()]}{n:0{len(found[1])}d}{path[found.end() :]}" for n in range(first, last + 1)
    ]
    return [file for name in names for file in find_files(name, (".tar",))]


def _split_name(name: str) -> tuple[str, str, str]:
    """`a/b.seg.png` -> `a/b`, `.`, `seg.png`: the key ends at the first dot of the file's own name."""
    path = PurePosixPath(name)
    stem, dot, ending = path.name.partition(".")
    return str(path.parent / stem), dot if stem else "", ending.lower()


def _standing_for(endings: set[str]) -> list[str]:
    return [key for key in ("image", "audio", "text_en", "label") if _ending_for(key, dict.fromkeys(endings))]


def _ending_for(column: str, parts: Mapping[str, Any]) -> str | None:
    """The file of a sample that fills a column."""
    if column in parts:
        return column
    wanted = {"image": IMAGE_ENDINGS, "audio": AUDIO_ENDINGS, "text_en": (".txt",), "label": (".cls",)}
    return next((ending for ending in parts if f".{ending}" in wanted.get(column, ())), None)


def _limit(ending: str) -> int:
    return (
        MAX_IMAGE_BYTES
        if ending in IMAGE_ENDINGS
        else MAX_AUDIO_BYTES
        if ending in AUDIO_ENDINGS
        else MAX_TEXT_BYTES
    )


def _read_at(file: IO[bytes], part: _Part, name: str) -> bytes:
    try:
        file.seek(part.start)
        content = file.read(part.size)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error}") from None
    if len(content) < part.size:
        raise DataError(f"{name} is cut off: the tar is incomplete")
    return content


TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".tar")


def table_config(path: str) -> TableConfig:
    """The config that reads the table at a path, by its ending (Parquet where the ending says nothing)."""
    name = path.lower()
    if not path.startswith(EMBEDDED_MARK):
        if name.endswith((".csv", ".tsv")):
            return CsvConfig(path=path)
        if name.endswith((".jsonl", ".ndjson")):
            return JsonlConfig(path=path)
        if name.endswith(".tar"):
            return TarConfig(path=path)
    return ParquetConfig(path=path)


def data_config(path: str) -> TableConfig | FolderConfig:
    """The config that reads what is at a path: a table, a folder of Parquet files or tars, or one of media files.

    Raises:
        DataError: nothing is there.
    """
    place = Path(path).expanduser()
    if not place.is_dir():
        if (
            not place.exists()
            and not is_remote(path)
            and not path.startswith(EMBEDDED_MARK)
            and "*" not in path
        ):
            raise DataError(f"there is nothing at {path}: check the path")
        return table_config(path)
    names = [file.name for file in place.iterdir()]
    if any(name.endswith(".tar") for name in names):
        return TarConfig(path=path)
    return (
        ParquetConfig(path=path)
        if any(name.endswith(".parquet") for name in names)
        else FolderConfig(path=path)
    )


def load_table(path: str, choose: ChooseColumns = list) -> Table:
    """The table at a path with the columns that `choose` picks; raises DataError where it cannot be read."""
    return table_config(path).load(path, choose)
