"""After the last step: the model in memory is evaluated, and what fails then loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from openm6.core.errors import OutputError, TrainingError
from openm6.core.files import to_json
from openm6.core.run_folder import RunFolder
from openm6.distributed.processes import DistributedContext
from openm6.evaluate.results import EvalReport
from openm6.evaluate.run import evaluate
from openm6.inference.load import LoadedModel, OffloadedInference, load
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.run import read_recipe, train_recipe
from tests.distributed.fleet import Fleet
from tests.train.tiny_recipe import EVAL, tiny_recipe, write_recipe

CPU = torch.device("cpu")
ONE_TEXT = {
    "sources": {"digits": {"kind": "embedded", "name": "digits", "limit": 30}},
    "mixture": [{"source": "digits", "task": "image_classification"}],
}
FEW_TASKS = [
    {"source": "digits", "task": "image_classification"},
    {"source": "digits", "task": "text_to_image"},
    {"source": "penguins", "task": "tabular_regression"},
]


def reported(run: Path) -> dict[str, Any]:
    tasks: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))["tasks"]
    return tasks


def tasks_of(report: EvalReport) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json({one.name: one.to_json() for one in report.results}))
    return found


def load_no_second(monkeypatch: pytest.MonkeyPatch, layers: bool) -> None:
    """No second model may be loaded; with `layers`, one whose layers stay in the checkpoint's files may."""

    def load_layers(*words: Any, **named: Any) -> LoadedModel:
        assert layers, "a second model was loaded"
        found = load(*words, **named)
        weights = [p for block in found.omni.backbone.blocks for p in block.attention.parameters()]
        assert weights and all(weight.is_meta for weight in weights)
        source = found.omni.backbone.executor
        assert isinstance(source, OffloadedInference) and not source.host_copy
        return found

    monkeypatch.setattr("openm6.evaluate.run.load", lambda *_: pytest.fail("a second model was loaded"))
    monkeypatch.setattr("openm6.train.multimodal.load", load_layers)


OFFLOADED = {
    "offload": {"num_gpu_layers": 1},
    "optimizer": {"learning_rate": 0.002, "precision": "bf16-adafactor"},
}


@pytest.mark.parametrize("loop", [{}, OFFLOADED], ids=["plain", "offloaded"])
def test_no_second_model_is_loaded_whole_to_evaluate_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: dict[str, Any]
) -> None:
    recipe = tiny_recipe(4, num_processes=1, **loop) | {
        "mixture": FEW_TASKS,
        "eval": {**EVAL, "at_end": True},
    }
    with monkeypatch.context() as patched:
        load_no_second(patched, layers=bool(loop))
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert reported(tmp_path / "run") == tasks_of(evaluate(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "loop"), [({"at_end": False}, {}), ({}, OFFLOADED)], ids=["turned off", "offloaded"]
)
def test_a_run_that_is_not_to_be_evaluated_is_not(
    tmp_path: Path, changes: dict[str, Any], loop: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(1, num_processes=1, **loop) | ONE_TEXT | {"eval": {**EVAL, **changes}}
    with caplog.at_level("INFO", logger="openm6"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert f"openm6 evaluate {tmp_path / 'run'}" in caplog.text
    assert not (tmp_path / "run/report.json").exists()


def test_a_failure_after_training_says_that_nothing_is_lost_and_resuming_repeats_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OutputError(f"{run}/report.html could not be written (No space left on device): free some space")

    path, run = write_recipe(tmp_path, tiny_recipe(2, num_processes=1) | ONE_TEXT), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr("openm6.train.multimodal.write_report", full)
        with pytest.raises(TrainingError, match=r"trained and saved as .*step-2, but .*No space left") as failure:
            train_recipe(path, out=run)
    assert "\n" not in str(failure.value) and "go on with --resume" in str(failure.value)
    lines = (run / "metrics.jsonl").read_text()
    # The evaluation is kept: only the report is missing.
    monkeypatch.setattr("openm6.train.multimodal.evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    with caplog.at_level("INFO", logger="openm6"):
        assert train_recipe(path, resume=True, out=run).steps == 2
    assert "epochs of each source and task: digits/image_classification 1." in caplog.text
    assert all(f"openm6 {word} {run}" in caplog.text for word in ("evaluate", "generate", "serve"))
    assert (run / "report.json").exists() and (run / "metrics.jsonl").read_text() == lines
    assert not (run / "evaluation.json").exists()
    with caplog.at_level("INFO", logger="openm6"):
        assert train_recipe(path, resume=True, out=run).steps == 2
    assert "nothing is left to do" in caplog.text


def evaluated_on_ranks(recipe: str, folder: str, axes: tuple[int, int, int]) -> dict[str, Any] | None:
    """Run on this rank; rank 0 returns what was reported."""
    names = ("dp_replicate", "dp_shard", "ep")
    checked, _ = read_recipe(Path(recipe), [f"parallel.{n}={s}" for n, s in zip(names, axes, strict=True)])
    ranks, run = DistributedContext(CPU, 60), RunFolder.open(folder)
    training = MultimodalTraining(checked, run, CPU, ranks)
    with pytest.MonkeyPatch.context() as patched:
        load_no_second(patched, layers=True)
        # The fleet has no launcher, whose store ranks wait at.
        patched.setattr(DistributedContext, "main_process_first", lambda self: torch.no_grad())
        train(training, checked.loop, run)
    dist.barrier()
    return reported(run.path) if ranks.is_main_process else None


@pytest.mark.parametrize(("axes", "loop"), [
    ((2, 1, 1), {}), ((1, 2, 1), {}), ((1, 1, 2), OFFLOADED),
])  # fmt: skip
def test_no_second_model_is_loaded_whole_to_evaluate_ranks(
    tmp_path: Path, two: Fleet, axes: tuple[int, int, int], loop: dict[str, Any]
) -> None:
    recipe = tiny_recipe(2, num_processes=1, **loop) | {
        "mixture": FEW_TASKS,
        "eval": {**EVAL, "at_end": True, "num_processes": 1},
    }
    path = write_recipe(tmp_path, recipe | {"packing": {"batch_size": 2, "seq_len": 160, "num_shards": 2}})
    found = two.run(evaluated_on_ranks, path, str(tmp_path / "run"), axes)[0]
    expected = tasks_of(evaluate(tmp_path / "run"))
    assert set(found) == set(expected)
    for name, entry in expected.items():
        for figure in ("value", "baseline", "information_gain"):
            assert found[name][figure] == pytest.approx(entry[figure], rel=1e-3, abs=1e-3), (name, figure)
