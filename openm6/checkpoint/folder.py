"""Finding, checking and clearing away the `step-N` folders of a run."""

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from openm6.core.errors import CheckpointError
from openm6.core.log import get_log

STATE_FILE = "state.json"
SHIPPED = Path(__file__).parents[1] / "shipped"  # models of the package
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINING_FILE = "training.safetensors"
PREDICTORS_FILE = "predictors.safetensors"  # of the columns of tables, see modalities/simple_predictors.py
INDEX_FILE = f"{MODEL_FILE}.index.json"
SEPARATOR = "::"  # between a parameter's name and the name of one of the tensors kept with it
EXPONENT = "exponent"  # of int8 weights, kept with them
_STEP_NAME = re.compile(r"step-(\d+)")


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step}"


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where it is written before it gets its name; never looked at by a reader."""
    return checkpoints / f".step-{step}.partial"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name; raise CheckpointError if that is not `step-N`."""
    match = _STEP_NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint: its name must be step-N")
    return int(match.group(1))


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON state of one checkpoint; raise CheckpointError if it, or a file that it lists, is missing or damaged."""
    path = folder / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {STATE_FILE}, so it is incomplete: use an earlier step-N") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): use an earlier step-N") from None
    sizes = state.get("files") if isinstance(state, dict) else None
    if not isinstance(sizes, dict):
        raise CheckpointError(f"{path} is not the state of a checkpoint: use an earlier step-N")
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(f"{file} is missing or cut short (expected {size} bytes): use an earlier step-N")
    return state


def _step_folders(checkpoints: Path) -> list[Path]:
    return sorted((one for one in checkpoints.glob("step-*") if _STEP_NAME.fullmatch(one.name)), key=step_of)


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a run's `checkpoints` folder, oldest step first."""
    complete = []
    for folder in _step_folders(checkpoints):
        with suppress(CheckpointError):
            read_state(folder)
            complete.append(folder)
    return complete


def refuse_damaged(checkpoints: Path) -> None:
    """Raises CheckpointError where there are checkpoints and none is whole: what lacks is named."""
    folders = _step_folders(checkpoints)
    if folders and not list_checkpoints(checkpoints):
        read_state(folders[-1])


def latest(path: Path | str) -> Path:
    """The newest complete checkpoint of a run's or its `checkpoints` folder, or `path` itself; else CheckpointError."""
    given = Path(path)
    if not given.exists():
        raise CheckpointError(f"there is no run or checkpoint at {given}: check the path")
    inner = given / "checkpoints"
    # A checkpoint that was copied from its run has any name, and a run may be called step-2.
    if (given / STATE_FILE).is_file() or (_STEP_NAME.fullmatch(given.name) and not inner.is_dir()):
        read_state(given)
        return given
    found = list_checkpoints(inner if inner.is_dir() else given)
    if not found:
        raise CheckpointError(f"{given} holds no complete checkpoint yet: train it first, or name another run")
    return found[-1]


def prune(checkpoints: Path, keep: int, kept: int | None = None) -> None:
    """Remove all but the last `keep` complete checkpoints, and that of the step `kept`."""
    for folder in list_checkpoints(checkpoints)[:-keep]:
        if step_of(folder) != kept:
            remove(folder)


def leftovers(checkpoints: Path, step: int) -> list[Path]:
    """What killed saves and removals have left: partial folders, and those of steps before `step` without a state."""
    halves = [one for one in _step_folders(checkpoints) if step_of(one) < step and not (one / STATE_FILE).exists()]
    return [*checkpoints.glob(".step-*.partial"), *halves]


def remove(folder: Path) -> None:
    """Remove what is no longer needed; a failure is only a warning, as it does the new checkpoint no harm."""
    try:
        # Without its state a folder counts as incomplete: a crash half way through the removal does no harm.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        get_log().warning(f"{folder} could not be removed ({error.strerror or error}): remove it by hand")
