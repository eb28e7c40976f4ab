"""Sentences for a lost GPU, exhausted memory and a host that swaps."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from openm6.base.errors import TrainingError
from openm6.base.run_folder import RunFolder
from openm6.checkpoint.folder import latest
from openm6.offload.config import StreamingConfig
from openm6.train.failures import SwapHook, device_failures, swapped_bytes
from openm6.train.loop import train
from openm6.train.step import Updater
from openm6.train.streamed import StreamedUpdater
from tests.train.words_job import WordsJob, words_backbone, words_config


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
    with pytest.raises(TrainingError, match=sentence) as caught, device_failures(lambda: 7):
        raise failure
    assert "\n" not in str(caught.value) and "--resume" in str(caught.value)


@pytest.mark.parametrize("streaming", [None, StreamingConfig(resident=1)])
@pytest.mark.parametrize("moment", ["loss", "evaluate"])
def test_a_gpu_lost_in_the_middle_leaves_a_run_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, streaming: StreamingConfig | None
) -> None:
    """Whatever is under way; and closing fails as well then, since everything on the device does."""
    config = words_config(8, save_every=2, evaluate_every=5, streaming=streaming)
    calls = iter(range(1, 99))

    def gone(*given: Any) -> Any:
        if moment == "evaluate" or next(calls) == 5:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")
        return loss(*given)

    loss = WordsJob.loss
    with monkeypatch.context() as patched:
        patched.setattr(WordsJob, moment, gone)
        patched.setattr(Updater, "close", gone_for_good)
        patched.setattr(StreamedUpdater, "close", gone_for_good)
        with pytest.raises(TrainingError, match=r"failed in step \d \(CUDA error.*\): what was saved"):
            train(WordsJob(words_backbone()), config, RunFolder.open(tmp_path))
    assert latest(tmp_path).name == "step-4"
    assert train(WordsJob(words_backbone()), config, RunFolder(tmp_path), resume=True).steps == 8


def gone_for_good(*given: Any) -> None:
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


def test_other_errors_are_bugs_and_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), device_failures(lambda: 1):
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
