"""Saved evaluations: the results of a run are kept in its folder until its report is written."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
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
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Cuttable, Part
from openm6.modalities.series import NumberSeries

FILE = "evaluation.json"
REPORTS = ("report.json", "report.html", "README.md")  # what `write_report` writes
_TAG = "type"  # of a value that JSON cannot represent


def last_checkpoint(run: RunFolder) -> tuple[Path, bool]:
    """The newest checkpoint of a run, and whether its report is newer."""
    checkpoint = latest(run.path)
    saved = (checkpoint / STATE_FILE).stat().st_mtime_ns
    reports = [run.path / name for name in REPORTS]
    return checkpoint, all(path.is_file() and path.stat().st_mtime_ns >= saved for path in reports)


def save_evaluation(run: RunFolder, report: EvalReport, joules: float) -> None:
    """Write the results with their samples, and the joules of the evaluation; OutputError if that fails."""
    replace_text(run.path / FILE, json.dumps({"report": report, "joules": joules}, default=_encode))


def load_evaluation(run: RunFolder, checkpoint: str) -> tuple[EvalReport, float] | None:
    """The saved results of a checkpoint and their joules; None if there are none that can be read."""
    try:
        content = json.loads((run.path / FILE).read_text(encoding="utf-8"), object_hook=_decode)
        report, joules = content["report"], float(content["joules"])
        return (report, joules) if isinstance(report, EvalReport) and report.checkpoint == checkpoint else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        get_log().info(f"{run.path / FILE} cannot be read ({error}): evaluating again")
        return None


def drop_evaluation(run: RunFolder) -> None:
    """Remove the saved results, once the report is written."""
    (run.path / FILE).unlink(missing_ok=True)


def _encode(value: Any) -> Any:
    """What JSON cannot represent, as a mapping with the name of its type; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {_TAG: type(value).__name__, **fields}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "content": base64.b64encode(value).decode()}
    if isinstance(value, Image.Image):
        return {_TAG: "image", "pixels": np.asarray(value.convert("RGB"))}
    if isinstance(value, np.ndarray):
        stream = io.BytesIO()
        np.save(stream, value, allow_pickle=False)
        return {_TAG: "array", "content": stream.getvalue()}
    if isinstance(value, Histogram):
        scale = np.stack([value.loc, value.scale], axis=1)
        return {_TAG: "Histogram", "probability": value.probability, "scale": scale, "log": value.log}
    return value.item()  # a number of NumPy


_DECODERS: dict[Any, Callable[..., Any]] = {
    **{found.__name__: found for found in (EvalReport, TaskResult, Sample, NumberSeries, Histogram)},
    "Part": lambda modality, raw, options: Part(modality, raw, _options(options)),
    "bytes": lambda content: base64.b64decode(content),
    "image": lambda pixels: Image.fromarray(pixels),
    "array": lambda content: np.load(io.BytesIO(content), allow_pickle=False),
}


def _options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a part with the spans that may be cut, which JSON holds as lists."""
    return options | {"cuttable": [Cuttable(*one) for one in options["cuttable"]]} if "cuttable" in options else options


def _decode(values: dict[str, Any]) -> Any:
    # A column may be called as the tag is, but its values are numbers.
    decoder = _DECODERS.get(values.get(_TAG))
    return values if decoder is None else decoder(**{name: value for name, value in values.items() if name != _TAG})
