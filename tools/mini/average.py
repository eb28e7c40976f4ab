"""Write the mean of the weights of several checkpoints of one training as a model.

    python -m tools.mini.average runs/mini-4-first runs/mini-4 --out runs/mini-4-mean

All else is that of the last one. The mean of weights along a training answers about as well as the last of them, and
is less sure of what it has memorized (Izmailov et al., 1803.05407; Wortsman et al., 2109.01903).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from openm6.api.model import load
from openm6.core.errors import ConfigError


@torch.no_grad()
def average(runs: Sequence[Path], out: Path) -> None:
    """Write the mean of the weights of runs or checkpoints to a new folder.

    Raises:
        CheckpointError: one of them is no run.
        ConfigError: they have other weights, or the folder is not empty.
    """
    models = [load(run, device="cpu") for run in runs]
    every = [dict(model.loaded.omni.named_parameters()) for model in models]
    shapes = [{name: one.shape for name, one in weights.items()} for weights in every]
    if differing := [run for run, own in zip(runs, shapes, strict=True) if own != shapes[-1]]:
        raise ConfigError(f"{differing[0]} and {runs[-1]} have other weights: name checkpoints of one training")
    for name, parameter in every[-1].items():
        parameter.copy_(torch.stack([weights[name] for weights in every]).mean(0))
    models[-1].save_pretrained(out)


def main() -> None:
    """Read the command line and write the mean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs or checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the mean")
    given = parser.parse_args()
    average(given.runs, given.out)
    print(f"wrote {given.out}")


if __name__ == "__main__":
    main()
