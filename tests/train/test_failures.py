"""Sentences for a lost GPU, exhausted memory and a host that swaps."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openm6.base.errors import TrainingError
from openm6.train.failures import SwapHook, device_failures, swapped_bytes


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "memory ran out in step 7: raise loop.streaming.micro",
        ),
        (
            torch.AcceleratorError("CUDA error: an illegal access\nmore"),
            "failed in step 7 \\(CUDA error",
        ),
    ],
)
def test_a_failing_gpu_is_told_in_one_sentence(failure: Exception, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence) as caught, device_failures(7):
        raise failure
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


def test_other_errors_are_bugs_and_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), device_failures(1):
        raise RuntimeError("shapes differ")


def test_swapping_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    status = tmp_path / "status"
    hook = SwapHook(status)
    report: Any = SimpleNamespace(step=3)
    with caplog.at_level(logging.WARNING, logger="openm6"):
        hook.after_step(report)
        status.write_text("Name: python\nVmSwap:\t 1048576 kB\n", encoding="utf-8")
        hook.after_step(report)
        hook.after_step(report)
    told = [record.message for record in caplog.records if "swapped out" in record.message]
    assert len(told) == 1 and "1.0 GiB" in told[0] and swapped_bytes(tmp_path / "nothing") == 0
