"""Benchmark `gpu`: everything that docs/benchmarks.md lists as not measured on a GPU, in two parts of ten minutes.

Each measurement is a process of its own with a limit. Its JSON is written to a folder, and the rows of the docs are
printed with its numbers, also if a measurement fails or the part is interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from openm6.core.errors import ConfigError
from openm6.core.files import replace_text

Found = dict[str, Any]
Table = list[list[str]]  # the first row is the header

LIMIT = 560.0  # seconds of a part; with the start of Python and the tables it ends within 9.5 minutes
GRACE = 8.0  # seconds that a benchmark has to print what it found after SIGTERM
MEASURED_FRACTION = 0.6  # of the limit of a measurement, after which its benchmark starts no new part
OPEN = "not measured"
BENCHMARKS = (sys.executable, "-m", "benchmarks")
OFFLOAD = (
    "offload", "--width", "4096", "--experts", "64", "--hidden", "2048", "--rows", "32", "--length", "2048",
    "--vocabulary", "16384", "--num-gpu-layers", "auto", "--gradient-accumulation-steps", "8",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One benchmark with its options, and the tables of the docs that its JSON fills.

    fraction: of a part's time; time that the measurements before it left over is divided among those that follow
    limited_by: the option of the benchmark that takes seconds after which it starts no new part
    """

    name: str
    part: int
    words: tuple[str, ...]
    fraction: float
    tables: tuple[Callable[[Found, str], Table], ...]
    limited_by: str | None = "--seconds"


@dataclass(frozen=True)
class Outcome:
    """What a measurement printed, and why it is not whole: None if it is."""

    found: Found
    failure: str | None


def bench_gpu(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the JSON and the tables.")],
    part: Annotated[int, typer.Option("--part", min=1, max=2, help="Which half of the measurements.")] = 1,
    only: Annotated[str | None, typer.Option("--only", metavar="NAME", help="One measurement, with all time.")] = None,
) -> None:
    """Run the open measurements of docs/benchmarks.md on a GPU, and print their rows; a part takes 9.5 minutes.

    \b
    Example: python -m benchmarks gpu --part 1 --out gpu
    """
    chosen = choose(part, only)
    if not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} sees no GPU, and these are the measurements of one")
    out.mkdir(parents=True, exist_ok=True)
    sys.exit(run_part(chosen, out, f"part-{part}" if only is None else only))


def choose(part: int, only: str | None) -> list[Measurement]:
    """Return the measurements of a part, or the one that is called `only`.

    Raises:
        ConfigError: there is no such measurement.
    """
    names = {one.name: one for one in MEASUREMENTS}
    if only is None:
        return [one for one in MEASUREMENTS if one.part == part]
    if only not in names:
        raise ConfigError(f"no measurement {only!r}: choose one of {', '.join(names)}")
    return [names[only]]


def run_part(
    measurements: Sequence[Measurement],
    out: Path,
    name: str,
    limit: float = LIMIT,
    command: Sequence[str] = BENCHMARKS,
) -> int:
    """Measure one after the other, then print the tables and write them to `name`.md; return the exit status."""
    outcomes: dict[str, Outcome] = {}
    for one in measurements:
        (out / f"{one.name}.json").unlink(missing_ok=True)  # of an earlier run
    end, stopped = time.monotonic() + limit, False
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for index, one in enumerate(measurements):
            left = end - time.monotonic()
            own = left * one.fraction / sum(other.fraction for other in measurements[index:])
            outcomes[one.name] = measure(one, out, own, command)
            failure = outcomes[one.name].failure
            sys.stderr.write(f"{one.name}: {failure or 'done'} ({end - time.monotonic():.0f} s left)\n")
    except KeyboardInterrupt:
        stopped = True
        outcomes |= {one.name: Outcome(read(out, one), "stopped") for one in measurements if one.name not in outcomes}
    finally:
        signal.signal(signal.SIGTERM, previous)
    text = tables(measurements, outcomes)
    replace_text(out / f"{name}.md", text)
    sys.stdout.write(text)
    sys.stdout.flush()
    return 130 if stopped else int(any(outcome.failure for outcome in outcomes.values()))


def measure(one: Measurement, out: Path, limit: float, command: Sequence[str]) -> Outcome:
    """Run a benchmark for at most `limit` seconds; its JSON and its log lie in `out`."""
    target, log = out / f"{one.name}.json", out / f"{one.name}.log"
    words = [*command, *one.words, "--json", str(target)]
    if one.limited_by is not None:
        words += [one.limited_by, f"{max(1.0, MEASURED_FRACTION * limit):.0f}"]
    with log.open("w", encoding="utf-8") as file:
        # A session of its own, so that the processes which it starts end with it.
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True)
        try:
            failure = _wait(process, log, limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = read(out, one)
    if failure is None and not found:
        failure = "no JSON was written"
    return Outcome(found, failure or found.get("cut_short"))


def _wait(process: subprocess.Popen[bytes], log: Path, limit: float) -> str | None:
    """Wait for a benchmark, and ask it to print its results so far when the time is over; return how it failed."""
    try:
        code = process.wait(max(0.0, limit - GRACE))
    except subprocess.TimeoutExpired:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"stopped after {limit:.0f} s"
    except KeyboardInterrupt:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        raise
    return f"exit status {code}: {_last_line(log)}" if code else None


def read(out: Path, one: Measurement) -> Found:
    """Return the JSON of a measurement; nothing if it has none."""
    try:
        found = json.loads((out / f"{one.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def tables(measurements: Sequence[Measurement], outcomes: dict[str, Outcome]) -> str:
    """Return the tables of the docs in Markdown, with the GPU, torch and the reason for each gap."""
    devices = [outcome.found["device"] for outcome in outcomes.values() if "device" in outcome.found]
    device = devices[0] if devices else "unknown GPU"
    parts = [f"Measured on one {device} with torch {torch.__version__}.\n"]
    for one in measurements:
        outcome = outcomes[one.name]
        parts.append(f"\n### {one.name}\n\n`python -m benchmarks {' '.join(one.words)}`\n\n")
        parts.append("\n".join(_markdown(table(outcome.found, device)) for table in one.tables))
        note = outcome.found.get("baseline_note")
        parts.append(f"\nBaseline: {note}\n" if note else "")
        parts.append(f"\nNot complete: {outcome.failure}\n" if outcome.failure else "")
    return "".join(parts)


def _markdown(table: Table) -> str:
    header, *rows = ["| " + " | ".join(row) + " |\n" for row in table]
    return "".join([header, "|" + "---|" * len(table[0]) + "\n", *rows])


def number(found: Any, *path: str, form: str = ",.0f", scale: float = 1.0) -> str:
    """Return the number at a path of the JSON as the docs write it; `OPEN` if there is none."""
    value = _at(found, path)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return OPEN
    return format(value * scale, form)


def _at(found: Any, path: Iterable[str]) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def speed_row(found: Found, device: str) -> Table:
    """As in the sections `train` and `experts`: tokens per second of both sides."""
    name = _at(found, ["config", "name"]) or OPEN
    sides = [number(found, who, "tokens_per_second") for who in ("ours", "baseline")]
    header = ["sizes", "machine", "OpenM6, tokens/s", "baseline, tokens/s", "ratio", "libraries"]
    libraries = "; ".join(f"{who}: {library}" for who, library in (_at(found, ["libraries"]) or {}).items())
    return [header, [f"`{name}`", device, *sides, number(found, "ratio", form=".2f"), libraries]]


def step_table(found: Found, device: str) -> Table:
    """Utilization, memory and the parts of a step, for each side."""
    rows = [[device, "OpenM6", "baseline"]]

    def add(title: str, *path: str, form: str = ",.0f", scale: float = 1.0) -> None:
        rows.append([title, *(number(found, who, *path, form=form, scale=scale) for who in ("ours", "baseline"))])

    add("MFU, %", "mfu", form=".1f", scale=100)
    add("memory, GiB", "peak_memory_gib", form=".1f")
    for part in ("expert_products", "routing", "attention", "head_and_loss", "optimizer", "rest"):
        add(f"ms per step: {part.replace('_', ' ')}", "breakdown_ms", part, form=".1f")
    add("ms per step: whole", "step_seconds", "median", form=".1f", scale=1000)
    add("recompilations", "recompilations")
    return rows


def packing_table(found: Found, device: str) -> Table:
    """As in the section `packing`."""
    sides = ("packed", "dense_text")
    quartiles = [_at(found, [side, "quartiles"]) or [None, None] for side in sides]
    speeds = [
        f"{number(found, side, 'tokens_per_second')} ({number({'q': low}, 'q')}, {number({'q': high}, 'q')})"
        for side, (low, high) in zip(sides, quartiles, strict=True)
    ]
    return [
        [f"`python -m benchmarks packing`, {device}", "packed", "dense text"],
        ["tokens/s: median (quartiles)", *speeds],
        ["examples per row", *(number(found, side, "examples_per_row", form=".1f") for side in sides)],
        ["padding, %", *(number(found, side, "padding", form=".1f", scale=100) for side in sides)],
        ["tokens with a loss, %", *(number(found, side, "learned", form=".0f", scale=100) for side in sides)],
        ["ratio", f"{number(found, 'ratio', form='.2f')} (goal 0.9)", ""],
        ["seconds to make a batch, one core", number(found, "packed", "seconds_to_make_a_batch", form=".3f"), ""],
    ]


def offload_table(found: Found, device: str) -> Table:
    """As in the section `offload`, with the limits of the link and of the memory."""
    parts = ", ".join(f"{name} {number(found, 'seconds', name, form='.2f')}" for name in ("compute", "fetch", "update"))
    back = number(found, "seconds", "write_back", form=".2f")
    return [
        ["quantity", device],
        [
            "parameters, billions (active)",
            f"{_billions(found, 'parameters')} ({_billions(found, 'active_parameters')})",
        ],
        ["step", f"{number(found, 'seconds_per_step', form='.2f')} s: {parts}, write-back {back}"],
        ["speed, tokens/s", number(found, "tokens_per_second")],
        ["bytes per parameter", number(found, "bytes_per_parameter", form=".2f")],
        ["layers on the device, of all", f"{number(found, 'sets_on_device')} of {number(found, 'sets')}"],
        ["link, GB/s (maximum)", f"{number(found, 'link_gbps')} ({number(found, 'link_ceiling_gbps')})"],
        ["TFLOP/s, recomputation included", number(found, "tflops_with_recompute")],
        ["memory of the GPU, GiB", number(found, "peak_gpu_gib", form=".1f")],
        ["memory of the host, GiB", number(found, "peak_host_gib", form=".1f")],
        ["energy, J per token", number(found, "joules_per_token", form=".4f")],
        ["energy, % of GPT-3's per token", number(found, "fraction_of_gpt3_joules", form=".2f", scale=100)],
    ]


def _billions(found: Found, key: str) -> str:
    return number(found, key, form=".1f", scale=1e-9)


def serve_table(found: Found, device: str) -> Table:
    """As in the section `serve`: each method with all prompts at once and with arrivals."""
    rows = [
        [
            f"`python -m benchmarks serve`, {device}", "tokens/s, all prompts at once", "OpenM6 relative to it",
            "arriving: first token, median (p95), ms", "arriving: whole answer, median, s",
        ]
    ]  # fmt: skip
    load = found.get("text_under_load")
    for name in [*(found.get("text") or {"openm6": {}})]:
        median, tail = (number(load, name, "first_token_seconds", q, scale=1000) for q in ("p50", "p95"))
        rows.append(
            [
                "OpenM6" if name == "openm6" else name.removeprefix("transformers "),
                number(found, "text", name, "tokens_per_second"),
                "" if name == "openm6" else number(found, "ours_over_each", name, form=".2f"),
                OPEN if OPEN in (median, tail) else f"{median} ({tail})",
                number(load, name, "answer_seconds", "p50", form=".2f"),
            ]
        )
    return rows


def generate_table(found: Found, device: str) -> Table:
    """As in the section `generate`."""
    return [
        [f"`python -m benchmarks generate`, {device}", "seconds"],
        ["masked parallel decoding, 8 steps", number(found, "seconds", "masked_parallel", "median", form=".3f")],
        ["autoregressive decoding", number(found, "seconds", "autoregressive", "median", form=".3f")],
        ["ratio", f"{number(found, 'autoregressive_over_masked', form='.1f')} (goal 10)"],
    ]


def routing_table(found: Found, device: str) -> Table:
    """As in the section `experts`, routing methods."""
    rows = [[f"routing, {device}", "tokens/s", "relative to top-k"]]
    for name in found.get("routings") or {"top_k": {}}:
        speed = number(found, "routings", name, "tokens_per_second")
        rows.append([name.replace("_", " "), speed, number(found, "over_top_k", name, form=".2f")])
    return rows


def fp8_table(found: Found, device: str) -> Table:
    """As in the section `fp8`, with the time."""
    loss = [number(found, "loss", name, form=".3f") for name in ("fp8", "plain")]
    layer = [number(found, "speed", "layer_ms", name, form=".2f") for name in ("bf16", "fp8", "quantising weights")]
    return [
        [f"`python -m benchmarks fp8`, {device}", "result"],
        ["products of a layer, ms: bf16, fp8, quantization of the weights alone", ", ".join(layer)],
        ["whole step in bf16, ms", number(found, "speed", "step_ms", form=".1f")],
        [
            "gain of a step, estimated, %",
            f"{number(found, 'speed', 'estimated_gain', form='.1f', scale=100)} (goal 15)",
        ],
        ["loss, fp8 and without", " and ".join(loss)],
        ["difference of the loss, %", number(found, "loss", "relative_difference", form=".2f", scale=100)],
    ]


def rank_table(found: Found, device: str) -> Table:
    """Time and memory of a step by fraction of offloaded layers."""
    rows = [[f"offloaded, {device}", "seconds per step", "memory of the GPU, GiB", "J per step"]]
    for point in found.get("curve") or [{}]:
        energy = number(point, "joules_per_step")
        offloaded = number(point, "offloaded", form=".0f", scale=100)
        step = number(point, "seconds_per_step", form=".2f")
        rows.append([f"{offloaded} %", step, number(point, "peak_gpu_gib", form=".1f"), energy])
    return rows


MEASUREMENTS = (
    Measurement("train-a", 1, ("train", "--config", "a"), 0.23, (speed_row, step_table)),
    Measurement("train-fine", 1, ("train", "--config", "fine"), 0.22, (speed_row, step_table)),
    Measurement("packing", 1, ("packing",), 0.11, (packing_table,)),
    Measurement(
        "offload-2", 1, (*OFFLOAD, "--layers", "52", "--bytes", "2", "--activation-checkpointing-every", "4"),
        0.22, (offload_table,),
    ),
    Measurement(
        "offload-1", 1, (*OFFLOAD, "--layers", "98", "--bytes", "1", "--activation-checkpointing-every", "7"),
        0.22, (offload_table,),
    ),
    Measurement("serve", 2, ("serve", "--seconds", "15"), 0.40, (serve_table,), limited_by="--limit"),
    Measurement("generate", 2, ("generate",), 0.08, (generate_table,), limited_by=None),
    Measurement("experts", 2, ("experts", "--config", "fine"), 0.08, (speed_row,)),
    Measurement("routings", 2, ("experts", "--compare"), 0.08, (routing_table,)),
    Measurement("fp8", 2, ("fp8", "--config", "a"), 0.16, (fp8_table,)),
    Measurement("rank", 2, ("rank", "--of", "m6-10t", "--ranks", "512"), 0.20, (rank_table,)),
)  # fmt: skip
