"""Examples run on a model: every kind of answer, and nothing pretended where nothing was learned."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from openm6.api.model import OpenM6
from openm6.checkpoint.save import Snapshot, save
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.inference.load import LoadedModel
from openm6.models.description import TrainedTask
from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.scenarios.run import (
    ONE_AT_A_TIME,
    ExampleResult,
    list_scenarios,
    results_table,
    run_example,
    run_scenarios,
    try_model,
)
from openm6.serve.scenarios.scenario import read_library
from openm6.tasks.registry import TASKS
from tests.data.sample_images import png
from tests.small_model import demo_configs, embedding_model, loaded

LIBRARY = read_library()
QUICK = (
    "couplet",
    "caption",
    "search_ranking",
    "image_search_vector",
    "missing_measurement",
    "fill_region",
)


def trained_on_everything():  # type: ignore[no-untyped-def]
    """The untrained model with a checkpoint that names every task."""
    model = embedding_model()
    trained_tasks = [TrainedTask(task=name, source="all") for name in TASKS]
    return replace(model, description=model.description.model_copy(update={"trained_tasks": trained_tasks}))


@pytest.mark.parametrize("name", QUICK)
def test_an_example_is_answered(name: str) -> None:
    with Engine(trained_on_everything(), ONE_AT_A_TIME) as engine:
        tried = run_example(engine, LIBRARY.scenarios[name], "en")
    assert tried.state == "answered", tried.answer
    assert tried.seconds > 0


def test_an_untrained_model_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.serve.scenarios.run.load", lambda *_, **__: loaded(trained_tasks=()))
    tried = run_scenarios(tmp_path, tmp_path / "tried.json")
    assert len(tried) == 2 * len(LIBRARY.scenarios)
    assert {one.state for one in tried} == {"untrained"}
    assert all("needs training on" in one.answer for one in tried)
    found = json.loads((tmp_path / "tried.json").read_text(encoding="utf-8"))
    assert (found["answered"], found["untrained"], found["failed"]) == (0, len(tried), 0)
    assert found["examples"] == [asdict(one) for one in tried]


@pytest.mark.parametrize(("dtype", "weights"), [("auto", "auto"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_engine_keeps_the_dtype_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, weights: str
) -> None:
    """On a GPU it would else convert the weights to bf16."""
    found: list[EngineConfig] = []

    def engine(model: LoadedModel, config: EngineConfig) -> Engine:
        found.append(config)
        return Engine(model, config)

    monkeypatch.setattr("openm6.serve.scenarios.run.load", lambda *_: loaded(trained_tasks=()))
    monkeypatch.setattr("openm6.serve.scenarios.run.Engine", engine)
    run_scenarios(tmp_path, dtype=dtype)
    assert [config.weights for config in found] == [weights]


def test_a_checkpoint_of_another_kind_is_a_sentence(tmp_path: Path) -> None:
    codec = Snapshot(1, torch.nn.Linear(1, 1), {}, {}, files={"codec.json": "{}"})
    save(codec, tmp_path / "checkpoints", keep=1)
    with pytest.raises(CheckpointError, match=r"has no model\.json: it is not a checkpoint of a multimodal model"):
        list_scenarios(tmp_path)


def test_a_column_that_the_model_does_not_know_fails_in_a_sentence() -> None:
    model = trained_on_everything()
    model = replace(model, modalities=loaded().modalities)
    scenario = LIBRARY.scenarios["machine_state"]
    strange = scenario.model_copy(update={"examples": {"en": {"numbers": {"hmm": 1.0}}}})
    with Engine(model, ONE_AT_A_TIME) as engine:
        tried = run_example(engine, strange, "en")
    assert tried.state == "failed" and "has no column 'hmm'" in tried.answer


def test_the_results_as_a_table() -> None:
    found = [
        ExampleResult("a", "en", "answered", "x" * 99, 0.5),
        ExampleResult("b", "zh", "untrained", "needs", 0.0),
    ]
    assert results_table(found).row_count == 2


PAIRS = (
    ("text_to_image", "digits"), ("image_classification", "digits"), ("text_to_speech", "spoken"),
    ("tabular_regression", "penguins"), ("time_series_forecasting", "weather"), ("image_inpainting", "digits"),
)  # fmt: skip


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Models by name: `mini`, with examples of its own, stands in for that of the package."""
    OpenM6(loaded(trained_tasks=PAIRS)).save_pretrained(tmp_path / "models" / "mini")
    (tmp_path / "models" / "mini" / "red.png").write_bytes(png("red", 40))
    (tmp_path / "models" / "mini" / "examples.yaml").write_text(
        "illustration: [{en: {text: a red <kite>}, zh: {text: 红风筝}}, {en: {text: a blue kite}}]\n"
        "read_digit: [{en: {image: red.png}}]\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(page: str) -> int:
    return page.count('<td><p class="pair">') + page.count('<td>\n<p class="pair">')


def test_a_page_of_answers_to_the_examples_that_a_model_brings(home: Path) -> None:
    shown = try_model("mini", home / "try.html")
    assert shown == f"answers of mini in 5 of 16 pairs of modalities: open {home / 'try.html'}"
    page = (home / "try.html").read_text(encoding="utf-8")
    assert "a red &lt;kite&gt;" in page and "红风筝" in page and "a blue kite" in page
    assert page.count("not trained, or no example") == 11
    # Offline: nothing but data URLs is referred to, and nothing runs.
    assert not re.search(r"<script|https?://|@import|url\(", page) and "audio/wav;base64" in page
    assert "truth" not in re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)


def test_what_is_not_ready_is_shown_for_its_pair_with_the_reason(home: Path) -> None:
    def page(*weak: str) -> str:
        score = {"metric": "exact_match", "value": 0.02, "baseline": 0.03, "beats_baseline": False}
        scores = {"tasks": {f"{task}/digits": score for task in weak}}
        (home / "models" / "mini" / "report.json").write_text(json.dumps(scores), encoding="utf-8")
        assert try_model("mini", home / "try.html").startswith("answers of mini in 5 of 16 pairs")
        return (home / "try.html").read_text(encoding="utf-8")

    reason = (
        "trained, but not better than its baseline: 2.0\N{NO-BREAK SPACE}% exact match against 3.0\N{NO-BREAK SPACE}%"
    )
    assert reason not in page()
    drawn = page("text_to_image")
    assert reason in drawn and "已训练，但不优于基线" in drawn and "a blue kite" in drawn
    # Filling in takes an image, too; no other pair lacks a scenario that is ready.
    assert page("text_to_image", "image_inpainting").count(reason) > drawn.count(reason)


@pytest.mark.parametrize(
    ("examples", "error"),
    [
        ("read_digit: [{en: {image: blue.png}}]", "names 'blue.png' for read_digit, which is no file in"),
        ("read_digit: [{en: {image: ../../other.png}}]", "which is no file in"),
        ("read_digit: [{en: {image: spoken#spoken/1}}]", "spoken"),
        ("read_digit: {image: red.png}", r"examples\.yaml"),
    ],
)
def test_broken_examples_are_errors_in_a_sentence(home: Path, examples: str, error: str) -> None:
    (home / "other.png").write_bytes(png("red", 40))
    (home / "models" / "mini" / "examples.yaml").write_text(examples, encoding="utf-8")
    with pytest.raises(OpenM6Error, match=error):
        try_model("mini", home / "try.html")


def test_a_page_without_a_folder_is_an_error_before_anything_is_answered(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .*there is no folder"):
        try_model("gone", home / "pages" / "try.html")


def test_without_examples_test_records_are_tried(home: Path) -> None:
    """A task that the library lacks, over data that are here."""
    model = loaded(trained_tasks=(("record_regression", "penguins"), ("image_captioning", "gone")))
    sources = {"penguins": demo_configs()["penguins"].model_dump(mode="json"), "gone": {"kind": "parquet", "path": "x"}}
    OpenM6(replace(model, description=model.description.model_copy(update={"sources": sources}))).save_pretrained("own")
    assert try_model(Path("own"), home / "try.html").startswith("answers of own in 1 of 16 pairs")
    OpenM6(loaded(trained_tasks=())).save_pretrained("nothing")
    with pytest.raises(CheckpointError, match="nothing to try with nothing"):
        try_model(Path("nothing"), home / "try.html")
