"""A tiny run on own tasks: trained, resumed, evaluated, reported, and answered by the server, as built-in ones are."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest

import openm6
from openm6.core.errors import DataError
from openm6.data.sources import open_sources
from openm6.evaluate.run import evaluate, source_configs
from openm6.inference.load import load
from openm6.inference.question import Question, prompt_parts
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from openm6.serve.scenarios.run import list_scenarios, run_scenarios
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe
from tests.serve.running import running
from tests.train.tiny_recipe import EVAL, tiny_recipe, write_recipe

OWN: dict[str, Any] = {
    "mass_of_penguin": {
        "inputs": {"columns": {"numbers": ["bill_length_mm", "flipper_length_mm"]}},
        "target": {"number": "body_mass_g"},
        "prompts": {"en": "{columns} Mass?", "de": "{columns} Masse?"},
        "metrics": ["mae", "coverage_80"],
        "summary": "Weigh a penguin",
    },
    "digit_in_german": {
        "inputs": {"image": "image"},
        "target": {"category": "label"},
        "prompts": {"de": "{image} Welche Ziffer?"},
    },
    "digit_from_word": {"inputs": {"label": "text"}, "target": "image", "prompts": {"en": "a {label}"}},
}
SOURCES = {"mass_of_penguin": "penguins", "digit_in_german": "digits", "digit_from_word": "digits"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    mixture = [{"source": source, "task": task} for task, source in SOURCES.items()]
    recipe = tiny_recipe(4, num_processes=1) | {"tasks": OWN, "mixture": mixture}
    path = write_recipe(folder, recipe | {"eval": {**EVAL, "at_end": False}})
    train_recipe(path, ["loop.steps=2"], out=folder / "run")
    Path(path).write_text("kind: gone")  # What a resumed run, and whoever loads it, needs is in the run.
    train_recipe(path, ["loop.steps=4", "eval.at_end=true"], resume=True, out=folder / "run")
    return folder / "run"


def test_pairs_in_a_circle_are_left_to_the_one_who_opens_them() -> None:
    pairs = {name: {"kind": "pairs", "left": other, "right": other} for name, other in (("a", "b"), ("b", "a"))}
    mixture = [{"source": "a", "task": "mass_of_penguin"}]
    recipe = MultimodalRecipe.model_validate(tiny_recipe() | {"tasks": OWN, "sources": pairs, "mixture": mixture})
    with pytest.raises(DataError, match="circle"):
        open_sources(recipe.sources, "train")


def test_it_is_resumed_evaluated_and_reported(run: Path) -> None:
    assert [path.name for path in sorted((run / "checkpoints").iterdir())][-1] == "step-4"
    tasks = json.loads((run / "report.json").read_text(encoding="utf-8"))["tasks"]
    assert set(tasks) == {f"{task}/{source}" for task, source in SOURCES.items()}
    assert tasks["mass_of_penguin/penguins"]["metric"] == "mae" and tasks["mass_of_penguin/penguins"]["baseline"] > 0
    assert set(tasks["mass_of_penguin/penguins"]["metrics"]) == {"mae", "coverage_80"}
    assert "Weigh a penguin" in (run / "report.html").read_text(encoding="utf-8")
    assert [result.task for result in evaluate(run, ["digit_in_german"]).results] == ["digit_in_german"]


def test_python_and_the_command_line_ask_in_its_own_words(run: Path) -> None:
    m6 = openm6.load(run)
    digit = open_sources(source_configs(m6.loaded.description.sources, "run"), "test")["digits"][0]
    assert isinstance(m6.generate(image=digit["image"], max_new_tokens=4), str)
    row = {"bill_length_mm": 40.0, "flipper_length_mm": 190.0, "body_mass_g": None}
    low, high = m6.generate(numbers=row, output="numbers").interval(0.8)
    assert low < high
    parts = prompt_parts(Question(output="text", image=digit["image"]), m6.loaded)
    assert parts[-1].raw == " Welche Ziffer?"


def test_a_table_gets_predictions_of_the_columns_that_own_tasks_predict(run: Path) -> None:
    m6 = openm6.load(run)
    frame = pd.DataFrame({"bill_length_mm": [40.0, 50.0], "flipper_length_mm": [190.0, 220.0]})
    found = m6.predict(frame, "body_mass_g", [0.5])
    row = {"bill_length_mm": 40.0, "flipper_length_mm": 190.0, "body_mass_g": None}
    assert found["0.5"][0] == pytest.approx(m6.generate(numbers=row, output="numbers").median, rel=1e-4)
    pd.testing.assert_frame_equal(found, m6.predict(frame.assign(body_mass_g=1.0), "body_mass_g", [0.5]), rtol=1e-4)
    with pytest.raises(DataError, match="the model predicts no column 'bill_length_mm'"):
        m6.predict(frame, "bill_length_mm")
    digits = open_sources(source_configs(m6.loaded.description.sources, "run"), "test")["digits"]
    images = pd.DataFrame({"image": [digits[0]["image"], digits[1]["image"]]})
    assert m6.predict(images, "label", classes=["zero", "one"])[["zero", "one"]].sum(axis=1).tolist() == pytest.approx(
        [1.0, 1.0]
    )


def test_each_is_a_scenario_of_the_server(run: Path) -> None:
    loaded = load(run)
    digit = open_sources(source_configs(loaded.description.sources, "run"), "test")["digits"][0]
    image = base64.b64encode(digit["image"]).decode()
    inputs: dict[str, dict[str, Any]] = {
        "mass_of_penguin": {"columns": {"bill_length_mm": 40.0, "flipper_length_mm": 190.0}},
        "digit_in_german": {"image": image},
        "digit_from_word": {"label": "seven"},
    }
    app = create_app(Engine(loaded, EngineConfig(max_model_len=256)), name="own")
    with running(app) as address, httpx.Client(base_url=address, timeout=60) as client:
        listed = {one["id"]: one for one in client.get("/v1/scenarios").json()["data"]}
        assert listed["mass_of_penguin"]["domain"] == "own" and "illustration" in listed
        assert client.get("/v1/scenarios/mass_of_penguin").json()["examples"] == {}
        for name, values in inputs.items():
            reply = client.post(f"/v1/scenarios/{name}", json={"inputs": values, "seed": 1})
            assert reply.status_code == 200, reply.text
            assert reply.json()["trained"] or reply.json()["note"].startswith("probably not trained"), reply.text
            assert reply.json()[reply.json()["output"]] is not None
    assert set(reply.json()) >= {"joules", "image"} and list_scenarios(run).row_count == len(listed)


def test_scenarios_without_an_example_are_not_run(run: Path) -> None:
    assert not {result.scenario for result in run_scenarios(run)} & set(SOURCES)
