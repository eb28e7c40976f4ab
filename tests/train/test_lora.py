"""Training beside an imported decoder that stays as it is: low-rank adapters, and experts of other modalities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openm6.checkpoint.folder import latest
from openm6.core.errors import OpenM6Error
from openm6.hub.export import export_run
from openm6.hub.importing import Additions, import_model
from openm6.inference.load import load
from openm6.train.run import train_recipe
from tests.hub.published import publish
from tests.hub.test_additions import WORDS, states, text_of
from tests.train.tiny_recipe import tiny_recipe, write_recipe


def train_from(start: Path, folder: Path, evaluated: bool = False, **model: Any) -> Path:
    recipe = tiny_recipe(3) | {"model": {"start": str(start), **model}, "modalities": {}}
    recipe["eval"] = {**recipe["eval"], "at_end": evaluated}
    recipe["loop"]["optimizer"] = {"learning_rate": 0.01}
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
    with pytest.raises(OpenM6Error, match="trained without offloading"):
        recipe["model"], recipe["modalities"] = {"start": str(tmp_path / "start"), "lora": {}}, {}
        recipe["loop"]["offload"] = {}
        train_recipe(write_recipe(tmp_path, recipe), out=tmp_path / "run")
