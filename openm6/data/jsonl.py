"""JSON Lines: one object a line, found by its place in the file and parsed when asked for."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from openm6.base.errors import DataError
from openm6.data.foreign import refuse_foreign
from openm6.data.storage import find_files, is_remote, open_binary
from openm6.data.table import ChooseColumns, Table, TableConfig

HEADER_LINES = 200  # the columns are those of the first lines
SCAN_BYTES = 16 << 20


class JsonlTable(Table):
    """Lines of a file (memory-mapped where it is local), each a JSON object; blank lines do not count."""

    def __init__(self, path: str) -> None:
        self.where = path
        self._content = _content(path)
        self._ends = _line_ends(self._content)
        starts = np.concatenate([[0], self._ends + 1])[: len(self._ends)].astype(np.int64)
        filled = [
            bool(self._content[a:b].strip())
            for a, b in zip(starts.tolist(), self._ends.tolist(), strict=True)
        ]
        self._lines = np.flatnonzero(filled)
        self._starts = starts
        if len(self) == 0:
            raise DataError(f"{path} is empty: write one JSON object a line")
        self.names = self._column_names()

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, row: int) -> str:
        """Where a row is, for a person: its line, counted from 1."""
        return f"line {int(self._lines[row]) + 1}"

    def row(self, row: int, columns: Sequence[str]) -> Mapping[str, Any]:
        """The object of one line.

        Raises:
            DataError: not UTF-8, not JSON, or not an object.
        """
        line = self._lines[row]
        text = self._content[int(self._starts[line]) : int(self._ends[line])].removeprefix(b"\xef\xbb\xbf")
        try:
            found = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 at byte {error.start} of the line: save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({str(error)[:80]})") from None
        if not isinstance(found, dict):
            raise DataError("not a JSON object: each line must be {…}")
        return found

    def column(self, column: str) -> list[Any]:
        """One key of every line, None where the line is broken or lacks it."""
        return [self._quiet(row).get(column) for row in range(len(self))]

    def _quiet(self, row: int) -> Mapping[str, Any]:
        try:
            return self.row(row, ())
        except DataError:
            return {}

    def _column_names(self) -> list[str]:
        names = [name for row in range(min(len(self), HEADER_LINES)) for name in self._quiet(row)]
        if not names:
            raise DataError(
                f"{self.where}: none of the first lines is a JSON object: write one object per line, not one array"
            )
        return list(dict.fromkeys(names))


class JsonlConfig(TableConfig):
    """JSON Lines, UTF-8: one object a line."""

    kind: Literal["jsonl"] = "jsonl"

    def load(self, path: str, choose: ChooseColumns) -> JsonlTable:
        """The lines of the file; the columns are not picked apart before a line is read."""
        files = find_files(path, (".jsonl", ".ndjson"))
        if len(files) > 1:
            raise DataError(f"{path} stands for {len(files)} files: name one JSONL file for each source")
        refuse_foreign(files[0])
        table = JsonlTable(files[0])
        choose(table.names)
        return table


def _content(path: str) -> bytes | mmap.mmap:
    with open_binary(path) as file:
        if is_remote(path):
            return file.read()
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            return b""


def _line_ends(content: bytes | mmap.mmap) -> np.ndarray:
    """Offsets of the line breaks, and of the end where the last line has none."""
    ends = []
    for start in range(0, len(content), SCAN_BYTES):
        block = np.frombuffer(content[start : start + SCAN_BYTES], dtype=np.uint8)
        ends.append(np.flatnonzero(block == 10).astype(np.int64) + start)
    if len(content) and content[-1:] != b"\n":
        ends.append(np.array([len(content)], dtype=np.int64))
    return np.concatenate(ends) if ends else np.zeros(0, dtype=np.int64)
