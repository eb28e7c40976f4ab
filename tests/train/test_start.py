"""Fine-tuning: frozen weights, resuming without the start, joined descriptions, replay, and refused recipes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openm6.checkpoint.folder import latest
from openm6.codecs.mel_encoder import MelEncoder, MelEncoderConfig
from openm6.codecs.registry import save_codec
from openm6.core.config import build
from openm6.core.errors import ConfigError, OpenM6Error
from openm6.core.run_folder import RunFolder
from openm6.distributed.process_group import ProcessGroupContext
from openm6.evaluate.run import chosen_tasks, evaluate
from openm6.hub.importing import import_model
from openm6.inference.load import LoadedModel, load, read_texts
from openm6.models.omni import Omni
from openm6.models.presets import ModelConfig, build_backbone
from openm6.plan.request import read_model
from openm6.train.multimodal_data import pack_held_out
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import train_recipe, train_values
from openm6.train.start import freeze
from tests.hub.published import publish
from tests.small_model import modalities
from tests.train.tiny_recipe import MODEL, tiny_recipe, write_recipe

# How much the loss on held-out records of the old task may rise, with a tenth of the examples from its mixture.
MAX_FORGOTTEN = 0.4


def write_table(folder: Path, rows: int = 60, classes: tuple[str, str] = ("wide", "deep")) -> Path:
    """Boxes, of which one column is of the start's table with its meaning, and a class that follows from two others."""
    rng = np.random.default_rng(0)
    path = folder / "boxes.csv"
    side, depth = rng.uniform(1, 9, rows), rng.uniform(1, 9, rows)
    names = np.where(side > depth, *classes)
    lines = [f"{a:.2f},{b:.2f},{4000 + 100 * a:.0f},{name}" for a, b, name in zip(side, depth, names, strict=True)]
    path.write_text("side,depth,body_mass_g,shape\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def tuned_recipe(start: Path, table: Path, steps: int = 4, **model: Any) -> dict[str, Any]:
    """A recipe over the table that starts from a run."""
    recipe = tiny_recipe(steps)
    fields = {"numbers": ["side", "depth", "body_mass_g"], "label": "shape"}
    recipe["sources"] = {"penguins": {"kind": "csv", "path": str(table), "fields": fields}}
    recipe["mixture"] = [
        {"source": "penguins", "task": task} for task in ("tabular_regression", "tabular_classification")
    ]
    return {**recipe, "model": {"start": str(start), **model}, "modalities": {}}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    recipe = tiny_recipe(2) | {"eval": {"at_end": False}}
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def tuned(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its start is gone."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(start, folder / "start")
    recipe = tuned_recipe(folder / "start", write_table(folder), freeze=["backbone", "text", "adapters.audio_in"])
    recipe["replay"] = 0.2
    train_recipe(write_recipe(folder, recipe), out=folder / "run")
    shutil.rmtree(folder / "start")
    return folder / "run"


PARTS = [f"backbone.layers.1.{name}" for name in ("attention.qkv", "mlp.experts.down")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(latest(run) / "model.safetensors")


def test_frozen_weights_stay_to_the_bit(start: Path, tuned: Path) -> None:
    before, after = weights(start), weights(tuned)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("adapters.") for name in moved)
    assert not any(name.startswith(("adapters.text", "adapters.audio_in")) for name in moved)
    assert {name.split(".")[1] for name in moved} >= {"numbers_in", "numbers_out"}


def test_with_offloaded_layers_what_is_frozen_and_what_is_trained_is_the_same(start: Path, tmp_path: Path) -> None:
    """Of one layer all, of the other a part."""
    found = []
    for name, offload in (("resident", None), ("offloaded", {"num_gpu_layers": 0})):
        recipe = tuned_recipe(start, write_table(tmp_path), freeze=["text", "backbone.layers.0", *PARTS])
        recipe["loop"] |= {"offload": offload, "num_processes": 1, "max_grad_norm": None}
        recipe["eval"] = {"at_end": False}
        train_recipe(write_recipe(tmp_path, recipe, name), out=tmp_path / name)
        files = latest(tmp_path / name).glob("model*.safetensors")
        found.append({key: tensor for path in files for key, tensor in load_file(path).items()})
    before, (resident, offloaded) = weights(start), found
    assert before.keys() == resident.keys() and all(torch.equal(offloaded[name], resident[name]) for name in resident)
    moved = {name for name in before if not torch.equal(before[name], offloaded[name])}
    assert {name for name in moved if "layers" in name and "norm" not in name} == {
        f"backbone.layers.1.{name}"
        for name in ("attention.output", "mlp.experts.up", "mlp.router.weight", "mlp.router.bias")
    }


def test_a_run_resumes_without_its_start(tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    result = train_recipe("demo", resume=True, out=tmp_path / "run")
    assert result is not None and result.steps == 4
    before, after = weights(tuned), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_texts(latest(tmp_path / "run")) == read_texts(latest(tuned))


def test_what_both_know_stays_and_what_is_new_joins(start: Path, tuned: Path) -> None:
    (before, words), (after, same_words) = read_texts(latest(start)), read_texts(latest(tuned))
    assert words == same_words and after.backbone == before.backbone and after.modalities == before.modalities
    assert after.scales == {**after.scales, **before.scales} and {"side", "depth"} <= after.scales.keys()
    assert after.sources["penguins"]["kind"] == "csv"
    assert after.sources["penguins_of_start"] == before.sources["penguins"]
    named = [f"{one.task}/{one.source}" for one in chosen_tasks(after, None)]
    assert named[:2] == ["tabular_regression/penguins", "tabular_classification/penguins"]
    assert len(named) == 7 and "tabular_regression/penguins_of_start" in named
    weight = {one.source: one.weight for one in after.trained_tasks}
    assert weight["digits"] == pytest.approx(0.1) and weight["penguins"] == 1
    report = json.loads((tuned / "report.json").read_text(encoding="utf-8"))
    assert set(report["tasks"]) == set(named)
    sources = {name: table.sources for table in load(tuned).numbers.predictors for name in table.numbers}
    assert sources["side"] == ["penguins"] and sources["bill_length_mm"] == ["penguins_of_start"]


def test_tasks_of_the_start_alone_are_not_evaluated_again(start: Path, tmp_path: Path) -> None:
    recipe = tuned_recipe(start, write_table(tmp_path), steps=1)
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    found = evaluate(tmp_path / "run")
    assert [result.source for result in found.results] == ["penguins", "penguins"]
    assert len(load(tmp_path / "run").description.trained_tasks) == 7
    few = [f"eval.{name}=2" for name in ("records", "answers", "drawn")]
    everything = evaluate(tmp_path / "run", settings=["eval.of_start=true", *few])
    assert len(everything.results) == 7
    again = evaluate(tmp_path / "run", ["image_classification"])
    assert [result.source for result in again.results] == ["digits"]


def test_an_imported_decoder_is_a_start(tmp_path: Path) -> None:
    publish("llama", tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "imported", receipt=False)
    recipe = tuned_recipe(tmp_path / "imported", write_table(tmp_path), steps=1)
    texts = {"text_en": "shape", "numbers": ["side"]}
    recipe["sources"]["penguins"]["fields"] = texts
    recipe["mixture"] = [{"source": "penguins", "task": "text_regression"}]
    recipe["modalities"] = {"image": {"codec": "image-256"}}  # of which it generates nothing
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    (before, _), (after, _) = read_texts(latest(tmp_path / "imported")), read_texts(latest(tmp_path / "run"))
    assert after.modalities.prompt_attention == "causal" and after.base_model == before.base_model
    assert after.modalities.text.imported == before.modalities.text.imported
    assert load(tmp_path / "run", "cpu").image.codec.step == 4
    with pytest.raises(OpenM6Error, match="a model of another library: import it first"):
        train_recipe(write_recipe(tmp_path, tuned_recipe(tmp_path / "theirs", tmp_path)), out=tmp_path / "no")


def test_another_codec_generates_anew_and_all_else_is_kept(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(2) | {"eval": {"at_end": False}}
    recipe["mixture"] = [{"source": "digits", "task": "tabular_to_image"}]
    recipe |= {"modalities": {"image": {"codec": "image-256"}}, "packing": {"batch_size": 2, "seq_len": 400}}
    recipe["model"] = {"start": str(start), "freeze": ["backbone", "text", "numbers", "audio", "image_in"]}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run", resume=True)
    before, after = read_texts(latest(start))[0], read_texts(latest(tmp_path / "run"))[0]
    assert "no longer trained: text_to_image of digits" in caplog.text
    kept = {one.task for one in before.trained_tasks} - {"text_to_image"}
    assert {one.task for one in after.trained_tasks} == kept | {"tabular_to_image"}
    assert after.external["audio.codec"] == before.external["audio.codec"]
    assert after.external["image.codec"] != before.external["image.codec"]
    old, new = weights(start), weights(tmp_path / "run")
    assert new["adapters.image_out.to_codes"].shape != old["adapters.image_out.to_codes"].shape
    assert all(torch.equal(new[name], one) for name, one in old.items() if ".image_out." not in name)
    assert load(tmp_path / "run", "cpu").image.codec.step == 4


def test_another_encoder_reads_and_all_else_is_kept(
    start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_codec(MelEncoder(MelEncoderConfig(channels=(4, 4, 4), width=12)), tmp_path / "encoder.safetensors")
    recipe = tiny_recipe(2) | {"eval": {"at_end": False}}
    recipe["mixture"] = [{"source": "spoken", "task": "audio_classification"}]
    recipe["modalities"] = {"audio": {"encoder": str(tmp_path / "encoder.safetensors")}}
    recipe["model"] = {"start": str(start), "freeze": ["backbone", "text", "numbers", "audio_out", "image"]}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run", resume=True)
    before, after = read_texts(latest(start))[0], read_texts(latest(tmp_path / "run"))[0]
    assert "no longer trained: speech_recognition of spoken" in caplog.text
    kept = {one.task for one in before.trained_tasks} - {"speech_recognition"}
    assert {one.task for one in after.trained_tasks} == kept | {"audio_classification"}
    assert set(after.external) - set(before.external) == {"audio.encoder"}
    old, new = weights(start), weights(tmp_path / "run")
    assert new["adapters.audio_in.inner.weight"].shape == (64, 12)
    assert all(torch.equal(new[name], one) for name, one in old.items() if ".audio_in." not in name)
    place = "adapters.audio_{}.place.mix.weight".format
    assert torch.equal(new[place("out")], old[place("in")]), "what is generated keeps its positions"
    assert not torch.equal(new[place("in")], old[place("in")])
    assert isinstance(load(tmp_path / "run", "cpu").audio.mel_encoder, MelEncoder)


def test_positions_that_patches_and_codes_share_are_frozen_with_either(start: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(2) | {"eval": {"at_end": False}, "modalities": {}}
    recipe["mixture"] = [{"source": "digits", "task": "image_classification"}]
    recipe["model"] = {"start": str(start), "freeze": ["backbone", "text", "numbers", "audio", "image_out"]}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    old, new = weights(start), weights(tmp_path / "run")
    moved = {name for name, one in old.items() if not torch.equal(new[name], one)}
    assert moved and all(".image_in." in name and ".place." not in name for name in moved)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_processes_share_steps_of_modality_experts_beside_embeddings_that_are_not_trained(tmp_path: Path) -> None:
    first = tiny_recipe(2) | {"eval": {"at_end": False}, "embedding": {}}
    train_recipe(write_recipe(tmp_path, first), out=tmp_path / "start")
    experts = {"modalities": ["image_out"], "intermediate_size": 32, "num_experts": 2, "top_k": 1, "balance": "none"}
    model = {"freeze": ["text", "numbers", "audio", "image_in", "pool"], "modality_experts": experts}
    for workers in (1, 2):
        recipe = tiny_recipe(3, num_processes=workers) | {"eval": {"at_end": False}, "modalities": {}}
        recipe |= {"packing": {"batch_size": 2, "seq_len": 400}, "model": {"start": str(tmp_path / "start"), **model}}
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / f"run-{workers}")
    before, alone, together = (weights(tmp_path / name) for name in ("start", "run-1", "run-2"))
    moved = {name for name, one in alone.items() if name not in before or not torch.equal(one, before[name])}
    assert moved and all("modality_experts" in name or "image_out" in name for name in moved)
    for name, one in alone.items():
        torch.testing.assert_close(one, together[name], rtol=1e-3, atol=1e-5, msg=name)


def test_columns_that_tasks_read_do_not_part_a_source_from_that_of_the_start(tmp_path: Path) -> None:
    table = write_table(tmp_path)
    for name, columns in (("start", ["side"]), ("run", ["depth"])):
        recipe = tiny_recipe(2) | {"eval": {"at_end": False}}
        recipe["sources"] = {"boxes": {"kind": "csv", "path": str(table), "fields": {"numbers": ["body_mass_g"]}}}
        task = {"inputs": {"size": {"numbers": columns}}, "target": {"category": "shape"}}
        task |= {"summary": "Name the shape", "prompts": {"en": "{size} Shape?"}}
        recipe["tasks"] = {f"shape_by_{columns[0]}": task}
        recipe["mixture"] = [{"source": "boxes", "task": f"shape_by_{columns[0]}"}]
        if name == "run":
            recipe |= {"model": {"start": str(tmp_path / "start")}, "modalities": {}}
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / name)
    found = read_texts(latest(tmp_path / "run"))[0]
    assert list(found.sources) == ["boxes"] and len(found.trained_tasks) == 2
    columns = found.sources["boxes"]["task_fields"].values()
    assert {"side", "depth", "shape"} <= {name for names in columns for name in names or ()}
    tables = load(tmp_path / "run").numbers.predictors
    assert [table.numbers for table in tables] == [["depth"], ["side"]], "the new task has predictors, too"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no start": ({"model": {"start": "/none"}}, "there is no run or checkpoint at /none"),
    "two starts": ({"model": {"start": ["a", "b"]}}, "model.start: Input should be a valid string"),
    "two shapes": ({"model": {"preset": "nano", "start": "a"}}, "start=a has a shape of its own: leave preset out"),
    "frozen noise": ({"model": {"freeze": ["text"]}}, "freeze keeps weights of a start"),
    "unknown part": ({"freeze": ["txt"]}, r"names 'txt', which no .* did you mean 'text'\? \(known: text, image"),
    "all": ({"freeze": ["backbone", "adapters"]}, "leaves nothing to train"),
    "all that is used": ({"freeze": ["backbone", "text", "numbers"]}, "leaves nothing to train"),
    "other codec": ({"modalities": {"image": {"patch": 16}}}, "modalities.image.patch differs from that of"),
    "other prompts": ({"modalities": {"prompt_attention": "causal"}}, "modalities.prompt_attention differs"),
    "another codec, frozen": (
        {"modalities": {"image": {"codec": "image-256"}}, "freeze": ["image"]},
        "modalities.image.codec is another one than in the start: add a task whose output is image",
    ),
    "another encoder, not used": (
        {"modalities": {"audio": {"encoder": "openm6:mini"}}},
        "modalities.audio.encoder is another one than in the start: add a task whose input is audio",
    ),
    "replay of nothing": ({"model": {}, "replay": 0.1}, "replay=0.1 is for the mixture of a start"),
    "too much replay": ({"replay": 1}, "replay: Input should be less than 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_recipe_is_one_sentence(case: str, start: Path, tmp_path: Path) -> None:
    changes, sentence = BAD[case]
    recipe = tuned_recipe(start, write_table(tmp_path))
    if "freeze" in changes:
        changes = {**changes, "model": {"start": str(start), "freeze": changes["freeze"]}}
    recipe |= {key: value for key, value in changes.items() if key != "freeze"}
    with pytest.raises(OpenM6Error, match=sentence) as caught:
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_a_shipped_recipe_without_its_start_names_the_commands_that_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OpenM6Error, match="no run at runs/smollm2: make it with the commands at the head of (.*)") as e:
        train_recipe("smol")
    head = Path(str(e.value).rpartition(" ")[2]).read_text(encoding="utf-8").partition("kind:")[0]
    assert "openm6 import" in head and not list(tmp_path.iterdir())


def test_a_start_of_another_version_and_another_start_are_refused(start: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(latest(start), tmp_path / "old")
    model = json.loads((tmp_path / "old" / "model.json").read_text(encoding="utf-8"))
    changed = json.dumps({**model, "format": 99}).ljust((tmp_path / "old" / "model.json").stat().st_size)
    (tmp_path / "old" / "model.json").write_text(changed, encoding="utf-8")
    state = json.loads((tmp_path / "old" / "state.json").read_text(encoding="utf-8"))
    state["files"]["model.json"] = len(changed.encode())
    (tmp_path / "old" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    recipe = write_recipe(tmp_path, tuned_recipe(tmp_path / "old", write_table(tmp_path)))
    with pytest.raises(OpenM6Error, match="it is from another version"):
        train_recipe(recipe, out=tmp_path / "run")
    with pytest.raises(OpenM6Error, match="plan that run, or name a preset"):
        read_model(recipe)


def test_a_batch_without_anything_to_train_changes_nothing(start: Path, tmp_path: Path) -> None:
    """Of record_regression, images may be inputs, and here are none."""
    recipe = tuned_recipe(start, write_table(tmp_path), steps=2, freeze=["backbone", "text", "numbers"])
    recipe["mixture"] = [{"source": "penguins", "task": "record_regression"}]
    recipe["eval"] = {"at_end": False}
    train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    before, after = weights(start), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


def held_out_loss(run: Path, values: dict[str, Any]) -> float:
    """The loss per example of a run on held-out records of a recipe's mixture."""
    loaded: LoadedModel = load(run, "cpu")
    recipe = build(MultimodalRecipe, values, "a recipe")
    batches = pack_held_out(recipe, loaded.modalities, ProcessGroupContext(), 3)
    with torch.no_grad():
        found = [loaded.omni.compute_loss(batch, as_trained=True)[0] for batch in batches]
    total = sum(float(part.total) for losses in found for part in losses.values())
    return total / sum(batch.num_examples for batch in batches)


def test_replay_keeps_the_old_task_and_a_start_helps_the_new_one(tmp_path: Path) -> None:
    """After 40 steps each. The new task has the old one's classes, which follow from other columns."""
    loop: dict[str, Any] = {"precision": "fp32", "num_processes": 1, "tensorboard": False}
    old: dict[str, Any] = {
        "model": MODEL, "modalities": {"text": {"vocab_size": 400}, "numbers": {"predictors": "none"}},
        "sources": {"penguins": {"kind": "embedded", "name": "penguins"}},
        "mixture": [{"source": "penguins", "task": "tabular_classification"}],
        "packing": {"batch_size": 2, "seq_len": 128}, "eval": {"at_end": False},
        "loop": loop | {"steps": 80, "optimizer": {"learning_rate": 0.003}},
    }  # fmt: skip
    table = write_table(tmp_path, 300, ("Adelie", "Gentoo"))
    new = old | {
        "sources": {
            "boxes": {"kind": "csv", "path": str(table), "fields": {"numbers": ["side", "depth"], "label": "shape"}}
        },
        "mixture": [{"source": "boxes", "task": "tabular_classification"}],
        "loop": loop | {"steps": 40, "optimizer": {"learning_rate": 0.001}},
    }
    tuned = {key: value for key, value in new.items() if key != "modalities"} | {
        "model": {"start": str(tmp_path / "old")}
    }
    for name, values in (("old", old), ("scratch", new), ("tuned", tuned), ("replayed", tuned | {"replay": 0.1})):
        train_values(values, name, RunFolder(tmp_path / name), "cpu")
    before, without, replayed = (held_out_loss(tmp_path / name, old) for name in ("old", "tuned", "replayed"))
    assert replayed < (1 + MAX_FORGOTTEN) * before < without
    scratch, *started = (held_out_loss(tmp_path / name, new) for name in ("scratch", "tuned", "replayed"))
    assert max(started) < scratch / 2


def test_experts_for_some_tokens_are_frozen_with_them() -> None:
    shape = {"intermediate_size": 16, "num_experts": 2, "top_k": 1, "balance": "aux"}
    groups = (["numbers"], ["image_out"], ["image_in", "audio"])
    added = [{**shape, "modalities": names} for names in groups]
    config = build_backbone(ModelConfig(preset="nano", overrides={**MODEL["overrides"], "modality_experts": added}))
    for names, expected in ((["text"], set()), (["numbers"], {0}), (["image"], {1}), (["image_out"], {1}),
                            (["image_in"], set()), (["image", "audio"], {1}), (["backbone"], {0, 1, 2})):  # fmt: skip
        omni = Omni(config, modalities())
        freeze(omni, names, {"text", "image", "audio", "numbers"})
        parts = [(key.split("modality_experts.")[1][0], one.requires_grad) for key, one in omni.named_parameters()
                 if ".modality_experts." in key]  # fmt: skip
        assert {int(number) for number, trained in parts if not trained} == expected, names
        assert all(len({trained for other, trained in parts if other == number}) == 1 for number, _ in parts)
        shared = omni.backbone.blocks[0].attention.qkv.requires_grad
        assert shared == (names not in (["text"], ["backbone"]))
    for_text = [{**shape, "modalities": ["image", "text"]}]
    config = build_backbone(ModelConfig(preset="nano", overrides={**MODEL["overrides"], "modality_experts": for_text}))
    with pytest.raises(ConfigError, match="modality_experts are not for text, .*: take text out of modalities"):
        Omni(config, modalities())
