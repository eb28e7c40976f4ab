"""A folder of pictures or sounds: the subfolder is the label, a text file of the same name the caption."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from openm6.base.errors import DataError
from openm6.data.records import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Record, as_text
from openm6.data.source import Neighbour, Source, SourceConfig, Split, check_index
from openm6.data.split import present_split, rows_by_hash, split_named
from openm6.data.storage import TableFolder

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
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
    """Whether a file's ending is that of a picture."""
    return file.suffix.lower() in IMAGE_ENDINGS


def split_of(file: Path) -> Split | None:
    """The split that a file's first folder names (`train/…`, `test/…`, `val/…`), if it names one."""
    return split_named(file.parts[0]) if len(file.parts) > 1 else None


def label_of(file: Path) -> str | None:
    """The label of a file: its innermost folder, where that is not the split's."""
    folders = file.parts[1:-1] if split_of(file) is not None else file.parts[:-1]
    return folders[-1] if folders else None


def media_files(root: Path) -> list[Path]:
    """Every picture and sound below a folder, relative to it, sorted; hidden files are passed over."""
    found = []
    for place, folders, names in os.walk(root):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        wanted = [name for name in names if name.lower().endswith((*IMAGE_ENDINGS, *AUDIO_ENDINGS))]
        found += [Path(place, name).relative_to(root) for name in wanted if not name.startswith(".")]
    return sorted(found)


class FolderConfig(SourceConfig):
    """A local folder of pictures or sounds: `cat/1.jpg`, or `train/cat/1.jpg` and `test/cat/2.jpg`."""

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
            raise DataError(f"no pictures or sounds below {self.path} (looked for {endings})")
        return root, files

    def _of_split(self, files: list[Path], split: Split) -> list[Path]:
        named = [split_of(file) for file in files]
        if "train" in named and ("test" in named or "validation" in named):
            wanted = present_split(split, named)
            return [file for file, side in zip(files, named, strict=True) if side == wanted]
        rows: np.ndarray = rows_by_hash([file.as_posix() for file in files], self.test_share, split)
        return [files[row] for row in rows]
