"""Files that data comes from, local or remote (`s3://bucket/key`), and files that are no table."""

from __future__ import annotations

import glob
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec

from openm6.core.errors import DataError
from openm6.data.records import AUDIO_ENDINGS, IMAGE_ENDINGS


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
        raise DataError(f"nothing to read at {path}: check the path (expected: {', '.join(suffixes)})")
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


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for a sentence of ours."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


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


_IMAGE = "an image: put images into a folder and read it with kind: folder, or name them in a table"
_AUDIO = "an audio file: put audio files into a folder and read it with kind: folder, or name them in a table"
_SHEET = "a spreadsheet: export the sheet as CSV"
_ARCHIVE = "an archive: unpack it and name the table or the folder in it"
_GZIP = "compressed: unpack it first"
_JSON = "JSON: write one object per line and call the file .jsonl"

_MAGIC = {
    b"\x89PNG": _IMAGE,
    b"\xff\xd8\xff": _IMAGE,
    b"GIF8": _IMAGE,
    b"fLaC": _AUDIO,
    b"OggS": _AUDIO,
    b"ID3": _AUDIO,
    b"%PDF": "a PDF: write its tables or texts into a CSV",
    b"PK\x03\x04": _ARCHIVE,
    b"\xd0\xcf\x11\xe0": _SHEET,  # the container of .xls
    b"7z\xbc\xaf": _ARCHIVE,
    b"Rar!": _ARCHIVE,
    b"\x1f\x8b": _GZIP,
    b"BZh": _GZIP,
    b"\xfd7zXZ": _GZIP,
    b"\x28\xb5\x2f\xfd": _GZIP,
    b"SQLite format 3": "a database: export the table as CSV",
    b"\x93NUMPY": "a NumPy array: write it as Parquet or CSV with named columns",
    b"\x89HDF": "an HDF5 file: write its arrays as Parquet or CSV with named columns",
}
_ENDINGS = {
    IMAGE_ENDINGS: _IMAGE,
    AUDIO_ENDINGS: _AUDIO,
    (".xlsx", ".xlsm", ".xls", ".ods", ".numbers"): _SHEET,
    (".docx", ".odt", ".rtf", ".pptx"): "a document: write its tables or texts into a CSV",
    (".zip", ".7z", ".rar"): _ARCHIVE,
    (".gz", ".tgz", ".bz2", ".xz", ".zst"): _GZIP,
    (".json", ".geojson"): _JSON,
    (
        ".txt",
        ".md",
        ".html",
        ".xml",
        ".yaml",
        ".yml",
        ".log",
    ): "a text: call it .csv if it is a table, or write its records as rows of a CSV",
    (
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
    ): "a pickle, which may run any code and is never opened: write it as Parquet or CSV",
}


def refuse_foreign(path: str) -> None:
    """Raise DataError, with what to do, if the first bytes of a file are those of something that is no table."""
    head = _head(path)
    what = next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)
    if head.startswith(b"RIFF"):
        what = _IMAGE if head[8:12] == b"WEBP" else _AUDIO
    if what == _ARCHIVE:  # .xlsx is a ZIP archive, too
        what = _by_ending(path) or what
    if what is not None:
        raise DataError(f"{path} is no table but {what}")


def refuse_not_parquet(path: str) -> None:
    """Raise DataError if a file is not Parquet: the message names what it is instead, by its bytes or its name."""
    head = _head(path)
    if head.startswith(b"PAR1"):
        return
    refuse_foreign(path)
    what = _by_ending(path) or (
        _JSON if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"[", b"{")) else None
    )
    if what is not None:
        raise DataError(f"{path} is no table but {what}")
    raise DataError(
        f"{path} is not Parquet: name the file by what it is (.csv, .tsv, .jsonl, .parquet or .tar), or set `kind`"
    )


def _by_ending(path: str) -> str | None:
    return next((what for endings, what in _ENDINGS.items() if path.lower().endswith(endings)), None)


def _head(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read(64)
