"""Write a copy of a run whose weights are the mean of those of several runs of one training.

    python -m tools.mini.average runs/mini-4-first runs/mini-4 --out runs/mini-4-mean
    openm6 train mini-4 --resume --out runs/mini-4-mean

The second command evaluates the mean, and writes its report and its card. All else is that of the last run. The mean of
weights along a training answers about as well as the last of them, and is less sure of what it has memorized
(Izmailov et al., 1803.05407; Wortsman et al., 2109.01903).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from openm6.checkpoint.folder import MODEL_FILE, latest
from openm6.checkpoint.load import open_reader
from openm6.checkpoint.save import write_tensors
from openm6.core.errors import ConfigError
from openm6.core.files import new_folder
from openm6.evaluate.results import FILE, REPORTS


def average(runs: Sequence[Path], out: Path) -> None:
    """Write the last run to a new folder, without its reports, with the mean of the weights of all latest checkpoints.

    Raises:
        CheckpointError: one of them is no run.
        ConfigError: they have other weights, or the folder is not empty.
    """
    checkpoints = [latest(run) for run in runs]
    every = [{name: reader.read(name) for name in reader.names} for reader in map(open_reader, checkpoints)]
    shapes = [{name: (one.shape, one.dtype) for name, one in weights.items()} for weights in every]
    if differing := [run for run, own in zip(runs, shapes, strict=True) if own != shapes[-1]]:
        raise ConfigError(f"{differing[0]} and {runs[-1]} have other weights: name runs of one training")
    if other := [name for name, one in every[-1].items() if not one.is_floating_point()]:
        raise ConfigError(f"{other[0]} of {runs[-1]} has no mean: name runs that are not packed in int8")
    mean = {name: torch.stack([weights[name] for weights in every]).mean(0) for name in every[-1]}
    with new_folder(out) as partial:
        shutil.copytree(runs[-1], partial, ignore=shutil.ignore_patterns(FILE, *REPORTS), dirs_exist_ok=True)
        # Of the same size, which the state of the checkpoint lists.
        write_tensors(partial / checkpoints[-1].relative_to(runs[-1]) / MODEL_FILE, mean)


def main() -> None:
    """Read the command line and write the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="folder of the mean")
    given = parser.parse_args()
    average(given.runs, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
