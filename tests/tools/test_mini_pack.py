"""A run packed as a model of the package: small weights close to the run's, and examples with their files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from openm6.api.model import OpenM6, load
from openm6.core.config import read_yaml
from openm6.core.errors import ConfigError
from openm6.modalities.registry import MODALITIES
from openm6.modalities.simple_predictors import FOLDS, from_bytes, to_bytes
from openm6.serve.scenarios.run import example_values
from openm6.serve.scenarios.scenario import library_of
from openm6.train.run import read_recipe, recipe_path
from openm6.train.simple_predictors import fit_table
from tests.data.sample_images import png, wav
from tests.serve.scenarios.test_scenario import described
from tests.small_model import loaded
from tools.mini import pack

TASKS = (("text_to_image", "digits"), ("image_classification", "digits"), ("speech_recognition", "spoken"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    OpenM6(loaded(trained_tasks=TASKS)).save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = [
        {"id": "set/kite 1", "split": "test", "image": png("red", 40), "audio": None},
        {"id": "word/one", "split": "test", "image": None, "audio": wav(seconds=0.3)},
        {"id": "set/kite 2", "split": "train", "image": png("blue", 40), "audio": None},
    ]
    (tmp_path / "corpus").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "corpus" / "icons.parquet")
    return tmp_path / "corpus"


def written(folder: Path, examples: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(examples, allow_unicode=True), encoding="utf-8")
    return path


@pytest.mark.parametrize(("weights", "error"), [("bf16", 2**-8), ("int8", 2**-6)])
def test_weights_are_close_and_small(run: Path, tmp_path: Path, weights: str, error: float) -> None:
    words = pack.pack(run, tmp_path / "packed", weights, tmp_path, written(tmp_path, {}))
    assert f"packed: {weights}, " in words
    before, after = (dict(load(path).loaded.omni.named_parameters()) for path in (run, tmp_path / "packed"))
    for name, tensor in before.items():
        assert (after[name] - tensor).abs().max() <= error * tensor.abs().max(), name
    sizes = [(path / "model.safetensors").stat().st_size for path in (run, tmp_path / "packed")]
    assert sizes[1] < (0.6 if weights == "bf16" else 0.4) * sizes[0]
    assert load(tmp_path / "packed").generate("draw one", output="image", num_inference_steps=1).size == (64, 64)


def test_int8_is_taken_only_if_bf16_is_too_large(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = written(tmp_path, {})
    assert ": bf16, " in pack.pack(run, tmp_path / "small", "auto", tmp_path, examples)
    size = pack.bytes_in_wheel(tmp_path / "small")
    monkeypatch.setattr(pack, "MAX_BYTES", int(0.9 * size))
    assert ": int8, " in pack.pack(run, tmp_path / "tight", "auto", tmp_path, examples)
    monkeypatch.setattr(pack, "MAX_BYTES", 1000)
    with pytest.raises(ConfigError, match="train a smaller model"):
        pack.pack(run, tmp_path / "none", "auto", tmp_path, examples)
    assert not (tmp_path / "none").exists()


def test_examples_bring_their_files(run: Path, tmp_path: Path, corpus: Path) -> None:
    examples = {
        "read_digit": [{"en": {"image": "icons#set/kite 1"}, "zh": {"image": "digits#digits/948"}}],
        "transcription": [{"en": {"audio": "icons#word/one"}}],
        "couplet": [{"zh": {"line": "明月松间照"}}],
    }
    words = pack.pack(run, tmp_path / "packed", "bf16", corpus, written(tmp_path, examples))
    assert words.endswith("not ready: couplet")
    packed = tmp_path / "packed"
    assert {file.name for file in packed.iterdir()} >= {"icons-set-kite-1.png", "icons-word-one.wav", "examples.yaml"}
    scenario = library_of(load(packed).loaded.description, packed).scenarios["read_digit"]
    assert example_values(scenario, "en")["image"] == png("red", 40)
    assert example_values(scenario, "zh")["image"].startswith(b"\x89PNG")


def test_the_parts_of_a_training_make_one_model(tmp_path: Path) -> None:
    model = loaded(trained_tasks=TASKS)
    tasks = [one.model_copy(update={"of_start": True}) for one in model.description.trained_tasks]
    description = model.description.model_copy(update={"trained_tasks": tasks})
    OpenM6(replace(model, description=description)).save_pretrained(tmp_path / "run")
    pack.pack(tmp_path / "run", tmp_path / "packed", "bf16", tmp_path, written(tmp_path, {}))
    found = load(tmp_path / "packed").loaded.description.trained_tasks
    assert len(found) == len(TASKS) and not any(one.of_start for one in found)


@pytest.mark.parametrize(
    ("examples", "sentence"),
    [
        ({"read_digit": [{"en": {"image": "icons#set/kite 2"}}]}, "has no test record 'set/kite 2'"),
        ({"read_digt": [{"en": {"image": "digits#digits/948"}}]}, "'read_digt', which is no scenario"),
        ({"read_digit": [{"en": {"text": "a"}}]}, "takes no input 'text'"),
    ],
)
def test_a_wrong_example_is_one_sentence(
    run: Path, tmp_path: Path, corpus: Path, examples: dict[str, object], sentence: str
) -> None:
    with pytest.raises(Exception, match=sentence):
        pack.pack(run, tmp_path / "packed", "bf16", corpus, written(tmp_path, examples))
    assert not (tmp_path / "packed").exists()


def test_the_examples_of_mini_cover_all_pairs_in_both_languages() -> None:
    library = library_of(described("mini"))
    examples = read_yaml(pack.EXAMPLES)
    for language in ("en", "zh"):
        shown = [library.scenarios[name] for name, found in examples.items() if any(language in one for one in found)]
        pairs = {(scenario.input_modality, scenario.output) for scenario in shown}
        assert pairs == {*product(MODALITIES, MODALITIES), ("text", "embedding"), ("image", "embedding")}
    words = (
        word for found in examples.values() for one in found for values in one.values() for word in values.values()
    )
    sources = {word.partition("#")[0] for word in words if isinstance(word, str) and "#" in word}
    assert sources <= set(read_recipe(recipe_path("mini"), [])[1]["sources"])
    assert len(examples) >= 30


def test_the_card_shows_the_rows(run: Path, tmp_path: Path) -> None:
    (run / "README.md").write_text("# mini\n", encoding="utf-8")
    found = {"value": 0.91, "interval": [0.88, 0.94], "n": 100, "ceiling": None, "reached": True}
    rows = {"kinship": found, "words-spoken": {"failure": "the part is missing"}}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    pack.pack(run, tmp_path / "packed", "bf16", tmp_path, written(tmp_path, {}), tmp_path / "rows.json")
    card = (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("# packed\n") and "python -m tools.mini.evaluate mini" in card
    assert "| 91.0 % | 88.0 % to 94.0 % | ≥ 85.0 % | yes | 100 | exact |" in card
    assert "| the part is missing |" in card


def test_predictors_answer_the_same_without_moments_of_folds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=(90, 3)) @ rng.normal(size=(3, 3))
    rows = [dict(zip(("height", "width", "weight"), map(float, row), strict=True)) for row in numbers]
    table = fit_table(rows, np.arange(len(rows)) % FOLDS, 0)
    assert table is not None
    path = tmp_path / "predictors.safetensors"
    path.write_bytes(to_bytes([table]))
    content = pack.compact_predictors(path)
    (packed,) = from_bytes(content, "here")
    assert len(content) < path.stat().st_size and len(packed.arrays["covariance"]) == 1
    given = {"height": 0.5, "width": -1.0}
    before, after, held = (
        one.predict("weight", given, fold) for one, fold in ((table, None), (packed, None), (packed, 2))
    )
    assert before.values.tolist() == after.values.tolist() == held.values.tolist()
    assert before.values.tolist() != table.predict("weight", given, 2).values.tolist()
