"""The folder of one run: paths of its settings, metrics, checkpoints and reports."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import yaml

from openm6.core.config import read_yaml
from openm6.core.errors import TrainingError
from openm6.core.files import as_output_error, replace_text

_locked: set[int] = set()  # descriptors of the folders that this process has locked


def _close_locked() -> None:
    """Leave the locks to the parent: held by a worker, they would outlive a parent that was killed."""
    while _locked:
        os.close(_locked.pop())


if os.name != "nt":  # Windows forks no processes
    os.register_at_fork(after_in_child=_close_locked)


class RunFolder:
    """Paths inside a run's folder; `RunFolder.open` makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self.config, self.metrics = path / "config.yaml", path / "metrics.jsonl"
        self.checkpoints, self.quarantine = path / "checkpoints", path / "quarantine.jsonl"
        self.tensorboard = path / "tensorboard"

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Return the run at `path`; make its folder if it does not exist yet, or raise OutputError."""
        folder = Path(path)
        with as_output_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Refuse every other training here, at most until this process ends; TrainingError if there is one.

        Reading and writing stay free. A file system without locks refuses nothing.
        """
        with ExitStack() as stack:
            try:
                # Windows has none.
                import fcntl  # noqa: PLC0415

                # The folder itself is locked: a file for it would stay behind.
                descriptor = os.open(self.path, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                stack.callback(_locked.discard, descriptor)
                _locked.add(descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"{self.path} is being trained by another process: wait for its end, or choose another folder"
                ) from None
            except (ImportError, OSError):
                pass
            yield

    @property
    def started(self) -> bool:
        """Whether a training has started here: there are settings or checkpoints."""
        return self.config.is_file() or self.checkpoints.is_dir()

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, without one that a crash cut short; none if there is no such file."""
        lines = []
        if self.metrics.exists():
            for text in self.metrics.read_text(encoding="utf-8", errors="replace").split("\n"):
                with suppress(ValueError):
                    lines.append(json.loads(text))
        return [line for line in lines if isinstance(line, dict)]

    def read_config(self) -> dict[str, Any]:
        """Return the settings the run was started with; empty if none were written yet."""
        return read_yaml(self.config) if self.config.exists() else {}

    def write_config(self, values: dict[str, Any]) -> None:
        replace_text(self.config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def set_config(self, section: str, key: str, value: Any) -> None:
        """Change one setting of one section in config.yaml and leave the rest as it is."""
        values = self.read_config()
        values[section] = {**values.get(section, {}), key: value}
        self.write_config(values)
