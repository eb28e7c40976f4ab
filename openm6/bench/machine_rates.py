"""The ceilings of a machine: products, memory, links, disk, exchange between processes, and watts."""

# Letters: S side of a square product, E experts, D width

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from openm6.base.energy.meter import open_meter
from openm6.bench.measure import Deadline, alternate
from openm6.ops.grouped import grouped_product
from openm6.parallel.crew import Crew, can_fork

MIB = 2**20
SIDES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (512, 1024, 2048, 4096, 8192)}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16, torch.float32)}
EXPERTS = 8
QUIET_SECONDS, BUSY_SECONDS = 2.0, 3.0
RANKS = 2


def product_rates(device: torch.device, deadline: Deadline) -> dict[str, list[tuple[float, float]]]:
    """Operations a second of S × S products, by dtype."""
    found: dict[str, list[tuple[float, float]]] = {}
    for dtype in DTYPES[device.type]:
        for side in SIDES[device.type]:
            left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            seconds = _median(partial(torch.matmul, left, right), deadline, device)
            found.setdefault(str(dtype).removeprefix("torch."), []).append((side, 2 * side**3 / seconds))
    return found


def grouped_rates(device: torch.device, deadline: Deadline) -> dict[str, list[tuple[float, float]]]:
    """The same for one product of each of eight experts, D rows by D × D each."""
    found: dict[str, list[tuple[float, float]]] = {}
    for dtype in DTYPES["cpu"] if device.type == "cpu" else (torch.bfloat16,):
        for side in SIDES[device.type][:4]:
            rows = torch.randn(EXPERTS * side, side, device=device).to(dtype)
            weight = torch.randn(EXPERTS, side, side, device=device).to(dtype)
            counts = torch.full((EXPERTS,), side, device=device)
            call = partial(grouped_product, rows, weight, counts)
            rate = 2 * EXPERTS * side**3 / _median(call, deadline, device)
            found.setdefault(str(dtype).removeprefix("torch."), []).append((side, rate))
    return found


def memory_rates(device: torch.device, deadline: Deadline) -> dict[str, float]:
    """Bytes a second of the device's memory: `read`, and `copy`, where a byte is read and written."""
    source = torch.ones((256 if device.type == "cpu" else 1024) * MIB // 4, device=device)
    target = torch.empty_like(source)
    bytes_ = source.numel() * 4
    return {
        "read": bytes_ / _median(source.sum, deadline, device),
        "copy": 2 * bytes_ / _median(lambda: target.copy_(source), deadline, device),
    }


def link_rates(device: torch.device, deadline: Deadline) -> dict[str, float]:
    """Bytes a second between host and GPU, each way alone and both at once (each way); nothing without a GPU."""
    if device.type != "cuda":
        return {}
    host = [torch.empty(512 * MIB, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    card = [torch.empty(512 * MIB, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def both() -> None:
        for stream, (target, source) in zip(streams, ((card[0], host[0]), (host[1], card[1])), strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    calls: dict[str, Callable[[], object]] = {
        "host_to_device": lambda: card[0].copy_(host[0], non_blocking=True),
        "device_to_host": lambda: host[1].copy_(card[1], non_blocking=True),
        "both_ways": both,
    }
    return {name: 512 * MIB / _median(call, deadline, device) for name, call in calls.items()}


def disk_rates(folder: Path) -> dict[str, float]:
    """Bytes a second of writing a file through to the disk, and of reading it with the cache told to forget it."""
    block, count = os.urandom(8 * MIB), 16
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        began = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        if sys.platform == "linux":  # elsewhere what is read may come from the cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.perf_counter()
        while file.read(8 * MIB):
            pass
        read = time.perf_counter() - began
    return {"write": count * 8 * MIB / written, "read": count * 8 * MIB / read}


def exchange_rates(deadline: Deadline) -> dict[str, float]:
    """Bytes a second that each of two local ranks sends in an all-to-all over gloo; nothing where none can fork."""
    if not can_fork() or deadline.passed:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{folder}/meeting"
        works = [partial(_exchange, rank, address) for rank in range(RANKS)]
        crew = Crew(works)
        try:
            seconds = max(crew.gather())
        finally:
            crew.close()
    return {"ranks": RANKS, "bytes_per_second": 16 * MIB / seconds}


def _exchange(rank: int, address: str, pipe: Connection) -> None:
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    sent = torch.ones(16 * MIB // 4)
    got = torch.empty_like(sent)
    times = []
    for _ in range(6):
        dist.barrier()
        began = time.perf_counter()
        dist.all_to_all_single(got, sent)
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()
    pipe.send(sorted(times[1:])[2])
    pipe.recv()  # until the crew is closed


def watts(device: torch.device) -> tuple[dict[str, float], str]:
    """The draw of the machine at rest and at work, as the meter reads it, and by which counters."""
    gpus = () if device.type == "cpu" else (device.index or 0,)
    side = SIDES[device.type][-1]
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    with open_meter(gpus) as meter:
        with meter.span() as rest:
            time.sleep(QUIET_SECONDS)
        with meter.span() as work:
            until = time.perf_counter() + BUSY_SECONDS
            while time.perf_counter() < until:
                left @ right
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
    return {"idle": rest.joules / rest.seconds, "busy": work.joules / work.seconds}, work.source


def _median(call: Callable[[], object], deadline: Deadline, device: torch.device) -> float:
    return alternate({"it": call}, 5, 1, deadline, device)["it"].median
