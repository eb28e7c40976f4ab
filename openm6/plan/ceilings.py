"""What `openm6 bench machine` measured of this machine, kept in a file of the user's cache for the planner."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path

from openm6.base.config import Config, build
from openm6.base.errors import ConfigError
from openm6.base.files import replace_text
from openm6.plan.cost import Cost
from openm6.plan.examples import ExampleFacts

FORMAT = 3


class Curve(Config):
    """Operations a second by size, from a few measured points; between them on the logarithm of the size."""

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The rate at `size`; outside of what was measured, that of the nearest point."""
        points = sorted(self.points)
        if size <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if size <= right:
                share = math.log(size / left) / math.log(right / left)
                return low + share * (high - low)
        return points[-1][1]


class Way(Config):
    """How fast whole parts of a model train in one way of sharing the cores, forward and backward.

    processes: that share a step; parts: seconds of a part in one of them, all at work at once.
    A few short runs anchor the sums: a step takes `stretch` times the parts' time, `step` seconds and `code` for each
    learned token that is no text, and draws `watts`; a run takes `process` bytes, `gap` times the bytes that its parts
    account for, `word_bytes` and `code_bytes` for each learned token of text and of all else, and `expert_bytes` for
    each process where there are experts: kernels of products, which come for each number of rows.
    """

    processes: int
    parts: dict[str, Cost]
    step: float = 0.0
    stretch: float = 1.0
    code: float = 0.0
    watts: float | None = None
    process: float = 0.0
    gap: float = 1.0
    word_bytes: float = 0.0
    code_bytes: float = 0.0
    expert_bytes: float = 0.0


class TrainingRates(Config):
    """What training takes on this machine: `team`, where as many processes as cores share a step, and `alone`, where
    one uses them all, as streamed weights need it.

    examples: what one example of each task brings; fill: share of the places in rows that hold a token; token: seconds
    of packing, a token; memories: bytes that each memory of codes holds at most.
    """

    team: Way
    alone: Way
    examples: tuple[ExampleFacts, ...]
    fill: float = 1.0
    token: float = 0.0
    memories: dict[str, float] = {}


class Ceilings(Config):
    """Rates of one machine. Rates by dtype are operations a second by side of a square product, in bytes a second else.

    gpu: its name, None without one; memory_bytes: of the GPU, or else of the machine, as host_bytes.

    watts: `idle` and `busy` as the meter reads them; watts_source: by which counter.
    """

    format: int = FORMAT
    machine: str
    taken: str
    threads: int
    gpu: str | None = None
    memory_bytes: float
    host_bytes: float | None = None
    products: dict[str, Curve]
    grouped: dict[str, Curve]
    memory: dict[str, float]
    links: dict[str, float] = {}
    disk: dict[str, float] = {}
    all_to_all: dict[str, float] = {}
    watts: dict[str, float]
    watts_source: str
    training: TrainingRates


def ceilings_path() -> Path:
    """Where they are kept: `OPENM6_CACHE`, else openm6 in the user's cache folder."""
    named = os.environ.get("OPENM6_CACHE")
    if named:
        return Path(named) / "machine.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openm6" / "machine.json"


def write_ceilings(ceilings: Ceilings) -> Path:
    """Keep them for later plans.

    Raises:
        OutputError: the folder cannot be written.
    """
    path = ceilings_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(ceilings.model_dump(mode="json"), indent=1) + "\n")
    return path


def read_ceilings() -> Ceilings:
    """What was measured here.

    Raises:
        ConfigError: nothing was, or by another version.
    """
    path = ceilings_path()
    if not path.is_file():
        raise ConfigError(
            "this machine was not measured yet: run openm6 bench machine once, or name a GPU of the table with --gpu"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConfigError(f"{path} is damaged or of another version: run openm6 bench machine again")
    return build(Ceilings, values, str(path))
