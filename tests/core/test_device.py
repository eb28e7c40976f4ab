"""One rule for the device of a process, with the number of its GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from openm6.core.device import resolve_device

ROOT = Path(__file__).parents[2]


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine of eight GPUs, as far as torch is asked; what was made the current one is kept."""
    current = [3]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return current


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert resolve_device() == torch.device("cpu")


def test_a_process_alone_takes_the_current_gpu_by_its_number(eight_gpus):
    assert resolve_device() == torch.device("cuda", 3)
    assert eight_gpus == [3]


def test_each_launched_process_has_a_gpu_of_its_own(eight_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert resolve_device() == torch.device("cuda", 5)
    assert eight_gpus[-1] == 5


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
