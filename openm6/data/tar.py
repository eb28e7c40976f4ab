"""WebDataset tars: the files of one record share a name (`1.jpg`, `1.txt`, `1.json`) inside a tar."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, Literal

from openm6.base.errors import DataError
from openm6.data.folder import AUDIO_ENDINGS, IMAGE_ENDINGS
from openm6.data.records import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from openm6.data.storage import find_files, open_binary
from openm6.data.table import ChooseColumns, Table, TableConfig

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

    Only the headers are read when it is opened. `image`, `audio`, `text_en` and `label` name whichever picture,
    sound, `txt` and `cls` file a sample has.
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
