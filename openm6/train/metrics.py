"""Metrics of a run: averages over `log_every` steps, and the loggers that receive them (file, TensorBoard, display)."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from openm6.core.files import append_line, as_output_error, replace_text, to_json
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import in_joules
from openm6.train.step import StepReport

Line = dict[str, Any]
if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
LINE_LENGTH = 100  # characters of a plain line
LINE_SECONDS = 10.0  # seconds between two of them
_NOT_SHOWN = {
    "metering_seconds",
    "seconds",
    "tokens_per_second",
    "learning_rate",
    "grad_norm",
    "joules",
    "joules_per_token",
    "watts",
}  # numbers that are not the training task's own


class Logger(Protocol):
    """Receives the metrics of a run; its methods must not change the run."""

    def step(self, step: int, steps: int | None) -> None:
        """After every step."""

    def log(self, line: Line) -> None:
        """Log averages over the last steps or, if there is the key `evaluation`, scores."""

    def close(self) -> None:
        """At the end, also after a failure."""


class MetricAverager:
    """Averages the reports of consecutive steps; its state is in checkpoints, so a resumed run logs the same.

    Skipped steps are left out of the averages.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]
        self._tokens = 0
        self._seconds = 0.0

    def add(self, report: StepReport, seconds: float) -> None:
        """Add one step, which took `seconds`."""
        self._tokens += report.tokens
        self._seconds += seconds
        if not report.applied:
            return
        named = {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}
        named |= {f"expert_load_cv {layer}": value for layer, value in enumerate(report.expert_load_cv)}
        named |= {f"dropped {layer}": value for layer, value in enumerate(report.dropped)}
        self.add_numbers(named)

    def add_numbers(self, named: Mapping[str, float]) -> None:
        """Add further numbers of one step."""
        for name, value in named.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += value
            total[1] += 1

    def compute(self) -> Line:
        """Return the averages since the last call, and the speed, and reset them."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        layers = {
            kind: [means.pop(name) for name in list(means) if name.startswith(f"{kind} ")]
            for kind in ("expert_load_cv", "dropped")
        }
        if not any(layers["dropped"]):
            del layers["dropped"]  # dropless routing, by far the usual case
        speed = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._sums, self._tokens, self._seconds = {}, 0, 0.0
        return {**means, **layers, "tokens_per_second": speed}

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "tokens": self._tokens, "seconds": self._seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        # A sum that was not finite was saved as null.
        self._sums = {
            name: [math.nan if total is None else total, count]
            for name, (total, count) in state["sums"].items()
        }
        self._tokens, self._seconds = state["tokens"], state["seconds"]


class MetricsFile:
    """Appends lines to metrics.jsonl, where numbers that are not finite become null."""

    def __init__(self, run: RunFolder, step: int) -> None:
        self._path = run.metrics
        _keep_until(run, step)

    def step(self, step: int, steps: int | None) -> None:
        pass

    def log(self, line: Line) -> None:
        append_line(self._path, to_json(line))

    def close(self) -> None:
        pass


def read_metrics(run: RunFolder) -> list[Line]:
    """Return the lines of a run's metrics.jsonl, without one that a crash cut short."""
    if not run.metrics.exists():
        return []
    lines = []
    for text in run.metrics.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _keep_until(run: RunFolder, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again."""
    if run.metrics.exists():
        kept = [line for line in read_metrics(run) if line.get("step", 0) <= step]
        replace_text(run.metrics, "".join(to_json(line) + "\n" for line in kept))


class WriterErrors:
    """Keeps a failure of the writer's thread off the screen, because its owner gets it with the next call.

    Errors of other threads, and other errors than the system's, go where they went before.
    """

    def __init__(self) -> None:
        self._before = threading.excepthook
        self._hook = self._sift  # a method is a new object each time it is named
        threading.excepthook = self._hook

    def close(self) -> None:
        if threading.excepthook is self._hook:
            threading.excepthook = self._before

    def _sift(self, failure: threading.ExceptHookArgs) -> None:
        writers = type(failure.thread).__module__.startswith("tensorboard.")
        if not (writers and isinstance(failure.exc_value, OSError)):
            self._before(failure)


class TensorBoardEvents:
    """Writes every number of a line as a scalar."""

    def __init__(self, writer: SummaryWriter, folder: Path, errors: WriterErrors) -> None:
        self._writer, self._folder, self._errors = writer, folder, errors

    def step(self, step: int, steps: int | None) -> None:
        pass

    def log(self, line: Line) -> None:
        """Raises OutputError where an earlier line found the disk full: events are written by a thread."""
        with as_output_error(self._folder):
            self._add(line)

    def _add(self, line: Line) -> None:
        scores = line.get("evaluation")
        numbers = (
            {f"evaluation/{name}": value for name, value in scores.items()} if scores is not None else line
        )
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, line["step"])
        for name in ("expert_load_cv", "dropped"):
            for layer, value in enumerate(line.get(name, [])):
                self._writer.add_scalar(f"{name}/{layer}", value, line["step"])

    def close(self) -> None:
        try:
            with as_output_error(self._folder):
                self._writer.close()
        finally:
            self._errors.close()


def open_tensorboard(run: RunFolder, step: int) -> TensorBoardEvents | None:
    """Events from `step` on, hiding later ones of an earlier try; None where the package is not installed.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional package
    except ImportError:
        return None
    errors = WriterErrors()
    try:
        with as_output_error(run.tensorboard):
            writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
    except BaseException:
        errors.close()
        raise
    return TensorBoardEvents(writer, run.tensorboard, errors)


def open_display(name: str, start: int) -> Logger:
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

    def log(self, line: Line) -> None:
        if self._clock() < self._next and line["step"] != self._steps and "evaluation" not in line:
            return
        self._next = self._clock() + LINE_SECONDS
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

    def log(self, line: Line) -> None:
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
        if self._last.get("expert_load_cv"):
            table.add_row(
                "expert load CV by layer", " ".join(f"{value:.2f}" for value in self._last["expert_load_cv"])
            )
        for name, value in self._scores.get("evaluation", {}).items():
            table.add_row(f"{name} (step {self._scores['step']})", f"{value:.4g}")
        return Group(head, ProgressBar(total=steps or 1, completed=step if steps else 0, width=60), table)


class Pace:
    """The speed of steps, to estimate the time that is left."""

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
    """The losses and the training task's own metrics in a line."""
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
    if line["expert_load_cv"]:
        more.append(f"load CV {sum(line['expert_load_cv']) / len(line['expert_load_cv']):.2f}")
    # The losses of modalities before energy and balance, as many as fit.
    remaining = LINE_LENGTH - len("  ".join([*first, *last]))
    fitting = []
    for part in [*named[1:], *more]:
        if len(part) + 2 <= remaining:
            fitting.append(part)
            remaining -= len(part) + 2
    fitting_losses = [part for part in fitting if part in named]
    return "  ".join([*first, *fitting_losses, last[0], *fitting[len(fitting_losses) :], last[1]])
