"""Files that data comes from, local or remote (`s3://bucket/key`), and files that are no table."""

import os
from pathlib import Path, PurePosixPath
from typing import IO

import fsspec

from openm6.core.errors import DataError
from openm6.data.records import AUDIO_ENDINGS, IMAGE_ENDINGS


def is_remote(path: str) -> bool:
    """Whether a path is an address such as `s3://…` or `https://…`."""
    return "://" in path


def find_files(path: str, endings: tuple[str, ...]) -> list[str]:
    """The files of a path, sorted: a file, a glob, or those of a folder with `endings`; DataError if there are none."""
    remote = is_remote(path)
    own = path if remote else os.path.expanduser(path)
    try:
        system, inner = fsspec.core.url_to_fs(own)
        if system.isfile(inner):
            return [own]
        if system.isdir(inner):
            found = [about for about in system.ls(inner, detail=True) if about["name"].endswith(endings)]
        else:
            found = list(system.glob(inner, detail=True).values())
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be reached: {error}") from None
    names = [about["name"] for about in found if about["type"] != "directory"]
    if not names:
        raise DataError(f"nothing to read at {path}: check the path (expected: {', '.join(endings)})")
    return sorted(map(system.unstrip_protocol, names) if remote else names)


def only_file(path: str, endings: tuple[str, ...], kind: str) -> str:
    """The one file of text that a path stands for; DataError if there are none or several, or it is of another kind."""
    files = find_files(path, endings)
    if len(files) > 1:
        raise DataError(f"{path} stands for {len(files)} files: name one {kind} file for each source")
    # JSON Lines may be compressed.
    if not files[0].lower().endswith(tuple(ending for ending in endings if ending.endswith(".gz"))):
        refuse_foreign(files[0])
    return files[0]


def open_binary(path: str) -> IO[bytes]:
    """An open file, local or remote, for reading bytes; DataError if that fails."""
    try:
        return fsspec.open(path, "rb").open() if is_remote(path) else open(Path(path).expanduser(), "rb")
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from None


NO_FILE_NAME = "a file name in the table is not a file name: check the column chosen for it"


def read_beside(table_path: str, name: str, limit: int) -> bytes:
    """The bytes of a file in the folder of a table that names it; DataError outside, if missing or over `limit`."""
    if "\x00" in name or len(name) > 4096:
        raise DataError(NO_FILE_NAME)
    if is_remote(table_path):
        folder, inner = table_path.rpartition("/")[0], PurePosixPath(name)
        path = f"{folder}/{inner}"
        outside = is_remote(name) or inner.is_absolute() or ".." in inner.parts
    else:
        folder = str(Path(table_path).expanduser().parent)
        try:
            found = Path(folder, name).resolve()  # follows links, so that none can lead out
            is_file = found.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, not text, or links in a circle
            raise DataError(NO_FILE_NAME) from None
        path = str(found)
        outside = not found.is_relative_to(Path(folder).resolve())
        if not outside and not is_file:
            raise DataError(f"there is no file {name!r} beside the table in {folder}")
    if outside:
        raise DataError(f"file name {name!r} leads out of the table's folder {folder}")
    try:
        with open_binary(path) as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit:,} bytes, the most allowed: shrink or cut it")
    return content


_IMAGE = "an image: put images into a folder and read it with kind: folder, or name them in a table"
_AUDIO = "an audio file: put audio files into a folder and read it with kind: folder, or name them in a table"
_ARCHIVE = "an archive: unpack it and name the table or the folder in it"
_COMPRESSED = "compressed: unpack it first"
_TEXT = "a text: call it .csv if it is a table, or write its records as rows of a CSV"
_PICKLE = "a pickle, which may run any code and is never opened: write it as Parquet or CSV"
_JSON = "JSON: write one object per line and call the file .jsonl"
# What a file may be instead of a table: how it begins, how its name ends, and what to do.
_FOREIGN: list[tuple[tuple[bytes, ...], tuple[str, ...], str]] = [
    ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), IMAGE_ENDINGS, _IMAGE),
    ((b"fLaC", b"OggS", b"ID3"), AUDIO_ENDINGS, _AUDIO),
    ((b"%PDF",), (), "a PDF: write its tables or texts into a CSV"),
    # The first bytes are those of the container of .xls.
    ((b"\xd0\xcf\x11\xe0",), (".xlsx", ".xlsm", ".xls", ".ods", ".numbers"), "a spreadsheet: export the sheet as CSV"),
    ((), (".docx", ".odt", ".rtf", ".pptx"), "a document: write its tables or texts into a CSV"),
    ((b"PK\x03\x04", b"7z\xbc\xaf", b"Rar!"), (".zip", ".7z", ".rar"), _ARCHIVE),
    ((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), (".gz", ".tgz", ".bz2", ".xz", ".zst"), _COMPRESSED),
    ((b"SQLite format 3",), (), "a database: export the table as CSV"),
    ((b"\x93NUMPY",), (), "a NumPy array: write it as Parquet or CSV with named columns"),
    ((b"\x89HDF",), (), "an HDF5 file: write its arrays as Parquet or CSV with named columns"),
    ((), (".json", ".geojson"), _JSON),
    ((), (".txt", ".md", ".html", ".xml", ".yaml", ".yml", ".log"), _TEXT),
    ((), (".pkl", ".pickle", ".pt", ".pth"), _PICKLE),
]


def refuse_foreign(path: str, parquet: bool = False) -> None:
    """Raise DataError, with what to do, if a file begins as what is no table or, with `parquet`, no Parquet."""
    with open_binary(path) as file:
        head = file.read(64)
    if parquet and head.startswith(b"PAR1"):
        return
    what = next((what for magic, _, what in _FOREIGN if magic and head.startswith(magic)), None)
    if head.startswith(b"RIFF"):
        what = _IMAGE if head[8:12] == b"WEBP" else _AUDIO
    by_name = next((what for _, endings, what in _FOREIGN if path.lower().endswith(endings)), None)
    if what == _ARCHIVE:  # .xlsx is a ZIP archive, too
        what = by_name or what
    if parquet and what is None:
        what = by_name or (_JSON if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith((b"[", b"{")) else None)
    if what is not None:
        raise DataError(f"{path} is no table but {what}")
    if parquet:
        raise DataError(
            f"{path} is not Parquet: name the file by what it is (.csv, .tsv, .jsonl, .parquet or .tar), or set `kind`"
        )
