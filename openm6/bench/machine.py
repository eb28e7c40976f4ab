"""`openm6 bench machine`: the ceilings of this machine, kept for the planner."""

from __future__ import annotations

import datetime
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch

from openm6.base.device import own_device
from openm6.base.log import get_log
from openm6.bench.anchors import anchor, run_anchors
from openm6.bench.fitting import fit_parts
from openm6.bench.machine_rates import (
    disk_rates,
    exchange_rates,
    grouped_rates,
    link_rates,
    memory_rates,
    product_rates,
    watts,
)
from openm6.bench.measure import Deadline, device_name
from openm6.bench.probe import TEXT_ONLY
from openm6.bench.real_batches import first_batches, open_job, read_data
from openm6.bench.report import Report
from openm6.bench.training_parts import measure_parts, seatings
from openm6.modalities.interface import Adapter
from openm6.plan.ceilings import Ceilings, Curve, TrainingRates, Way, write_ceilings
from openm6.plan.hardware import GIB
from openm6.train.multimodal import MultimodalJob

SECONDS, ALL_SECONDS = 240.0, 440.0  # for parts and rates, and with the anchors
TEAM_ROWS, ALONE_ROWS = (1, 4), (2, 5)  # of all kinds, for each process
TEXT_ROWS = 2


def bench_machine(json_path: Path | None) -> None:
    """Measure, keep and print the ceilings of this machine."""
    with Report(json_path, ALL_SECONDS) as report:
        ceilings = measure_machine(Deadline(SECONDS), report.deadline)
        path = write_ceilings(ceilings)
        get_log().info(f"kept for openm6 plan in {path}")
        report.update(ceilings.model_dump(mode="json"))


def measure_machine(deadline: Deadline, last: Deadline) -> Ceilings:
    """All ceilings, tied to short runs as far as they come to an end before the `last` deadline."""
    training, exchange = measure_training(deadline)
    device = own_device()
    gpu = device.type == "cuda"
    draw, source = watts(device)
    ceilings = Ceilings(
        machine=f"{device_name(device)}, {platform.machine()}",
        taken=datetime.date.today().isoformat(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(device) if gpu else None,
        memory_bytes=_memory(device),
        host_bytes=_memory(torch.device("cpu")),
        products={
            name: Curve(points=tuple(found)) for name, found in product_rates(device, deadline).items()
        },
        grouped={name: Curve(points=tuple(found)) for name, found in grouped_rates(device, deadline).items()},
        memory=memory_rates(device, deadline),
        links=link_rates(device, deadline),
        disk=disk_rates(Path.cwd()),
        all_to_all=exchange,
        watts=draw,
        watts_source=source,
        training=training,
    )
    return anchor(ceilings, run_anchors(ceilings, last))


def measure_training(deadline: Deadline) -> tuple[TrainingRates, dict[str, float]]:
    """Parts of a model in both ways, and, between them, the exchange of local ranks: processes are forked before this
    one starts threads.
    """
    seats = seatings()
    torch.set_num_threads(1)
    processes = seats["team"].processes
    job = open_job([])
    adapters = partial(_adapters, job)
    data = read_data(job, processes)
    few, many, texts = (
        job.split(first_batches([f"packing.rows={rows * processes}", *words], 1)[0], processes)[0]
        for rows, words in ((TEAM_ROWS[0], []), (TEAM_ROWS[1], []), (TEXT_ROWS, [*TEXT_ONLY]))
    )
    team = measure_parts(seats["team"], [few, many, texts], adapters, deadline)
    exchange = exchange_rates(deadline)
    whole = [
        first_batches([f"packing.rows={rows}", *words], 1)[0]
        for rows, words in ((ALONE_ROWS[0], []), (ALONE_ROWS[1], []), (2 * TEXT_ROWS, [*TEXT_ONLY]))
    ]
    alone = measure_parts(seats["alone"], whole, adapters, deadline)
    rates = TrainingRates(
        team=Way(processes=processes, parts=fit_parts(team)),
        alone=Way(processes=1, parts=fit_parts(alone)),
        examples=data.facts,
        fill=data.fill,
        token=data.token,
        memories=data.memories,
    )
    return rates, exchange


def _adapters(job: MultimodalJob, width: int) -> dict[str, Adapter]:
    """New adapters of all kinds."""
    return {
        name: adapter
        for modality in job.modalities.values()
        for name, adapter in modality.adapters(width).items()
    }


def _memory(device: torch.device) -> float:
    """Bytes of the device, for a processor those of the machine."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    pages: dict[str, Any] = {}
    try:
        text = Path("/proc/meminfo").read_text()
        pages = dict(line.split(":", 1) for line in text.splitlines())
        return float(pages["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8.0 * GIB
