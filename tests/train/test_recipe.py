"""The recipes in the package are valid, and everything that they name is there."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from openm6.core.config import build
from openm6.core.errors import ConfigError, TrainingError
from openm6.core.run_folder import RunFolder
from openm6.data.sources import open_sources
from openm6.distributed.process_group import ProcessGroupContext
from openm6.modalities.registry import MODALITIES
from openm6.modalities.text import train_tokenizer
from openm6.models.presets import PRESETS, ModelConfig, build_backbone, preset
from openm6.offload.config import OffloadConfig
from openm6.plan.request import read_model
from openm6.tasks.registry import TASKS
from openm6.train import multimodal_data
from openm6.train.config import StagesConfig, SwitchConfig
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import MAX_TOKENS, MultimodalRecipe, fit_batch_size, fit_learning_rate
from openm6.train.run import (
    SHIPPED,
    TRAININGS,
    read_recipe,
    recipe_path,
    train_recipe,
    with_batch_size,
    with_learning_rate,
)
from tests.devices import CPU, GPU
from tests.train.tiny_recipe import tiny_recipe, write_recipe
from tests.train.words_training import WordsTraining, words_backbone

DEMO = read_recipe(recipe_path("demo"), [])[0]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path) -> None:
    assert read_recipe(path, [])[0].kind == read_recipe(recipe_path(path.stem), [])[1]["kind"]


def test_the_demo_is_found_by_its_path_in_the_package() -> None:
    assert recipe_path("recipes/demo.yaml").name == "demo.yaml"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_source_of_the_demo_opens_with_what_its_tasks_need(split) -> None:
    assert isinstance(DEMO, MultimodalRecipe)
    sources = open_sources(DEMO.sources, split)
    for component in DEMO.mixture:
        source = sources[component.source]
        assert len(source) > 20
        assert all(TASKS[component.task].languages(source[index]) for index in (0, len(source) // 2, -1))


def test_the_demo_learns_all_pairs_of_modalities() -> None:
    assert isinstance(DEMO, MultimodalRecipe)
    pairs = {(TASKS[part.task].input_modality, TASKS[part.task].output_modality) for part in DEMO.mixture}
    assert pairs == set(product(MODALITIES, MODALITIES))


def test_training_and_test_records_of_the_demo_are_not_the_same() -> None:
    assert isinstance(DEMO, MultimodalRecipe)
    train, test = (open_sources(DEMO.sources, split) for split in ("train", "test"))
    for name in DEMO.sources:
        assert not set(train[name].values("id")) & set(test[name].values("id")), name


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_weight_is_above_zero(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"loss_weights\.text: Input should be .* \(given: "):
        build(MultimodalRecipe, tiny_recipe() | {"loss_weights": {"text": weight}}, "tiny")


def test_overrides_change_a_preset_field_by_field() -> None:
    choice = ModelConfig(preset="nano", overrides={"num_layers": 2, "experts": {"num_experts": 4}})
    found, plain = build_backbone(choice), preset("nano").backbone
    assert found.num_layers == 2 and found.hidden_size == plain.hidden_size
    assert found.experts is not None and plain.experts is not None
    assert (found.experts.num_experts, found.experts.intermediate_size) == (
        4,
        plain.experts.intermediate_size,
    )
    assert build_backbone(ModelConfig(preset="nano")) == plain


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("named", [None, 2048])
def test_a_plan_and_a_run_of_a_preset_have_one_backbone_and_one_vocabulary(
    name: str, named: int | None, tmp_path: Path
) -> None:
    values = tiny_recipe() | {"model": {"preset": name}, "modalities": {"text": {"vocab_size": named}}}
    trained = build(MultimodalRecipe, values, "recipe")
    planned = read_model(write_recipe(tmp_path, values))
    assert trained.vocabulary == planned.vocabulary == (named or read_model(name).vocabulary)
    assert build_backbone(trained.model) == planned.backbone == read_model(name).backbone
    assert read_model(name).vocabulary == preset(name).vocab_size


@pytest.mark.parametrize(("named", "expected"), [(None, 4096), (400, 400)])
def test_the_tokenizer_is_trained_at_that_size(
    named: int | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def learn(texts: Iterable[str], size: int) -> Tokenizer:
        sizes.append(size)
        return train_tokenizer(texts, 400)

    monkeypatch.setattr(multimodal_data, "train_tokenizer", learn)
    values = tiny_recipe() | {"modalities": {"text": {"vocab_size": named}}}
    training = MultimodalTraining(build(MultimodalRecipe, values, "recipe"), RunFolder(tmp_path), torch.device("cpu"))
    assert sizes == [expected] and training.description.modalities.text.vocab_size == expected


def test_a_batch_grows_with_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In powers of two per rank; a number in the recipe stands, and on a CPU there are four rows."""
    assert isinstance(DEMO, MultimodalRecipe)
    rows = [fit_batch_size(DEMO, gib * 2**30, 1) for gib in (0.05, 0.5, 1, 2, 80)]
    assert rows[0] == 4 and rows == sorted(rows) and rows[1] < rows[3] and rows[-1] * 512 == MAX_TOKENS
    assert all(count.bit_count() == 1 for count in rows)
    assert fit_batch_size(DEMO, 0.5 * 2**30, 3) == 3 * rows[1]
    image = DEMO.modalities.image.model_copy(update={"stem": "conv", "patch": 16})
    convolved = DEMO.model_copy(update={"modalities": DEMO.modalities.model_copy(update={"image": image})})
    assert fit_batch_size(convolved, 2**30, 1) < rows[2], "what a convolutional stem keeps takes memory, too"
    shared = DEMO.model_copy(update={"model": ModelConfig(preset=DEMO.model.preset, overrides={"sharing": "all"})})
    stages = StagesConfig(switch=SwitchConfig(step=9))
    staged = shared.model_copy(update={"loop": DEMO.loop.model_copy(update={"stages": stages})})
    assert [fit_batch_size(recipe, 0.8 * 2**30, 1) for recipe in (shared, staged, DEMO)] == [32, 16, 16]
    offloaded = DEMO.model_copy(update={"loop": DEMO.loop.model_copy(update={"offload": OffloadConfig()})})
    assert fit_batch_size(offloaded, 80 * 2**30, 1) == 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (80 * 2**30, 80 * 2**30))
    chosen, values = with_batch_size(DEMO, {"packing": {"seq_len": 512}}, GPU, ProcessGroupContext())
    assert chosen.packing.rows == rows[-1] and values["packing"] == {"seq_len": 512, "batch_size": rows[-1]}
    for recipe, device in ((DEMO, CPU), (chosen, GPU)):
        assert with_batch_size(recipe, {}, device, ProcessGroupContext()) == (recipe, {})
    assert DEMO.packing.rows == 4


@pytest.mark.parametrize(("name", "rate"), [("nano", 1e-3), ("tiny", 1e-3), ("small", 6e-4), ("base", 3e-4)])
def test_the_learning_rate_falls_with_the_width_unless_it_is_set(name: str, rate: float) -> None:
    def chosen(**optimizer: Any) -> tuple[float, dict[str, Any]]:
        values = tiny_recipe(optimizer=optimizer) | {"model": {"preset": name}}
        recipe, written = with_learning_rate(build(MultimodalRecipe, values, "recipe"), values)
        # A run that begins with the written settings has the same rate.
        assert fit_learning_rate(build(MultimodalRecipe, written, "recipe")) == recipe.loop.optimizer.learning_rate
        return recipe.loop.optimizer.learning_rate, written["loop"]["optimizer"]

    found, written = chosen(weight_decay=0.2)
    assert found == pytest.approx(rate, rel=0.01)
    assert written == {"weight_decay": 0.2} | ({} if rate == 1e-3 else {"learning_rate": found})
    assert chosen(learning_rate=2e-3)[0] == 2e-3 and chosen(name="muon")[0] == 1e-3


def test_rows_are_chosen_once_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if a launcher restarts a run that has no settings yet, or a run begins with a config.yaml that is there.

    Settings without a checkpoint may be of an older run: a restart leaves them alone.
    """
    written: list[Any] = []
    monkeypatch.setitem(TRAININGS, "multimodal", (MultimodalRecipe, lambda *_: WordsTraining(words_backbone())))
    monkeypatch.setattr("openm6.train.run.train", lambda *_, settings: written.append(settings))
    monkeypatch.setattr("openm6.train.run.with_batch_size", lambda recipe, values, *_: (recipe, {**values, "rows": 6}))
    path, run = write_recipe(tmp_path, tiny_recipe()), RunFolder.open(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train_recipe(path, out=run.path, device_name="cpu")
    run.write_config(tiny_recipe(steps=99))
    train_recipe(path, out=run.path, device_name="cpu")
    assert [settings["loop"]["steps"] for settings in written] == [6, 6]
    with monkeypatch.context() as begun:
        begun.setattr("openm6.train.run.list_checkpoints", lambda _: [run.checkpoints / "step-1"])
        train_recipe(path, out=run.path, device_name="cpu")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    train_recipe(str(run.config), out=run.path, device_name="cpu")
    assert [settings and settings["rows"] for settings in written] == [6, 6, None, 6]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_refused(tmp_path: Path, resume: bool) -> None:
    path, run = write_recipe(tmp_path, tiny_recipe()), RunFolder.open(tmp_path / "run")
    run.write_config(tiny_recipe())
    before = run.config.read_bytes()
    with run.lock(), pytest.raises(TrainingError, match="is being trained by another process"):
        train_recipe(path, ["loop.steps=9"], resume, out=run.path, device_name="cpu")
    assert run.config.read_bytes() == before and list(run.path.iterdir()) == [run.config]
