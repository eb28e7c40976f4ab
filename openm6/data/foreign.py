"""Files that are no table: what they are, by their first bytes or their ending, and what to do with them."""

from __future__ import annotations

from openm6.base.errors import DataError
from openm6.data.folder import AUDIO_ENDINGS, IMAGE_ENDINGS
from openm6.data.storage import open_binary

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
    """Raise DataError if a file is not Parquet: what it is instead, as far as its bytes or its name tell."""
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
