"""Saved evaluations: the results of a run are kept in its folder until its report is written."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openm6.checkpoint.folder import STATE_FILE, latest
from openm6.core.files import replace_text
from openm6.core.log import get_log
from openm6.core.run_folder import RunFolder
from openm6.evaluate.results import EvalReport, Sample, TaskResult
from openm6.evaluate.summary import CARD_FILE
from openm6.modalities.interface import Cuttable, Part
from openm6.modalities.numbers import Histogram, NumberSeries

FILE = "evaluation.json"
REPORTS = ("report.json", "report.html", CARD_FILE)
_TAG = "type"  # of a value that JSON cannot represent


def last_checkpoint(run: RunFolder) -> tuple[Path, bool]:
    """The newest checkpoint of a run, and whether its report is newer."""
    checkpoint = latest(run.path)
    saved = (checkpoint / STATE_FILE).stat().st_mtime_ns
    reports = [run.path / name for name in REPORTS]
    return checkpoint, all(path.is_file() and path.stat().st_mtime_ns >= saved for path in reports)


def save_evaluation(run: RunFolder, report: EvalReport, joules: float) -> None:
    """Write the results with their samples, and the joules of the evaluation.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    content = {"report": _encode(report), "joules": joules}
    replace_text(run.path / FILE, json.dumps(content, allow_nan=False))


def load_evaluation(run: RunFolder, checkpoint: str) -> tuple[EvalReport, float] | None:
    """The saved results of a checkpoint and their joules; None if there are none that can be read."""
    try:
        content = json.loads((run.path / FILE).read_text(encoding="utf-8"))
        report = _decode(content["report"])
        if not isinstance(report, EvalReport) or report.checkpoint != checkpoint:
            return None
        return report, float(content["joules"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        get_log().info(f"{run.path / FILE} cannot be read ({error}): evaluating again")
        return None


def drop_evaluation(run: RunFolder) -> None:
    """Remove the saved results, once the report is written."""
    (run.path / FILE).unlink(missing_ok=True)


_CLASSES = {found.__name__: found for found in (EvalReport, TaskResult, Sample, Part, Cuttable, NumberSeries)}


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_TAG: type(value).__name__, "fields": fields}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "base64": base64.b64encode(value).decode()}
    if isinstance(value, Image.Image):
        return {_TAG: "image", "pixels": _encode(np.asarray(value.convert("RGB")))}
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {_TAG: "array", "npy": base64.b64encode(stream.getvalue()).decode()}
    if isinstance(value, Histogram):
        scale = np.stack([value.loc, value.scale], axis=1)
        return {_TAG: "histogram", "probability": _encode(value.probability), "scale": _encode(scale)}
    if isinstance(value, dict):
        return {_TAG: "dict", "items": [[key, _encode(inner)] for key, inner in value.items()]}
    if isinstance(value, (list, tuple)):
        return {_TAG: type(value).__name__, "items": [_encode(inner) for inner in value]}
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "float", "text": str(value)}
    return value


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value[_TAG]
    if kind in _CLASSES:
        return _CLASSES[kind](**{name: _decode(inner) for name, inner in value["fields"].items()})
    return _DECODERS[kind](value)


_DECODERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bytes": lambda found: base64.b64decode(found["base64"]),
    "image": lambda found: Image.fromarray(_decode(found["pixels"])),
    "array": lambda found: np.load(io.BytesIO(base64.b64decode(found["npy"])), allow_pickle=False),
    "histogram": lambda found: Histogram(_decode(found["probability"]), _decode(found["scale"])),
    "float": lambda found: float(found["text"]),
    "dict": lambda found: {key: _decode(inner) for key, inner in found["items"]},
    "list": lambda found: [_decode(inner) for inner in found["items"]],
    "tuple": lambda found: tuple(_decode(inner) for inner in found["items"]),
}
