"""The examples of CONTRIBUTING.md: each extension is registered and used as the page describes."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import feather

from openm6.core.errors import DataError
from openm6.data import parquet
from openm6.evaluate import metrics
from openm6.modalities import interface
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Modality, Part
from openm6.modalities.registry import Modalities, source_segments, target_segment
from openm6.models.omni import Omni
from openm6.optim import registry
from openm6.optim.config import OptimizerConfig
from openm6.tasks.registry import TASKS, read_tasks
from openm6.tasks.slots import Text
from openm6.tasks.task import Task
from tests.data.sample_images import png
from tests.small_model import BACKBONE, demo_sources, modalities

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example_of(heading: str, language: str = "python") -> str:
    """The one example below a heading."""
    section = re.search(rf"^### {heading}\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    assert section, f"no section {heading}"
    (block,) = re.findall(rf"```{language}\n(.*?)```", section[1], re.DOTALL)
    return block


def run_example(heading: str, names: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Run the code below a heading as part of a file with these names; return all names and the last expression."""
    tree = ast.parse(example_of(heading))
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    names = {**names, "__name__": "example"}
    # Without this file's `annotations` import, so that annotations are looked up among the names.
    exec(compile(tree, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    return names, None if last is None else eval(compile(last, "CONTRIBUTING.md", "eval"), names)  # noqa: S307


def test_task() -> None:
    ((name, task),) = read_tasks(yaml.safe_load(example_of("Task", "yaml"))).items()
    assert isinstance(task, Task) and name not in TASKS
    assert isinstance(task.target, Text) and (task.input_modality, task.output_modality) == ("text", "text")
    record = demo_sources()["emoji"][3]
    example = task.example(record, np.random.default_rng(0), language="en")
    assert example.answer == record["label"] and record["tags_en"][0] in example.source[0].raw


def test_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    _, metric = run_example("Metric", vars(metrics))
    assert metric.name not in metrics.METRICS
    monkeypatch.setitem(metrics.METRICS, metric.name, metric)
    task = TASKS["question_answering"]
    records = [{"text_en": "A cat sat.", "question": "Who sat?", "answer": "a cat", "id": str(i)} for i in (1, 2)]
    examples = [task.example(record, np.random.default_rng(0), language="en") for record in records]
    found = metrics.all_metrics((metric.name,), metrics.Scored(examples, ["A cat, of course", "a dog"]))
    assert found[metric.name].tolist() == [1.0, 0.0]
    assert metrics.score(metric.name, 0.5).startswith("50.0")


def test_source(tmp_path: Path) -> None:
    names, _ = run_example("Source", {**vars(parquet), "feather": feather})
    config = names["FeatherConfig"](path=str(tmp_path / "shop.feather"), fields={"text_en": "title"}, test_fraction=0.5)
    table = pa.table({"title": [f"cup {number}" for number in range(20)], "other": [0] * 20})
    feather.write_feather(table, config.path)
    train, test = (config.open("shop", split, lambda name: pytest.fail(name)) for split in ("train", "test"))
    texts = {source[index]["text_en"] for source in (train, test) for index in range(len(source))}
    assert len(train) + len(test) == 20 and len(train) and len(test)
    assert texts == set(table["title"].to_pylist())


def test_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "OPTIMIZERS", dict(registry.OPTIMIZERS))
    run_example("Optimizer", vars(registry))
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    inputs, target = torch.randn(32, 4), torch.ones(32, 1)
    optimizer = registry.build_optimizer(
        registry.default_groups(model), OptimizerConfig(name="sgd", learning_rate=0.01)
    )
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["nesterov"]
    losses = []
    for _ in range(20):
        loss = (model(inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_modality() -> None:
    names = {**vars(interface), "DataError": DataError, "F": torch.nn.functional}
    names, _ = run_example("Modality", names)
    rating = names["Rating"]()
    assert isinstance(rating, Modality)
    with pytest.raises(DataError, match="from 1 to 5"):
        rating.source(6)
    known = Modalities(modalities(), rating=rating)
    torch.manual_seed(0)
    model = Omni(BACKBONE, known)
    raw = {"text": "seven red apples", "image": png(), "rating": 1}
    for inputs, output in (("text", "rating"), ("rating", "text"), ("image", "rating")):
        source = source_segments([Part(inputs, raw[inputs])], known)
        target = target_segment(Part(output, raw[output]), known, np.random.default_rng(0))
        batch = collate([[build_sequence([*source, target], "x")]], len(source[0]) + len(target))
        losses, _ = model.compute_loss(batch)
        assert list(losses) == [target.kind] and bool(losses[target.kind].nll.isfinite().all())
