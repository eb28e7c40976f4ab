"""What a person sees while a run goes on: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openm6.base.energy.units import in_joules
from openm6.train.recorder import Line, Sink

MOST = 100  # characters of a plain line
EVERY = 10.0  # seconds between two of them
_NOT_SHOWN = {
    "metering_seconds",
    "seconds",
    "tokens_per_second",
    "learning_rate",
    "grad_norm",
    "joules",
    "joules_per_token",
    "watts",
}  # numbers that are not the job's own


def open_display(name: str, start: int) -> Sink:
    """The display that suits standard error: live in a terminal, one line at a time in a file or a pipe."""
    console = Console(stderr=True)
    return LiveDisplay(name, start, console) if console.is_terminal else PlainDisplay(start)


class PlainDisplay:
    """A line of text for a line of metrics now and then, for all scores, and for the last step."""

    def __init__(self, start: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = Pace(start)
        self._steps: int | None = None
        self._clock = clock
        self._next = clock()

    def step(self, step: int, steps: int | None) -> None:
        self._pace.observe(step)
        self._steps = steps

    def line(self, line: Line) -> None:
        if self._clock() < self._next and line["step"] != self._steps and "evaluation" not in line:
            return
        self._next = self._clock() + EVERY
        sys.stderr.write(describe(line, self._steps, self._pace) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class LiveDisplay:
    """A bar and a table that are redrawn in place."""

    def __init__(self, name: str, start: int, console: Console) -> None:
        self._name = name
        self._pace = Pace(start)
        self._last: Line = {}
        self._scores: Line = {}
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def step(self, step: int, steps: int | None) -> None:
        self._pace.observe(step)
        self._live.update(self._draw(step, steps))

    def line(self, line: Line) -> None:
        if "evaluation" in line:
            self._scores = line
        else:
            self._last = line

    def close(self) -> None:
        self._live.stop()

    def _draw(self, step: int, steps: int | None) -> Group:
        head = Text(f"{self._name}  step {step} of {steps if steps is not None else '…'}  ")
        head.append(self._pace.time_left(step, steps))
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, value in losses(self._last).items():
            table.add_row(name, f"{value:.4f}")
        if self._last:
            table.add_row("tokens/s", f"{self._last['tokens_per_second']:,.0f}")
        if "joules" in self._last:
            table.add_row("energy", energy(self._last))
        if self._last.get("c_v"):
            table.add_row("c_v by layer", " ".join(f"{value:.2f}" for value in self._last["c_v"]))
        for name, value in self._scores.get("evaluation", {}).items():
            table.add_row(f"{name} (step {self._scores['step']})", f"{value:.4g}")
        return Group(head, ProgressBar(total=steps or 1, completed=step if steps else 0, width=60), table)


class Pace:
    """How fast steps go, to tell the time that is left."""

    def __init__(self, start: int) -> None:
        self._start = start
        self._began = time.monotonic()
        self._step = start

    def observe(self, step: int) -> None:
        self._step = step

    def time_left(self, step: int, steps: int | None) -> str:
        """In words, such as `3 min left`."""
        done = self._step - self._start
        if steps is None or done < 1:
            return "measuring the speed"
        seconds = (time.monotonic() - self._began) / done * (steps - step)
        return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"


def losses(line: Line) -> dict[str, float]:
    """The losses and the job's own metrics in a line."""
    return {
        name: value for name, value in line.items() if name not in _NOT_SHOWN and isinstance(value, float)
    }


def energy(line: Line) -> str:
    """Joules so far and the draw of late, such as `12.3 kJ at 41 W (estimate)`."""
    return f"{in_joules(line['joules'])} at {line['watts']:.0f} W ({line['energy_source']})"


def describe(line: Line, steps: int | None, pace: Pace) -> str:
    """One plain sentence for a line of metrics or scores."""
    place = f"step {line['step']}" + (f"/{steps}" if steps is not None else "")
    if "evaluation" in line:
        return "  ".join(
            [place, "scores", *(f"{name} {value:.4g}" for name, value in line["evaluation"].items())]
        )
    named = [f"{name} {value:.4f}" for name, value in losses(line).items()]
    first = [place, *named[:1]]
    last = [f"{line['tokens_per_second']:,.0f} tokens/s", pace.time_left(line["step"], steps)]
    more = [energy(line)] if "joules" in line else []
    if line["c_v"]:
        more.append(f"c_v {sum(line['c_v']) / len(line['c_v']):.2f}")
    # The losses of modalities before energy and balance, as many as fit.
    room = MOST - len("  ".join([*first, *last]))
    fitting = []
    for part in [*named[1:], *more]:
        if len(part) + 2 <= room:
            fitting.append(part)
            room -= len(part) + 2
    fitting_losses = [part for part in fitting if part in named]
    return "  ".join([*first, *fitting_losses, last[0], *fitting[len(fitting_losses) :], last[1]])
