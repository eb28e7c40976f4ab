"""Writing files so that a crash leaves either the old content or the new, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until the file's bytes are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the folder's list of names is on the disk; without this a rename may be lost in a power cut.

    Windows cannot open a folder for this and orders renames by itself, so nothing is done there.
    """
    if os.name != "nt":
        sync_file(path)


def write_synced(path: Path, text: str) -> None:
    """Write `text` as UTF-8 and wait until it is on the disk.

    Raises:
        OSError: the disk is full or the path cannot be written.
    """
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Put `text` in place of the file's content in one step; on failure the old content stays.

    Raises:
        OSError: the disk is full or the path cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_synced(partial, text)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
