"""Files and what is in them: writes that a crash leaves old or new, JSON that every parser reads, packaged tables."""

import csv
import errno
import functools
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from io import StringIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from openm6.core.errors import ConfigError, OutputError


def sync(path: Path) -> None:
    """Wait until a file's bytes or a folder's names are on the disk: until then a power cut may undo them."""
    if path.is_dir() and os.name == "nt":  # cannot open folders, and orders renames by itself
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, content: bytes) -> None:
    """Replace the file's content in one step; if that fails, raise OutputError and leave the old content."""
    partial = path.with_name(f".{path.name}.partial")
    with as_output_error(path):
        try:
            partial.write_bytes(content)
            sync(partial)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """As `replace_bytes`, for text, which is written as UTF-8."""
    replace_bytes(path, text.encode("utf-8"))


def append_line(path: Path, line: str) -> None:
    """Add a line of UTF-8 to a file; raise OutputError if that fails."""
    with as_output_error(path), path.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


@contextmanager
def as_output_error(path: Path) -> Iterator[None]:
    """Turn the system's failure to write `path` into one sentence, an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror or error}): {advice_for(error)}") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder to fill, which then gets the name `path`; ConfigError if that is not empty, else an OutputError."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not empty: choose another folder")
    with as_output_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            partial = Path(temporary) / path.name
            partial.mkdir()
            yield partial
            if path.exists():
                path.rmdir()
            partial.rename(path)


def advice_for(error: OSError) -> str:
    """Return what a person may do about a failure to write."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free some space or choose another path" if full else "check its rights or choose another path"


def check_writable(path: Path, option: str) -> None:
    """Raise ConfigError, before any work is done, if `path` is or lacks a folder; `option` is the setting to change."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {folder}; make it first")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder: name a file in it")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return plain data as JSON text, with null for what is not finite."""
    return json.dumps(plain_data(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain_data(value: Any) -> Any:
    """Return a copy that JSON and UTF-8 can hold: NumPy's numbers as Python's, None for NaN and infinities."""
    if isinstance(value, dict):
        return {plain_data(str(key)): plain_data(inner) for key, inner in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become question marks
    if isinstance(value, Sequence):
        return [plain_data(inner) for inner in value]
    if isinstance(value, Real) and not isinstance(value, Integral):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def read_table(name: str) -> list[dict[str, str]]:
    """Return the rows of `core/facts/NAME.csv`, every cell as text; an empty cell means that the fact is not known."""
    text = resources.files("openm6.core").joinpath("facts", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(StringIO(text)))


@functools.cache
def renamed(kind: str) -> dict[str, str]:
    """Return names of version 0.1 with those of now: keys of a config class, or of kind "task" or "option"."""
    return {row["old"]: row["new"] for row in read_table("renamed") if row["kind"] == kind}
