"""Training beside an imported decoder that stays as it is: low-rank adapters, and experts of other modalities."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openm6.checkpoint.folder import latest, step_folder
from openm6.core.errors import OpenM6Error
from openm6.core.run_folder import RunFolder
from openm6.hub.export import export_run
from openm6.hub.importing import Additions, import_model
from openm6.inference.load import load
from openm6.optim.low_precision import from_levels
from openm6.train.convert import convert
from openm6.train.run import train_recipe
from tests.hub.published import publish
from tests.hub.test_additions import WORDS, states, text_of
from tests.train.tiny_recipe import tiny_recipe, write_recipe


def train_from(
    start: Path, folder: Path, evaluated: bool = False, precision: str = "fp32", offload: Any = None, **model: Any
) -> Path:
    recipe = tiny_recipe(3, num_processes=1) | {"model": {"start": str(start), **model}}
    recipe["modalities"] = {"numbers": {"predictors": "ridge"}}
    recipe["eval"] = {**recipe["eval"], "at_end": evaluated}
    recipe["loop"] |= {"optimizer": {"learning_rate": 0.01, "precision": precision}, "offload": offload}
    train_recipe(write_recipe(folder, recipe), out=folder / "run", device_name="cpu")
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in latest(run).glob("model*.safetensors") for name, tensor in load_file(path).items()}


def moved(start: Path, run: Path) -> set[str]:
    """The weights that training has changed, and those that are new."""
    before, after = weights(start), weights(run)
    return {name for name in after if name not in before or not torch.equal(after[name].float(), before[name].float())}


def test_only_low_rank_adapters_and_those_of_other_modalities_are_trained(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "base")
    import_model(str(tmp_path / "base"), tmp_path / "start", receipt=False)
    run = train_from(tmp_path / "start", tmp_path, lora={"r": 8, "alpha": 16}, evaluated=True)
    changed = moved(tmp_path / "start", run)
    assert all(".lora." in name for name in changed if name.startswith("backbone"))
    updates = {name.partition(".lora.")[2] for name in changed if ".lora." in name}
    assert len(updates) == 2 * 7, "two factors of seven projections"
    assert all(weights(run)[name].any() for name in changed if ".lora." in name)
    assert not any(name.startswith("adapters.text") for name in changed) and any("numbers" in name for name in changed)
    again = train_from(run, tmp_path / "again")
    changed = moved(run, again)
    assert all(".lora." in name for name in changed if name.startswith("backbone"))
    export_run(again, tmp_path / "adapter", "peft", text_only=True)
    import_model(
        str(tmp_path / "base"), tmp_path / "tuned", receipt=False, additions=Additions(adapter=tmp_path / "adapter")
    )
    tuned, same = load(tmp_path / "tuned", "cpu"), load(again, "cpu")
    torch.testing.assert_close(states(tuned, WORDS), states(same, WORDS), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an imported decoder in `start`."""
    folder = tmp_path_factory.mktemp("sparse")
    publish("qwen3_moe", folder / "base")
    import_model(str(folder / "base"), folder / "start", receipt=False)
    return folder


def stored(run: Path, step: int, kind: str) -> dict[str, torch.Tensor]:
    files = step_folder(run / "checkpoints", step).glob(f"{kind}*.safetensors")
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def is_base(name: str) -> bool:
    return name.startswith(("backbone", "adapters.text")) and ".lora." not in name


def test_over_offloaded_layers_adapters_are_those_of_a_resident_run(sparse: Path, tmp_path: Path) -> None:
    """To the bit, also after a break without the start, and exported; frozen weights have no optimizer state."""
    shutil.copytree(sparse / "start", tmp_path / "start")
    lora = {"r": 8, "alpha": 16}
    resident = train_from(sparse / "start", tmp_path / "resident", lora=lora)
    run = train_from(tmp_path / "start", tmp_path / "offloaded", offload={"num_gpu_layers": 1}, lora=lora)
    losses, other = ([line["loss"] for line in RunFolder(one).read_metrics()] for one in (resident, run))
    assert losses == other and len(set(losses)) == 3
    expected, found = stored(resident, 3, "model"), stored(run, 3, "model")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(is_base(name) for name in moved(sparse / "start", run))
    assert any(".lora." in name for name in stored(run, 3, "optimizer"))
    assert not any(is_base(name.partition("::")[0]) for name in stored(run, 3, "optimizer"))
    for one in (resident, run):
        export_run(one, one.parent / "adapter", "peft", text_only=True)
    adapters = [load_file(one.parent / "adapter" / "adapter_model.safetensors") for one in (resident, run)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    found |= stored(run, 3, "optimizer")
    shutil.rmtree(step_folder(run / "checkpoints", 3))
    shutil.rmtree(tmp_path / "start")
    train_recipe("demo", resume=True, out=run, device_name="cpu")
    again = stored(run, 3, "model") | stored(run, 3, "optimizer")
    assert again.keys() == found.keys() and all(torch.equal(again[name], found[name]) for name in found)
    merged, streamed = load(resident, "cpu"), load(run, "cpu", num_gpu_layers=1)
    for _ in range(2):  # the second time, buffers hold what was read
        torch.testing.assert_close(states(streamed, WORDS), states(merged, WORDS), atol=1e-5, rtol=1e-5)
    assert text_of(streamed) == text_of(merged)
    convert(run, tmp_path / "fewer", precision="int8-adafactor")
    assert stored(tmp_path / "fewer", 3, "optimizer").keys() == stored(run, 3, "optimizer").keys()
    train_recipe("demo", ["loop.steps=4"], resume=True, out=tmp_path / "fewer", device_name="cpu")
    assert stored(tmp_path / "fewer", 4, "model").keys() > expected.keys()


@pytest.mark.parametrize("precision", ["bf16-adafactor", "int8-adafactor"])
def test_frozen_weights_of_fewer_bytes_are_rounded_once(sparse: Path, precision: str, tmp_path: Path) -> None:
    """To the nearest value when they are first stored; a start that was trained in these bytes keeps them."""
    lora, start = {"r": 8}, weights(sparse / "start")
    run = train_from(sparse / "start", tmp_path / "first", precision == "int8-adafactor", precision, lora=lora)
    whole = train_from(sparse / "start", tmp_path / "whole", precision=precision)
    again = train_from(whole, tmp_path / "second", precision=precision, lora=lora)
    first, last = stored(run, 2, "model"), stored(run, 3, "model")
    trained, kept = stored(whole, 3, "model"), stored(again, 3, "model")
    matrices = [name for name in first if is_base(name) and first[name].dtype in (torch.int8, torch.bfloat16)]
    assert len(matrices) == 3 * 4 * (1 + (precision == "int8-adafactor"))
    assert all(torch.equal(first[name], last[name]) and torch.equal(trained[name], kept[name]) for name in matrices)
    assert not any(torch.equal(first[name], trained[name]) for name in matrices if "::" not in name)
    for name in (name for name in matrices if "::" not in name):
        if precision == "bf16-adafactor":
            assert torch.equal(first[name], start[name].bfloat16())
        else:
            exponent = first[f"{name}::exponent"]
            half = 0.5 * from_levels(torch.ones_like(first[name]), exponent, torch.float32)
            error = (from_levels(first[name], exponent, torch.float32) - start[name].float()).abs()
            assert (error <= 1.001 * half).all() and error.any()


def test_text_stays_to_the_bit_while_other_modalities_are_trained(tmp_path: Path) -> None:
    publish("llama", tmp_path / "base")
    import_model(str(tmp_path / "base"), tmp_path / "text", receipt=False)
    added = Additions(modalities=("image", "audio", "numbers"))
    import_model(str(tmp_path / "base"), tmp_path / "start", receipt=False, additions=added)
    run = train_from(tmp_path / "start", tmp_path, freeze=["text"])
    changed = moved(tmp_path / "start", run)
    assert {name.split(".")[3] for name in changed if name.startswith("backbone")} == {"modality_experts"}
    assert len([name for name in changed if name.startswith("backbone")]) == 3 * 3
    before, after = load(tmp_path / "text", "cpu"), load(run, "cpu")
    assert torch.equal(states(after, WORDS), states(before, WORDS)) and text_of(after) == text_of(before)


def test_what_adapters_cannot_do_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(1)
    recipe["model"] = {"preset": "nano", "lora": {}}
    with pytest.raises(OpenM6Error, match="lora adapts the weights of a start: add start: RUN"):
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    publish("llama", tmp_path / "base")
    import_model(str(tmp_path / "base"), tmp_path / "start", receipt=False)
    with pytest.raises(OpenM6Error, match="modality experts are trained without offloading: leave loop.offload and"):
        experts = {"modalities": ["image"], "intermediate_size": 32, "num_experts": 2, "top_k": 1}
        recipe["model"], recipe["modalities"] = {"start": str(tmp_path / "start"), "modality_experts": experts}, {}
        recipe["loop"]["offload"] = {}
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
    with pytest.raises(OpenM6Error, match="modality_experts.modalities names 'image_ot'; did you mean 'image_out'"):
        recipe["model"]["modality_experts"] = {**experts, "modalities": ["image_ot"]}
        del recipe["loop"]["offload"]
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
