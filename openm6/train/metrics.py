"""Metrics of a run: averages over `log_every` steps, and the loggers that receive them (file, TensorBoard, display)."""

import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
LINE_LENGTH = 100  # characters of a plain line
LINE_SECONDS = 10.0  # seconds between two of them
# Numbers of a line that are not the training task's own, and are shown otherwise or not at all.
_NOT_SHOWN = {"metering_seconds", "seconds", "seconds_beside", "tokens_per_second", "learning_rate", "grad_norm"}
_NOT_SHOWN |= {"joules", "joules_per_token", "watts"}


class Logger:
    """Base class of what receives the metrics of a run; its methods must not change the run."""

    def step(self, step: int, steps: int | None) -> None:
        """Act after every step."""

    def log(self, line: Line) -> None:
        """Log averages over the last steps or, if there is the key `evaluation`, scores."""
        raise NotImplementedError

    def close(self) -> None:
        """Act at the end, also after a failure."""


class MetricAverager:
    """Averages the reports of steps that were not skipped; its state is in checkpoints: a resumed run logs the same."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [sum, count]
        self._tokens = 0
        self._seconds = 0.0

    def add(self, report: StepReport, seconds: float) -> None:
        self._tokens += report.tokens
        self._seconds += seconds
        if not report.applied:
            return
        named = {"loss": report.loss, "grad_norm": report.grad_norm, **report.metrics}
        named |= {f"expert_load_cv {layer}": value for layer, value in enumerate(report.expert_load_cv)}
        named |= {f"dropped {layer}": value for layer, value in enumerate(report.dropped)}
        self.add_numbers(named)

    def add_numbers(self, named: Mapping[str, float]) -> None:
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
        # A copy, as a sharded checkpoint is written while training goes on.
        sums = {name: [*pair] for name, pair in self._sums.items()}
        return {"sums": sums, "tokens": self._tokens, "seconds": self._seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        # A sum that was not finite was saved as null.
        self._sums = {
            name: [math.nan if total is None else total, count] for name, (total, count) in state["sums"].items()
        }
        self._tokens, self._seconds = state["tokens"], state["seconds"]


class MetricsFile(Logger):
    """Appends lines to metrics.jsonl, where numbers that are not finite become null."""

    def __init__(self, run: RunFolder, step: int) -> None:
        """Open the file, without the lines of steps after `step`, which a resumed run will repeat."""
        self._path = run.metrics
        if self._path.exists():
            kept = [line for line in run.read_metrics() if line.get("step", 0) <= step]
            replace_text(self._path, "".join(to_json(line) + "\n" for line in kept))

    def log(self, line: Line) -> None:
        append_line(self._path, to_json(line))


class TensorBoardEvents(Logger):
    """Writes every number of a line as a scalar; a thread writes, and its failure is raised by the next call."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the events from `step` on; later ones of an earlier process are hidden. ImportError: no such package."""
        # An optional package.
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        self._folder = folder
        self._default_hook = default = threading.excepthook

        def hook(failure: threading.ExceptHookArgs) -> None:
            """Keep system errors of the writer's thread off the screen; others go where they went before."""
            from_writer = type(failure.thread).__module__.startswith("tensorboard.")
            if not (from_writer and isinstance(failure.exc_value, OSError)):
                default(failure)

        self._hook = threading.excepthook = hook
        try:
            with as_output_error(folder):
                self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        except BaseException:
            threading.excepthook = default
            raise

    def log(self, line: Line) -> None:
        """Raise OutputError if an earlier line found the disk full."""
        scores = {f"evaluation/{name}": value for name, value in line.get("evaluation", {}).items()}
        with as_output_error(self._folder):
            for name, value in (scores or line).items():
                if isinstance(value, list):
                    for layer, one in enumerate(value):
                        self._writer.add_scalar(f"{name}/{layer}", one, line["step"])
                elif isinstance(value, (int, float)) and name != "step":
                    self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        try:
            with as_output_error(self._folder):
                self._writer.close()
        finally:
            if threading.excepthook is self._hook:
                threading.excepthook = self._default_hook


def open_loggers(run: RunFolder, step: int, tensorboard: bool) -> list[Logger]:
    """Return the file, TensorBoard events if asked for and installed, and the display, which is live in a terminal."""
    loggers: list[Logger] = [MetricsFile(run, step)]
    if tensorboard:
        with suppress(ImportError):
            loggers.append(TensorBoardEvents(run.tensorboard, step))
    console = Console(stderr=True)
    return [*loggers, LiveDisplay(run.name, step, console) if console.is_terminal else PlainDisplay(step)]


class PlainDisplay(Logger):
    """Print a line of metrics now and then, all scores, and the last step."""

    def __init__(self, start: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = Pace(start)
        self._steps: int | None = None
        self._clock = clock
        self._next = clock()

    def step(self, step: int, steps: int | None) -> None:
        self._steps = steps

    def log(self, line: Line) -> None:
        if self._clock() < self._next and line["step"] != self._steps and "evaluation" not in line:
            return
        self._next = self._clock() + LINE_SECONDS
        print(describe(line, self._steps, self._pace), file=sys.stderr, flush=True)


class LiveDisplay(Logger):
    """A bar and a table that are redrawn in place."""

    def __init__(self, name: str, start: int, console: Console) -> None:
        self._name, self._pace = name, Pace(start)
        self._last: Line = {}
        self._scores: Line = {}
        self._live = Live(console=console, refresh_per_second=4, transient=False)
        self._live.start()

    def step(self, step: int, steps: int | None) -> None:
        last, scores = self._last, self._scores
        rows = {name: f"{value:.4f}" for name, value in losses(last).items()}
        if last:
            rows["tokens/s"] = f"{last['tokens_per_second']:,.0f}"
        if "joules" in last:
            rows["energy"] = energy(last)
        if last.get("expert_load_cv"):
            rows["expert load CV by layer"] = " ".join(f"{value:.2f}" for value in last["expert_load_cv"])
        for name, value in scores.get("evaluation", {}).items():
            rows[f"{name} (step {scores['step']})"] = f"{value:.4g}"
        table = Table(box=None, show_header=False, pad_edge=False)
        for row in rows.items():
            table.add_row(*row)
        head = f"{self._name}  step {step} of {steps if steps is not None else '…'}  "
        bar = ProgressBar(total=steps or 1, completed=step if steps else 0, width=60)
        self._live.update(Group(Text(head + self._pace.time_left(step, steps)), bar, table))

    def log(self, line: Line) -> None:
        if "evaluation" in line:
            self._scores = line
        else:
            self._last = line

    def close(self) -> None:
        self._live.stop()


class Pace:
    """The mean time per step since step `start`, to estimate the time that is left."""

    def __init__(self, start: int) -> None:
        self._start, self._began = start, time.monotonic()

    def time_left(self, step: int, steps: int | None) -> str:
        """Return words such as `3 min left`."""
        done = step - self._start
        if steps is None or done < 1:
            return "measuring the speed"
        seconds = (time.monotonic() - self._began) / done * (steps - step)
        return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"


def losses(line: Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in _NOT_SHOWN and isinstance(value, float)}


def energy(line: Line) -> str:
    """Return the joules so far and the recent power, such as `12.3 kJ at 41 W (estimate)`."""
    return f"{in_joules(line['joules'])} at {line['watts']:.0f} W ({line['energy_source']})"


def describe(line: Line, steps: int | None, pace: Pace) -> str:
    position = f"step {line['step']}" + (f"/{steps}" if steps is not None else "")
    if "evaluation" in line:
        scores = [f"{name} {value:.4g}" for name, value in line["evaluation"].items()]
        return "  ".join([position, "scores", *scores])
    named = [f"{name} {value:.4f}" for name, value in losses(line).items()]
    first = [position, *named[:1]]
    last = [f"{line['tokens_per_second']:,.0f} tokens/s", pace.time_left(line["step"], steps)]
    more = [energy(line)] if "joules" in line else []
    if line["expert_load_cv"]:
        more.append(f"load CV {sum(line['expert_load_cv']) / len(line['expert_load_cv']):.2f}")
    # The losses of modalities before energy and balance, as many as fit.
    fitting: list[str] = []
    for part in [*named[1:], *more]:
        if len("  ".join([*first, *last, *fitting, part])) <= LINE_LENGTH:
            fitting.append(part)
    fitting_losses = [part for part in fitting if part in named]
    return "  ".join([*first, *fitting_losses, last[0], *fitting[len(fitting_losses) :], last[1]])
