"""One rule for the device of a process, with the number of its GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openm6.core import device
from openm6.core.device import free_host_bytes, process_memory, resolve_device, usable_cores
from openm6.core.errors import ConfigError
from tests.devices import needs_gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine of eight GPUs, as far as torch is asked; what was made the current one is kept."""
    current = [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return current


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert resolve_device() == torch.device("cpu")


def test_a_process_alone_takes_the_current_gpu_by_its_number(eight_gpus):
    assert resolve_device() == torch.device("cuda", 3)
    assert eight_gpus[-1] == 3


def test_the_allocator_is_set_before_cuda_starts(eight_gpus, monkeypatch):
    def start():
        raise AssertionError("CUDA starts here, and its allocator reads its settings")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", start)
    assert resolve_device() == torch.device("cuda", 0)


def test_each_launched_process_has_a_gpu_of_its_own(eight_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resolve_device() == torch.device("cuda", 5)
    assert eight_gpus[-1] == 5


def test_a_process_that_was_launched_alone_chooses_its_gpu(eight_gpus, monkeypatch):
    """torch's launcher, which starts it again after a failure, numbers it, too."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)


def test_a_device_by_name(eight_gpus, monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cuda:6") == torch.device("cuda", 6) and eight_gpus[-1] == 6
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert resolve_device("cuda") == torch.device("cuda", 5)
    with pytest.raises(ConfigError, match="use cuda in place of cuda:6"):
        resolve_device("cuda:6")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "mps", "", "CPU", "cuda:0,1"])
def test_a_device_of_another_name(name):
    with pytest.raises(ConfigError, match=f"no device is called '{name}': choose auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there(eight_gpus, monkeypatch):
    with pytest.raises(ConfigError, match="no cuda:8: torch sees 8 GPUs"):
        resolve_device("cuda:8")
    monkeypatch.setenv("LOCAL_RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ConfigError, match="no cuda:9: torch sees 8 GPUs"):
        resolve_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="sees no GPU for cuda: check nvidia-smi, or use cpu"):
        resolve_device("cuda")


def test_only_one_file_asks_for_the_device():
    """A device without a number is whatever card comes first to NVML, `mem_get_info` and the like."""
    asking = {
        path.relative_to(ROOT).as_posix()
        for folder in ("openm6", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if "cuda.is_available" in path.read_text(encoding="utf-8")
    }
    # The server's replicas only count the GPUs that each is to be given, without opening one.
    assert asking == {"openm6/core/device.py", "openm6/serve/replicas.py"}


def test_only_the_probe_looks_for_triton_and_for_the_kind_of_gpu():
    """Whether kernels run is found by one trial; a package that is installed need not work."""
    for word in ('"triton"', "get_device_capability"):
        asking = [
            path.relative_to(ROOT).as_posix()
            for folder in ("openm6", "tools")
            for path in (ROOT / folder).rglob("*.py")
            if word in path.read_text(encoding="utf-8")
        ]
        assert asking == ["openm6/kernels/probe.py"], word


@pytest.mark.parametrize(
    ("given", "maps", "expected"),
    [({}, True, "expandable_segments:True"), ({}, False, None), ({"PYTORCH_CUDA_ALLOC_CONF": "a:b"}, True, None)],
)
def test_memory_of_a_gpu_grows_in_place(eight_gpus, monkeypatch, given, maps, expected):
    monkeypatch.setattr(device, "_maps_memory", lambda index: maps)
    monkeypatch.setattr(os, "environ", dict(given))
    resolve_device("cpu")
    assert os.environ == given
    resolve_device("cuda:6")
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected and os.environ.items() >= given.items()


@needs_gpu
def test_memory_of_this_gpu_grows_in_place():
    code = (
        "import torch; from openm6.core.device import _maps_memory, resolve_device; device = resolve_device(); "
        "kept = torch.ones(9, device=device); "
        "print(_maps_memory(device.index) == any(one['is_expandable'] for one in torch.cuda.memory_snapshot()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in device.ALLOCATOR_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_memory_is_read_from_the_system(tmp_path, monkeypatch):
    assert 0 < free_host_bytes() < 2**50
    for folder in ("self", "group"):
        (tmp_path / folder).mkdir()
    (tmp_path / "self/status").write_text("Name:\tpython\nVmRSS:\t  2048 kB\n")
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    (tmp_path / "group/memory.max").write_text("max\n")
    (tmp_path / "group/memory.current").write_text("1000\n")
    monkeypatch.setattr(device, "PROCESSES", tmp_path)
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path / "group")
    assert process_memory("VmRSS") == 2**21
    assert process_memory("VmHWM") is None and process_memory("VmRSS", "12") is None
    assert free_host_bytes() == 800 * 1024
    (tmp_path / "group/memory.max").write_text("5000\n")
    assert free_host_bytes() == 4000
    # Of files that were read, which the kernel forgets before it refuses memory.
    (tmp_path / "group/memory.stat").write_text("anon 300\nactive_file 100\ninactive_file 600\n")
    assert free_host_bytes() == 4600
    # Of a job, below the root, in either version.
    (tmp_path / "self/cgroup").write_text("9:memory,x:/job/step\n8:cpuacct,cpu:/job\n0::/slice/job\n")
    for folder in ("slice/job", "memory/job", "cpu/job"):
        (tmp_path / "group" / folder).mkdir(parents=True)
    (tmp_path / "group/slice/job/memory.max").write_text("4000\n")
    (tmp_path / "group/slice/job/memory.current").write_text("100\n")
    assert free_host_bytes() == 3900
    (tmp_path / "group/memory/job/memory.limit_in_bytes").write_text("3000\n")
    (tmp_path / "group/memory/job/memory.usage_in_bytes").write_text("200\n")
    assert free_host_bytes() == 2800
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert usable_cores() == 16
    (tmp_path / "group/cpu/job/cpu.cfs_quota_us").write_text("350000\n")
    (tmp_path / "group/cpu/job/cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores() == 4
    (tmp_path / "group/slice/job/cpu.max").write_text("50000 100000\n")
    assert usable_cores() == 1
    (tmp_path / "group/slice/job/cpu.max").write_text("max 100000\n")
    assert usable_cores() == 4
