"""Files that data comes from, on this machine or behind an fsspec address such as `s3://bucket/key`."""

from __future__ import annotations

import glob
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec

from openm6.base.errors import DataError


def is_remote(path: str) -> bool:
    """Whether a path is an address such as `s3://…` or `https://…`."""
    return "://" in path


def find_files(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files a path stands for, sorted: one file, a glob pattern, or a folder (its files with `suffixes`).

    Raises:
        DataError: nothing is there.
    """
    found = _find_remote(path, suffixes) if is_remote(path) else _find_local(path, suffixes)
    if not found:
        raise DataError(f"nothing to read at {path}: check the path (wanted: {', '.join(suffixes)})")
    return sorted(found)


def _find_local(path: str, suffixes: tuple[str, ...]) -> list[str]:
    place = Path(path).expanduser()
    if place.is_file():
        return [str(place)]
    if place.is_dir():
        return [str(file) for file in place.iterdir() if file.is_file() and file.name.endswith(suffixes)]
    return [file for file in glob.glob(str(place), recursive=True) if Path(file).is_file()]


def _find_remote(path: str, suffixes: tuple[str, ...]) -> list[str]:
    try:
        system, inner = fsspec.core.url_to_fs(path)
        if "*" in inner:
            names = system.glob(inner)
        elif system.isdir(inner):
            names = [name for name in system.ls(inner, detail=False) if name.endswith(suffixes)]
        else:
            names = [inner] if system.exists(inner) else []
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be reached: {error}") from None
    return [system.unstrip_protocol(name) for name in names]


def open_binary(path: str) -> IO[bytes]:
    """An open file, local or remote, for reading bytes; DataError where that fails."""
    try:
        return fsspec.open(path, "rb").open() if is_remote(path) else open(Path(path).expanduser(), "rb")
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from None


def read_bounded(path: str, limit: int) -> bytes:
    """The bytes of a file; DataError where it is larger than `limit` bytes or cannot be read."""
    try:
        with open_binary(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit:,} bytes, the most allowed: shrink or cut it")
    return content


class TableFolder:
    """Opens the files that a table names, relative to the table and never outside its folder."""

    def __init__(self, table_path: str) -> None:
        self.remote = is_remote(table_path)
        self.root = (
            table_path.rpartition("/")[0] if self.remote else str(Path(table_path).expanduser().parent)
        )

    def __call__(self, name: str, limit: int) -> bytes:
        """The bytes of the file `name`.

        Raises:
            DataError: the name leads out of the table's folder, the file is missing or larger than `limit`.
        """
        return read_bounded(self._inside(name), limit)

    def _inside(self, name: str) -> str:
        if "\x00" in name or len(name) > 4096:
            raise DataError("a file name in the table is not a file name: check the column chosen for it")
        if self.remote:
            inner = PurePosixPath(name)
            if is_remote(name) or inner.is_absolute() or ".." in inner.parts:
                raise DataError(f"file name {name!r} leads out of the table's folder {self.root}")
            return f"{self.root}/{inner}"
        root = Path(self.root).resolve()
        path = (root / name).resolve()  # follows links, so that a link cannot lead out either
        if not path.is_relative_to(root):
            raise DataError(f"file name {name!r} leads out of the table's folder {self.root}")
        if not path.is_file():
            raise DataError(f"there is no file {name!r} beside the table in {self.root}")
        return str(path)
