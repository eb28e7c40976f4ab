"""Multimodal training end to end, tiny: a report at the end, exact resuming, broken records, refused recipes."""

from __future__ import annotations

import json
import math
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from openm6.checkpoint.folder import latest, list_checkpoints
from openm6.core.config import build
from openm6.core.errors import OpenM6Error, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.evaluate.run import evaluate
from openm6.inference.load import load
from openm6.modalities.registry import MODALITIES
from openm6.modalities.text import train_tokenizer
from openm6.tasks.registry import TASKS
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe
from tests.data.sample_images import png
from tests.forked import Program, command_line
from tests.train.tiny_recipe import tiny_recipe, write_recipe
from tests.train.toy_training import untimed

STEPS = 12


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With large products in bf16, as processors that multiply it fast train."""
    tiny = tiny_recipe(STEPS, save_every=3, precision="bf16-products")
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny)


@pytest.fixture(scope="module")
def unbroken(recipe: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    result = train_recipe(recipe, out=folder)
    assert result.steps == STEPS and result.non_finite == 0
    return folder


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text(encoding="utf-8"))


def test_the_report_has_its_documented_parts(unbroken: Path) -> None:
    report = report_of(unbroken)
    assert set(report) == {"seconds", "params", "tokens", "steps", "weights_of_step", "tasks", "codecs", "energy"}
    assert report["steps"] == STEPS and report["tokens"] > 0 and report["seconds"] > 0
    assert 0 < report["params"]["active"] < report["params"]["total"]
    assert set(report["codecs"]) == {"image-64", "audio"} and report["codecs"]["audio"]
    expected = [f"{part['task']}/{part['source']}" for part in tiny_recipe()["mixture"]]
    assert sorted(report["tasks"]) == sorted(expected)


def test_each_task_in_the_report_is_complete(unbroken: Path) -> None:
    for name, entry in report_of(unbroken)["tasks"].items():
        task = TASKS[name.split("/")[0]]
        assert (entry["input_modality"], entry["output_modality"]) == (
            task.input_modality,
            task.output_modality,
        )
        assert {entry["input_modality"], entry["output_modality"]} <= set(MODALITIES)
        assert entry["metric"] == task.metrics[0] and entry["better"] in ("higher", "lower")
        assert math.isfinite(entry["value"]) and entry["baseline_name"]
        low, high = entry["information_ci"]
        assert low <= entry["information_gain"] <= high
        low, high = entry["value_ci"]
        assert low <= entry["value"] <= high
        assert entry["beats_baseline"] == (entry["significant"] and entry["advantage_ci"][0] > 0)
        assert 0 < entry["n_answered"] <= 4 and 0 < entry["n"] <= 4
        assert entry["metrics"][entry["metric"]] == entry["value"]


def test_the_page_is_written_and_needs_nothing_else(unbroken: Path) -> None:
    page = (unbroken / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<script" not in page and 'src="http' not in page


def test_metrics_cover_every_modality(unbroken: Path) -> None:
    names = {name for line in untimed(unbroken) for name in line}
    assert {
        "loss/text",
        "loss/image_out",
        "loss/audio_out",
        "loss/numbers_out",
        "expert_load_cv",
        "packing_efficiency",
    } <= names
    assert [line["step"] for line in untimed(unbroken)] == list(range(1, STEPS + 1))


def test_a_checkpoint_is_enough_to_evaluate_again(unbroken: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    report = evaluate(unbroken, json_path=scores)
    again = json.loads(scores.read_text(encoding="utf-8"))
    assert set(again) == {"checkpoint", "seconds", "tasks"} and again["tasks"] == report_of(unbroken)["tasks"]
    assert all(len(result.samples) == 1 for result in report.results)
    loaded = load(latest(unbroken))
    assert loaded.description.preset == "nano" and not loaded.omni.training


def kill_after(recipe: str, folder: Path, steps: int) -> None:
    """Trains in another process and kills it, without a chance to tidy up, once so many steps are written."""
    with Program(folder.with_name("errors"), command_line, "train", recipe, "--out", str(folder)) as program:
        metrics, waited = folder / "metrics.jsonl", time.monotonic() + 120
        while program.process.is_alive() and time.monotonic() < waited:
            if metrics.is_file() and metrics.read_bytes().count(b"\n") >= steps:
                break
            time.sleep(0.002)
        program.process.kill()
        assert program.ended()[0] == -signal.SIGKILL, "it ended before it could be killed"


def test_killed_and_resumed_equals_unbroken(recipe: str, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_after(recipe, folder, 7)
    assert not (folder / "report.json").exists()
    kept = list_checkpoints(folder / "checkpoints")
    assert all(int(found.name.removeprefix("step-")) < STEPS for found in kept)
    result = train_recipe(recipe, resume=True, out=folder)
    assert result.steps == STEPS and result.checkpoint.name == f"step-{STEPS}"
    for name in ("model.safetensors", "optimizer.safetensors", "model.json", "tokenizer.json"):
        assert (latest(folder) / name).read_bytes() == (latest(unbroken) / name).read_bytes(), name
    assert untimed(folder) == untimed(unbroken)
    assert report_of(folder)["tasks"] == report_of(unbroken)["tasks"]


def test_a_finished_run_is_not_trained_over(recipe: str, unbroken: Path, tmp_path: Path) -> None:
    """Nor are its settings replaced by those of another recipe."""
    before = (unbroken / "config.yaml").read_bytes()
    other = write_recipe(tmp_path, tiny_recipe(99), "other")
    with pytest.raises(TrainingError, match="already holds a run: add --resume"):
        train_recipe(other, out=unbroken)
    assert (unbroken / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("model.overrides.hidden_size=96", "has shape .* the model expects .* load it with the config"),
        ("loop.optimizer.name=muon", "was trained with adamw, not muon"),
        ("model.preset=nanoo", "no preset 'nanoo'"),
    ],
)
def test_a_mistaken_setting_leaves_a_run_as_it_was(unbroken: Path, setting: str, sentence: str) -> None:
    """Also its config.yaml: the next try to go on must not stumble over it."""
    before = {path: path.read_bytes() for path in sorted(unbroken.rglob("*")) if path.is_file()}
    with pytest.raises(OpenM6Error, match=sentence):
        train_recipe(str(unbroken / "config.yaml"), [setting], resume=True, out=unbroken)
    assert {path: path.read_bytes() for path in sorted(unbroken.rglob("*")) if path.is_file()} == before


def test_a_disk_that_fills_up_leaves_the_run_to_go_on_with(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = train_recipe(recipe, ["loop.steps=2", "eval.at_end=false"], out=run).checkpoint
    whole = {path.name: path.read_bytes() for path in first.iterdir()}
    with (
        disk_limited_to(200_000),
        pytest.raises(OpenM6Error, match="step-4 could not be written .*free some space"),
    ):
        train_recipe(recipe, ["loop.steps=4", "loop.save_every=2"], resume=True, out=run)
    assert {path.name: path.read_bytes() for path in latest(run).iterdir()} == whole
    assert train_recipe(recipe, resume=True, out=run).steps == 4


@contextmanager
def disk_limited_to(most: int) -> Iterator[None]:
    """While entered, no file of this process may have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_resuming_a_finished_run_trains_no_more(recipe: str, unbroken: Path) -> None:
    before = (latest(unbroken) / "model.safetensors").read_bytes()
    assert train_recipe(recipe, resume=True, out=unbroken).steps == STEPS
    assert (latest(unbroken) / "model.safetensors").read_bytes() == before


def test_resuming_where_no_run_is_is_refused(recipe: str, tmp_path: Path) -> None:
    """A mistyped folder must not begin from the first step without a word."""
    run = tmp_path / "new"
    with pytest.raises(OpenM6Error, match=rf"{run} holds no run to go on with: name .* --out, or leave --resume out"):
        train_recipe(recipe, resume=True, out=run)
    assert not run.exists()


def test_a_restart_by_the_launcher_before_the_first_checkpoint_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    recipe = write_recipe(tmp_path, {**tiny_recipe(1), **text_only()})
    with caplog.at_level("INFO", logger="openm6"):
        assert train_recipe(recipe, out=tmp_path / "run").steps == 1
    assert "holds no checkpoint yet: starting from the first step" in caplog.text


def test_a_tokenizer_of_a_run_that_never_began_is_not_taken_over(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("left behind", encoding="utf-8")
    train_recipe(write_recipe(tmp_path, {**tiny_recipe(1), **text_only()}), out=folder)
    assert "left behind" not in (folder / "tokenizer.json").read_text(encoding="utf-8")


def test_a_run_goes_on_with_the_tokenizer_of_its_checkpoint(tmp_path: Path) -> None:
    """What an attempt without a checkpoint has left is not taken for it."""
    folder, own = tmp_path / "run", tmp_path / "own.json"
    own.write_text(train_tokenizer(["other words of an own file"], 270).to_str(), encoding="utf-8")
    text = {"modalities": {**tiny_recipe().get("modalities", {}), "text": {"tokenizer": str(own)}}}
    train_recipe(write_recipe(tmp_path, {**tiny_recipe(1), **text_only(), **text}), out=folder)
    (folder / "tokenizer.json").write_text(train_tokenizer(["left behind"], 270).to_str(), encoding="utf-8")
    train_recipe(write_recipe(tmp_path, {**tiny_recipe(2), **text_only(), **text}), out=folder, resume=True)
    kept = (latest(folder) / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(kept)["model"] == json.loads(own.read_text(encoding="utf-8"))["model"]


def test_a_run_may_be_called_as_a_checkpoint(tmp_path: Path) -> None:
    run = train_recipe(write_recipe(tmp_path, {**tiny_recipe(1), **text_only()}), out=tmp_path / "step-2")
    assert latest(tmp_path / "step-2") == run.checkpoint


def text_only() -> dict[str, Any]:
    """The cheapest mixture."""
    return {
        "sources": {"penguins": {"kind": "embedded", "name": "penguins", "limit": 40}},
        "mixture": [{"source": "penguins", "task": "translation"}],
    }


def images(folder: Path, broken: int, count: int = 60) -> dict[str, Any]:
    """A recipe over a table of images, some of them broken, in the test split, too."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        file = folder / f"{number}.png"
        file.write_bytes(b"\x89PNG no more" if number < broken else png(("red", "green", "blue")[number % 3]))
        label = "broken" if number < broken else ("red", "green", "blue")[number % 3]
        lines.append({"id": f"p{number}", "image": file.name, "label": label, "text_en": label})
        lines.append({**lines[-1], "id": f"t{number}", "split": "test"} if number % 5 == 0 else {})
    table = folder / "images.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines if line), encoding="utf-8")
    source = {"kind": "jsonl", "path": str(table), "split": "split"}
    return {
        "sources": {"images": source},
        "mixture": [
            {"source": "images", "task": "image_classification"},
            {"source": "images", "task": "text_to_image"},
        ],
    }


def test_a_few_broken_records_are_set_aside_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_recipe(10) | images(tmp_path / "data", broken=2)
    recipe["mixture"] = recipe["mixture"][:1]
    run = tmp_path / "run"
    with caplog.at_level("INFO", logger="openm6"):
        train_recipe(write_recipe(tmp_path, recipe), out=run)
    assert re.search(r"\d+ records drawn; \d+ broken \(images \d+\); see .*quarantine.jsonl", caplog.text)
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {entry["id"] for entry in listed} == {"p0", "p1"}
    assert all(e["source"] == "images" and "broken or of an unknown format" in e["reason"] for e in listed)
    assert report_of(run)["tasks"]["image_classification/images"]["n"] > 0, "a broken test record must not stop it"


def test_broken_images_do_not_stop_the_evaluation_of_drawn_ones(tmp_path: Path) -> None:
    recipe = tiny_recipe(2, save_every=2) | images(tmp_path / "data", broken=4, count=30) | {"max_broken": 0.5}
    recipe["eval"] = {**recipe["eval"], "records": 12}
    recipe["mixture"] = recipe["mixture"][1:]
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert math.isfinite(report_of(tmp_path / "run")["tasks"]["text_to_image/images"]["baseline"])


def test_too_many_broken_records_stop_the_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(400, save_every=400) | images(tmp_path / "data", broken=15)
    with pytest.raises(TrainingError, match=r"of the records are broken, most \(\d+\) in 'images'.*limit of 5%"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert (tmp_path / "run" / "quarantine.jsonl").is_file()
    # The data is corrected, and the run begins again.
    train_recipe(write_recipe(tmp_path, tiny_recipe(2) | images(tmp_path / "data", broken=0)), out=tmp_path / "run")
    assert not (tmp_path / "run" / "quarantine.jsonl").is_file()


def test_a_source_that_is_broken_from_the_start_says_why(tmp_path: Path) -> None:
    """Not that the task does not suit it."""
    table = tmp_path / "table.csv"
    table.write_bytes("text_en,label,été\n".encode() + b"caf\xe9 and more,x,y\n" * 40)
    recipe = tiny_recipe(2) | {
        "sources": {"mine": {"kind": "csv", "path": str(table)}},
        "mixture": [{"source": "mine", "task": "text_classification"}],
    }
    with pytest.raises(
        OpenM6Error,
        match=r"all of the 20 records looked at in source 'mine' are broken: .*'text_en' is not UTF-8",
    ):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")


def test_examples_that_fit_no_row_are_set_aside(tmp_path: Path) -> None:
    poems = {
        "sources": {"poems": {"kind": "embedded", "name": "poems_zh"}},
        "mixture": [{"source": "poems", "task": "text_generation"}],
    }
    recipe = tiny_recipe(400) | poems | {"packing": {"batch_size": 1, "seq_len": 16}}
    with pytest.raises(TrainingError, match="do not fit a row of 16: raise packing.seq_len"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")


REFUSED = {
    "task": (
        ["mixture.0.task=image_clasification"],
        "no task is called 'image_clasification'; did you mean 'image_classification'",
    ),
    "preset": (["model.preset=nanoo"], "no preset 'nanoo'; did you mean 'nano'"),
    "key": (["loop.stepz=3"], "unknown key 'loop.stepz'; did you mean 'steps'"),
    "deep key": (["eval.decoding.step=3"], "unknown key 'eval.decoding.step'; did you mean 'steps'"),
    "source": (["mixture.0.source=digit"], "names source 'digit', .*did you mean 'digits'"),
    "source kind": (["sources.digits.kind=embeded"], "embedded"),
    "source key": (["sources.digits.limits=3"], "did you mean 'limit'"),
    "data set": (["sources.digits.name=digit"], "did you mean 'digits'"),
    "override": (["model.overrides.hiden_size=64"], "did you mean 'hidden_size'"),
    "sizes": (["model.overrides.num_kv_heads=3"], "num_heads=2 must be a multiple"),
    "kind": (["kind=multimodel"], "did you mean 'multimodal'"),
    "codec": (["modalities.image.codec=image-65"], "did you mean 'image-64'"),
    "wrong codec": (["modalities.image.codec=audio"], "is no image codec"),
    "side": (["modalities.image.side=60"], "must be a multiple of the codec's stride"),
    "weight": (["mixture.0.weight=0"], "greater than 0"),
    "endless weight": (["mixture.0.weight=.inf"], "finite number"),
    "no weight": (["mixture.0.weight=.nan"], "greater than 0|finite number"),
    "no mixture": (["mixture=[]"], "at least 1 item"),
    "loss weight": (["loss_weights={images: 2}"], "did you mean 'image'"),
    "twice": (["mixture.1.task=image_classification"], "twice: add up the weights"),
    "optimizer": (["loop.optimizer.name=adamv"], "did you mean 'adamw'"),
    "no such field": (["mixture.4.task=speech_recognition"], "finds nothing to read in source 'penguins'"),
    "not a setting": (["loop.steps"], "must look like key.path=value"),
    "nowhere": (["mixture.9.task=draw"], "does not lead anywhere"),
    "tokenizer": (["modalities.text.tokenizer=nowhere.json"], "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_in_a_recipe_is_one_sentence_with_a_hint(recipe: str, tmp_path: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        train_recipe(recipe, overrides, out=tmp_path / "run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_recipe_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OpenM6Error, match="no recipe at 'demoo'.*did you mean 'demo'"):
        train_recipe("demoo", out=tmp_path)


def test_embeddings_are_trained_with_answers(tmp_path: Path) -> None:
    """A mixture of both kinds of task has both losses; its checkpoint makes embeddings, its report has recall."""
    values = tiny_recipe(3)
    values["mixture"] = [
        {"source": "digits", "task": "image_text_retrieval", "weight": 3},
        {"source": "digits", "task": "image_classification"},
    ]
    train_recipe(write_recipe(tmp_path, values), out=tmp_path / "run")
    names = {name for line in untimed(tmp_path / "run") for name in line}
    assert {"loss/pool", "loss/text"} <= names
    entry = report_of(tmp_path / "run")["tasks"]["image_text_retrieval/digits"]
    assert entry["metric"] == "recall_at_1" and entry["baseline_name"] == "chance"
    assert load(tmp_path / "run").pool.size == 128


def test_a_weight_that_no_row_uses_adds_nothing_even_when_it_is_not_finite(tmp_path: Path) -> None:
    """In a sharded model each weight needs a gradient, if only of zeros."""
    recipe = build(MultimodalRecipe, tiny_recipe(1) | text_only(), "tiny")
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), torch.device("cpu"))
    unused = list(training.omni.adapter("image_in").parameters())
    training.optional_parameters = lambda: unused  # type: ignore[method-assign]
    with torch.no_grad():
        unused[0].view(-1)[0] = float("inf")
    loss = training.loss(next(training.batches())).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(weight.grad is not None and not weight.grad.any() for weight in unused)


def test_texts_with_gaps_are_learned_as_such(tmp_path: Path) -> None:
    values = text_only() | {"mixture": [{"source": "penguins", "task": "text_denoising"}]}
    recipe = build(MultimodalRecipe, tiny_recipe(1) | values, "tiny")
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), torch.device("cpu"))
    batch, mask = next(training.batches()), training.modalities["text"].mask
    assert int((batch.groups["text"].arrays["ids"] == mask).sum()) >= batch.num_examples


def test_the_parts_of_a_batch_add_up_to_its_loss_and_gradient(tmp_path: Path) -> None:
    recipe = build(MultimodalRecipe, {**tiny_recipe(), "packing": {"batch_size": 4, "seq_len": 160}}, "tiny")
    training = MultimodalTraining(recipe, RunFolder.open(tmp_path), torch.device("cpu"))
    training.model.train()
    assert training.max_parts == 2
    batch = next(training.batches())
    whole = training.loss(batch)
    expected = torch.autograd.grad(whole.loss, list(training.model.parameters()), allow_unused=True)
    parts = [training.loss(part) for part in training.split(batch, 3)]
    total = torch.stack([part.loss for part in parts]).sum()
    assert total.item() == pytest.approx(whole.loss.item(), rel=1e-4)
    found = torch.autograd.grad(total, list(training.model.parameters()), allow_unused=True)
    for (name, _), one, other in zip(training.model.named_parameters(), expected, found, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5, msg=name)
    loads = torch.stack([load.load for part in parts for load in part.loads if load.layer == 0]).sum(0)
    assert torch.equal(loads, whole.loads[0].load)
