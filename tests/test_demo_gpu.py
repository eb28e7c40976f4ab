"""The demo on a GPU as a person would run it: in half precision, in fp32, and without Triton.

`tests/test_demo_short.py` runs the same on a CPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices import CPU, needs_gpu, on_each_device
from tests.test_demo_short import SETTINGS
from tests.train.tiny_recipe import tiny_recipe, write_recipe

ROOT = Path(__file__).parents[1]
# Half a minute of steps, then a short evaluation.
MINUTES = ["loop.steps=auto", "loop.minutes=0.5", "loop.log_every=1"]
EVALUATION = [setting for setting in SETTINGS if setting.startswith("eval.")]
# Triton cannot be imported, as on a system that has none; block masks, which only its kernels read, must not be made.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from openm6.models import backbone
from openm6.cli.main import main

def refuse(*_):
    raise AssertionError("a mask for FlexAttention was made without Triton")

backbone.block_mask = refuse
main()
"""

pytestmark = pytest.mark.slow


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A Python program in another process, standing in `folder`, that must end well."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def check_run(folder: Path) -> None:
    """A run of finite losses that was evaluated and reported, and that learned if it had the time.

    The time of the compiler counts, so that half a minute may be over after the first few steps.
    """
    taken = losses(folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert len(taken) == report["steps"] >= 3 and all(map(math.isfinite, taken))
    assert len(taken) < 60 or sum(taken[-10:]) < sum(taken[:10])
    assert len(report["tasks"]) >= 16
    assert all(math.isfinite(task["value"]) for task in report["tasks"].values())


@needs_gpu
@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_the_demo_trains_evaluates_and_reports(precision: str, tmp_path: Path) -> None:
    """In fp32 experts have no kernel and must not be compiled; both must train, and log no failure."""
    settings = [*MINUTES, *EVALUATION, f"loop.precision={precision}"]
    done = run(tmp_path, "-m", "openm6", "train", "demo", *settings, "--out", "run")
    check_run(tmp_path / "run")
    for failure in ("the compiler failed", "not compiled", "FlexAttention failed", "without a finite loss"):
        assert failure not in done.stderr, done.stderr[-4000:]
    answered = run(tmp_path, "-m", "openm6", "generate", "run", "--text", "draw the digit seven", "--output", "image",
                   "--out", "7.png")  # fmt: skip
    assert (tmp_path / "7.png").stat().st_size > 0, answered.stderr


@on_each_device
def test_without_triton_it_trains_uncompiled_and_says_so_once(device: torch.device, tmp_path: Path) -> None:
    """On a GPU with dense masks, as rows of 256 tokens have block masks else. On a CPU nothing needs to be said."""
    recipe = {**tiny_recipe(6, precision="auto"), "packing": {"batch_size": 2, "seq_len": 256}}
    written = write_recipe(tmp_path, recipe)
    done = run(tmp_path, "-c", WITHOUT_TRITON, "train", written, "--out", "run", "--device", str(device))
    taken = losses(tmp_path / "run")
    assert len(taken) == 6 and all(map(math.isfinite, taken)) and (tmp_path / "run" / "report.json").is_file()
    said = re.findall(r"(no Triton kernels|blocks are not compiled), so slower: Triton is not installed", done.stderr)
    assert said == ([] if device == CPU else ["no Triton kernels", "blocks are not compiled"]), done.stderr[-4000:]
    assert "Traceback" not in done.stderr


@needs_gpu
def test_the_benchmark_of_offloading_runs_at_its_default_size(tmp_path: Path) -> None:
    """Pinned memory, copies on their own streams, and the kernels of the updates, in one program."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "offload"], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert found["cut_short"] is None and "CPU" not in found["device"]
    assert found["sets_on_device"] == 0 and found["peak_gpu_gib"] > 0
    assert 0 < found["link_gbps"] and 0 < found["link_fraction"] < 1.5
    assert min(found["seconds"].values()) >= 0 and found["tokens_per_second"] > 0
