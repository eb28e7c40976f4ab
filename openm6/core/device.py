"""The hardware of this process: its device, its cores, and its memory."""

import ctypes
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from openm6.core.errors import ConfigError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of settings, from glibc's malloc.h
KEPT = 64 * 2**20  # bytes of free memory on top of the heap that are not returned to the system
PROCESSES = Path("/proc")
CONTROL_GROUP = Path("/sys/fs/cgroup")
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # read when a GPU's memory is first used
MAPS_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of CUDA's driver
ON_HEAP = 32 * 2**20  # blocks up to this size come from the heap, the most that glibc allows


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of this process: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`; else ConfigError.

    Each of several processes of one launch has its own GPU; a process alone takes torch's current one.
    """
    asked = re.fullmatch(r"cuda(?::(\d+))?", name)
    if asked is None and name not in ("auto", "cpu"):
        raise ConfigError(f"no device is called {name!r}: choose auto, cpu, cuda or cuda:N")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"torch {torch.__version__} sees no GPU for {name}: check nvidia-smi, or use cpu")
    # `current_device` starts CUDA, and with it an allocator that reads its settings then.
    index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    # A launcher numbers one process, too.
    rank = os.environ.get("LOCAL_RANK") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if asked is not None and asked[1] is not None:
        if rank is not None:
            raise ConfigError(f"each of several processes has a GPU of its own: use cuda in place of {name}")
        index = int(asked[1])
    elif rank is not None:
        index = int(rank)
    if index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"there is no cuda:{index}: torch sees {count} GPUs here, from cuda:0 on")
    # Batches differ in their numbers of tokens, which would fragment memory in pieces of fixed size.
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS) and _maps_memory(index):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _maps_memory(index: int) -> bool:
    """Whether a GPU maps memory piece by piece, which some virtual GPUs and Windows do not."""
    found = ctypes.c_int()
    with suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(found), MAPS_MEMORY, index)
        return not failed and bool(found.value)
    return False


def check_alive(device: torch.device) -> None:
    """Raise torch.AcceleratorError if a GPU has failed: whatever it is asked from then on fails as well."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def usable_cores() -> int:
    """Return the cores that this process may use, or the time of how many its control groups allow."""
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0))
    for group, is_old in _control_groups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_old else ("cpu.max",)
        quota, period, *_ = [*" ".join(_read(group / name) for name in names).split(), "", ""]
        if quota.isdigit() and period.isdigit():  # not `max`, and not -1
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def keep_freed_memory() -> None:
    """Keep freed memory in this process and its forks (of glibc): to claim it again took 5 ms of a step of 130 ms."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # musl
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(TRIM_THRESHOLD, KEPT)
            mallopt(MMAP_THRESHOLD, ON_HEAP)


def process_memory(key: str, process: str = "self") -> int | None:
    """Return `VmRSS` (now), `VmHWM` (the peak) or the like of a process in bytes; None if Linux does not report it."""
    return _bytes_of(PROCESSES / process / "status", key)


def reset_peak_memory() -> None:
    """Reset the peak of this process, `VmHWM`, if that is permitted."""
    with suppress(OSError):
        (PROCESSES / "self/clear_refs").write_text("5")  # the 5 resets the peak alone (proc(5))


def free_host_bytes() -> float:
    """Return what may still be allocated on the host: by the system's count, and by the limits of control groups."""
    available = _bytes_of(PROCESSES / "meminfo", "MemAvailable")
    left = float("inf") if available is None else float(available)
    for group, is_old in _control_groups("memory"):
        names = ("limit_in_bytes", "usage_in_bytes") if is_old else ("max", "current")
        limit, used = (_read(group / f"memory.{name}").strip() for name in names)
        counts = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        # Part of `used`, but the kernel drops it when memory is asked for.
        cached = float(counts.get("total_inactive_file" if is_old else "inactive_file", 0))
        if limit.isdigit() and used.isdigit():
            left = min(left, float(limit) - float(used) + cached)
    return left


def _control_groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the control groups that this process is in, and whether they are of version 1 (cgroups(7)).

    A container may see its own group as the root, whatever path stands there.
    """
    yield CONTROL_GROUP, False
    yield CONTROL_GROUP / controller, True
    for line in _read(PROCESSES / "self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            if group != Path():
                yield CONTROL_GROUP / (controller if names else "") / group, bool(names)


def _bytes_of(path: Path, key: str) -> int | None:
    """Return the value of a line such as `VmRSS: 1024 kB`."""
    values = [line.split()[1] for line in _read(path).splitlines() if line.startswith(f"{key}:")]
    return int(values[0]) * 1024 if values else None


def _read(path: Path) -> str:
    """Return a file's text; empty on another system, or if the process has just ended."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
