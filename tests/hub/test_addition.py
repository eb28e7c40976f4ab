"""A run without the decoder that it was trained from: written, put onto the decoder again, refused for another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openm6.checkpoint.folder import EXPONENT, SEPARATOR, latest
from openm6.core.errors import CheckpointError, ConfigError
from openm6.hub.addition import compact
from openm6.hub.export import export_run
from openm6.hub.find import find_model
from openm6.hub.importing import Additions, import_model
from openm6.inference.load import load
from openm6.optim.low_precision import from_levels
from openm6.train.run import train_recipe
from tests.hub.published import publish
from tests.hub.test_additions import PIXELS, WORDS, states, text_of
from tests.train.test_lora import moved, weights
from tests.train.tiny_recipe import tiny_recipe, write_recipe

EXPERTS = {"intermediate_size": 16, "num_experts": 2, "top_k": 1, "balance": "aux", "lora": {"r": 4, "alpha": 8}}
MIXTURE = [{"source": "digits", "task": "image_classification"}, {"source": "penguins", "task": "tabular_regression"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder `base`, imported as `start`, and a `run` that has trained experts and low-rank updates beside it."""
    folder = tmp_path_factory.mktemp("addition")
    publish("llama", folder / "base")
    import_model(str(folder / "base"), folder / "start", receipt=False)
    model = {"start": str(folder / "start"), "freeze": ["text"], "modality_experts": EXPERTS}
    recipe = tiny_recipe(3) | {"model": model, "modalities": {}, "mixture": MIXTURE}
    recipe["eval"] = {**recipe["eval"], "at_end": False}
    recipe["loop"]["optimizer"] = {"learning_rate": 0.01}
    train_recipe(write_recipe(folder, recipe), out=folder / "run", device_name="cpu")
    return folder


def test_updates_of_attention_are_for_tokens_of_other_modalities_alone(folder: Path) -> None:
    changed = {name for name in moved(folder / "start", folder / "run") if name.startswith("backbone")}
    assert {name.split(".")[3] for name in changed} == {"modality_experts"}
    updates = {name.partition(".attention.")[2] for name in changed if ".attention." in name}
    assert updates == {f"{m}.{f}.{p}_proj" for m, ps in (("qkv", "qkv"), ("output", "o")) for f in "ab" for p in ps}
    start, run = load(folder / "start", "cpu"), load(folder / "run", "cpu")
    assert torch.equal(states(run, WORDS), states(start, WORDS)) and text_of(run) == text_of(start)
    before, count = states(run, WORDS, PIXELS, WORDS), len(states(run, WORDS))
    with torch.no_grad():
        for block in run.omni.backbone.blocks:
            block.modality_experts[0].attention["qkv"].b["v_proj"].mul_(-3)
    after = states(run, WORDS, PIXELS, WORDS)
    torch.testing.assert_close(after[:count], before[:count])
    assert (after[count:] != before[count:]).any(1).all(), "the image, and the words after it"
    assert torch.equal(states(run, WORDS), states(start, WORDS))


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 2**-6)])
def test_an_addition_and_its_decoder_are_the_run_again(folder: Path, tmp_path: Path, dtype: str, error: float) -> None:
    assert f"in {dtype}" in export_run(folder / "run", tmp_path / "added", "addition", dtype)
    names = load_file(tmp_path / "added/model.safetensors").keys()
    assert not any(name.startswith(("adapters.text", "adapters.audio", "adapters.image_out")) for name in names)
    assert not any(".mlp" in name or ".layers.0.attention" in name for name in names), "nothing of the decoder"
    adapter = Additions(adapter=tmp_path / "added")
    import_model(str(folder / "base"), tmp_path / "again", receipt=False, additions=adapter)
    before, after = weights(folder / "run"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.startswith(("adapters.audio", "adapters.image_out")):
            bound = error if name in names else 0
            assert (after[name] - tensor).abs().max() <= bound * tensor.abs().max(), name
    again, start = load(tmp_path / "again", "cpu"), load(folder / "start", "cpu")
    assert torch.equal(states(again, WORDS), states(start, WORDS))
    assert again.description.trained_tasks and again.description.base_model == str((folder / "base").resolve())


def test_weights_that_were_packed_are_packed_to_the_same_levels() -> None:
    rng = torch.Generator().manual_seed(0)
    whole = {"a": torch.randn(64, 384, generator=rng), "b": torch.randn(8, 64, 64, generator=rng) ** 3}
    whole["a"][3] = 0.0
    packed = compact(whole, "int8")
    names = [name for name in packed if name in whole]
    again = {name: from_levels(packed[name], packed[f"{name}{SEPARATOR}{EXPONENT}"], torch.float32) for name in names}
    twice = compact(again, "int8")
    assert all(torch.equal(twice[name], one) for name, one in packed.items())
    assert max(float((again[name] - one).abs().max() / one.abs().max()) for name, one in whole.items()) < 0.01


def test_an_addition_needs_its_decoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path))
    added = tmp_path / "models" / "small"
    export_run(folder / "run", added, "addition")
    with pytest.raises(CheckpointError, match=r"is an addition to base: .* openm6 import base --adapter .*small --out"):
        find_model("small")
    # An addition of the same name in the working folder hides no whole model, and alone is named as one.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    added.rename(tmp_path / "here" / "small")
    with pytest.raises(CheckpointError, match="small is an addition to base"):
        find_model("small")
    added.mkdir()
    assert find_model("small") == added
    added.rmdir()
    (tmp_path / "here" / "small").rename(added)
    publish("llama, tied", tmp_path / "other")
    adapter = Additions(adapter=added)
    with pytest.raises(CheckpointError, match="is an addition to base, and .*other is not: import that model"):
        import_model(str(tmp_path / "other"), tmp_path / "out", additions=adapter)
    with pytest.raises(ConfigError, match="leave the other options out"):
        import_model(str(folder / "base"), tmp_path / "out", additions=adapter.model_copy(update={"experts": 2}))
    description = json.loads((added / "model.json").read_text())
    description["backbone"]["modality_experts"][0]["num_experts"] = 3
    (added / "model.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"does not fit its model\.json"):
        import_model(str(folder / "base"), tmp_path / "out", additions=adapter)
    assert not (tmp_path / "out").exists()


def rewritten(added: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(added / "model.safetensors")
    change(tensors)
    save_file(tensors, added / "model.safetensors")


def first_exponent(tensors: dict[str, Tensor]) -> str:
    return min(name for name in tensors if name.endswith("::exponent"))


def described(added: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads((added / "model.json").read_text())
    change(found)
    (added / "model.json").write_text(json.dumps(found))


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an exponent is missing": (
        lambda added: rewritten(added, lambda x: x.pop(first_exponent(x))),
        "has no exponents that fit",
    ),
    "an exponent of another shape": (
        lambda added: rewritten(added, lambda x: x.update({first_exponent(x): torch.zeros(7, 3)})),
        "has no exponents that fit",
    ),
    "a weight is missing": (
        lambda added: rewritten(added, lambda x: x.pop(min(name for name in x if "::" not in name))),
        r"does not fit its model\.json",
    ),
    "no tasks, and a junk weight": (
        lambda added: (
            described(added, lambda x: x.update(trained_tasks=[])),
            rewritten(added, lambda x: x.update(junk=torch.zeros(2))),
        ),
        r"junk does not fit its model\.json",
    ),
    "other frequencies": (
        lambda added: described(added, lambda x: x["backbone"].update(rope_theta=77.0)),
        "describes another decoder than",
    ),
    "another number of layers": (
        lambda added: described(added, lambda x: x["backbone"].update(num_layers=x["backbone"]["num_layers"] + 1)),
        "describes another decoder than",
    ),
    "no text": (lambda added: (added / "model.json").write_bytes(b"\xff\xfe{"), "cannot be read"),
    "cut off": (
        lambda added: (added / "model.safetensors").write_bytes((added / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_addition_is_one_sentence(folder: Path, tmp_path: Path, case: str) -> None:
    damage, sentence = DAMAGED[case]
    export_run(folder / "run", tmp_path / "added", "addition")
    damage(tmp_path / "added")
    with pytest.raises(CheckpointError, match=sentence) as caught:
        import_model(str(folder / "base"), tmp_path / "out", additions=Additions(adapter=tmp_path / "added"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_is_no_addition_is_not_exported_as_one(folder: Path, tmp_path: Path) -> None:
    import_model(str(folder / "base"), tmp_path / "sparse", receipt=False, additions=Additions(experts=2))
    with pytest.raises(ConfigError, match="has no backbone.layers.0.mlp.up, as with --experts"):
        export_run(tmp_path / "sparse", tmp_path / "out", "addition")
    shutil.copytree(folder / "run", tmp_path / "trained")
    weights = latest(tmp_path / "trained") / "model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    changed = load_file(weights)
    changed["backbone.layers.0.mlp.up"] += 1
    save_file(changed, weights, metadata)
    assert latest(tmp_path / "trained") == weights.parent
    with pytest.raises(ConfigError, match="training has changed the weights of"):
        export_run(tmp_path / "trained", tmp_path / "out", "addition")
    with pytest.raises(ConfigError, match="--dtype q8_0 is not one of"):
        export_run(folder / "run", tmp_path / "out", "addition", "q8_0")
