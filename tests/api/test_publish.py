"""Publishing: what is written loads with equal answers, has a card that the Hub reads, and no private path."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import openm6
from openm6.core.errors import ConfigError, OutputError
from openm6.core.run_folder import RunFolder
from openm6.evaluate.report import write_report
from openm6.evaluate.results import read_account, run_facts
from openm6.hub.importing import import_model
from openm6.inference.load import load
from tests.evaluate.example_report import eval_report

hub = pytest.importorskip("huggingface_hub")
NUMBERS = {"bill_length_mm": 40.0, "flipper_length_mm": 190.0, "body_mass_g": None}


def answers(m6: openm6.OpenM6) -> tuple[Any, ...]:
    weight = m6.generate(numbers=NUMBERS, output="numbers")
    image = m6.generate("draw the digit seven", output="image", num_inference_steps=2)
    return m6.generate("What is this?", max_new_tokens=8), weight.mean, np.asarray(image).tobytes()


def metadata(folder: Path) -> dict[str, Any]:
    """The front matter as the Hub's own library reads it."""
    found = hub.metadata_load(folder / "README.md")
    assert hub.ModelCard.load(folder / "README.md", ignore_metadata_errors=False).data.library_name == "openm6"
    return found


def test_what_is_saved_is_loaded_with_equal_answers(m6: openm6.OpenM6, tmp_path: Path) -> None:
    m6.save_pretrained(tmp_path / "out", license="apache-2.0")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    weights = ["model.safetensors", "predictors.safetensors"]
    assert names == ["README.md", "model.json", *weights, "state.json", "tokenizer.json"]
    checkpoint = m6.loaded.checkpoint
    assert all((tmp_path / "out" / one).read_bytes() == (checkpoint / one).read_bytes() for one in weights)
    again = openm6.OpenM6.from_pretrained(tmp_path / "out")
    assert answers(again) == answers(m6) == answers(pickle.loads(pickle.dumps(m6)))  # noqa: S301
    found = metadata(tmp_path / "out")
    assert (found["license"], found["pipeline_tag"], found["language"]) == ("apache-2.0", "any-to-any", ["en", "zh"])
    assert found["co2_eq_emissions"]["emissions"] > 0 and found["model-index"][0]["name"] == "run"
    # The card of a published model goes with it, as edited.
    with (tmp_path / "out/README.md").open("a") as stream:
        stream.write("Mine.\n")
    again.save_pretrained(tmp_path / "next")
    assert (tmp_path / "next/README.md").read_text().endswith("Mine.\n")
    assert metadata(tmp_path / "next")["license"] == "apache-2.0"
    with pytest.raises(ConfigError, match="next is not empty"):
        again.save_pretrained(tmp_path / "next")


def test_the_card_of_an_evaluated_run_has_its_results(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "checkpoints/step-2").symlink_to(run / "checkpoints/step-2")
    loaded, state = load(run, "cpu"), json.loads((run / "checkpoints/step-2/state.json").read_text())
    account = read_account(RunFolder(run))
    facts = run_facts("demo", loaded.omni, loaded.description, state, account)
    write_report(RunFolder(copy), eval_report(), facts)
    found = metadata(copy)
    assert found["co2_eq_emissions"]["emissions"] == account.grams(account.tracker.joules)
    assert account.tracker.source in found["co2_eq_emissions"]["source"]
    results = found["model-index"][0]["results"]
    assert results[0]["task"]["type"] == "image-classification" and results[0]["dataset"]["name"] == "things"
    assert {"type": "exact_match", "name": "exact match", "value": 0.625} in results[0]["metrics"]
    parsed = hub.ModelCard.load(copy / "README.md").data
    assert len(parsed.eval_results) == sum(len(one["metrics"]) for one in results)


def test_private_paths_and_adapters_are_not_published(run: Path, tmp_path: Path) -> None:
    loaded = load(run, "cpu")
    sources = loaded.description.sources | {"shop": {"kind": "csv", "path": "/home/someone/secret/shop.csv"}}
    changed = {"sources": sources, "base_model": "/home/someone/secret/base.gguf"}
    found = loaded.description.model_copy(update=changed).to_publish()
    assert "secret" not in found.to_json() and found.sources["shop"]["path"] == "shop.csv" and found.base_model


def test_half_precision_stays_and_int8_is_refused(run: Path, tmp_path: Path) -> None:
    openm6.load(run, dtype="bfloat16").save_pretrained(tmp_path / "half")
    size = (tmp_path / "half/model.safetensors").stat().st_size
    assert size < 0.6 * (run / "checkpoints/step-2/model.safetensors").stat().st_size
    openm6.load(tmp_path / "half")
    with pytest.raises(ConfigError, match="weights in int8 or offloaded are not saved"):
        openm6.load(run, dtype="int8").save_pretrained(tmp_path / "int8")
    with pytest.raises(ConfigError, match="weights in int8 or offloaded are not saved"):
        openm6.load(run, num_gpu_layers=0).save_pretrained(tmp_path / "offloaded")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_an_imported_model_whose_run_is_gone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    # It needs transformers.
    from tests.hub.published import publish  # noqa: PLC0415

    publish("qwen3_moe", tmp_path / "base", torch.bfloat16)
    m6 = openm6.from_hf(tmp_path / "base", device="cpu")
    m6.save_pretrained(tmp_path / "out")
    assert openm6.load(tmp_path / "out").generate("draw", max_new_tokens=8) == m6.generate("draw", max_new_tokens=8)
    found = metadata(tmp_path / "out")
    assert found["pipeline_tag"] == "text-generation" and not {"base_model", "model-index"} & found.keys()
    import_model(str(tmp_path / "base"), tmp_path / "run", receipt=False)
    description = load(tmp_path / "run", "cpu").description
    assert description.base_model == str(tmp_path / "base")


class FakeHub:
    """What `push_to_hub` calls, without a network."""

    calls: list[tuple[str, dict[str, Any]]] = []
    files: list[str] = []

    def __init__(self, token: str | bool | None) -> None:
        self.calls.append(("", {"token": token}))

    def create_branch(self, repo_id: str, **named: Any) -> None:
        self.calls.append((repo_id, named))

    def create_repo(self, repo_id: str, **named: Any) -> Any:
        if "refused" in repo_id:
            raise OSError("401 Client Error\nof many lines")
        self.calls.append((repo_id, named))
        return hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: Path, **named: Any) -> Any:
        self.calls.append((repo_id, named))
        self.files += sorted(path.name for path in folder_path.iterdir())
        assert openm6.load(folder_path) is not None
        url = f"https://huggingface.co/{repo_id}"
        return hub.CommitInfo(
            f"{url}/commit/0", "", "", "0", pr_url=f"{url}/discussions/1" if named["create_pr"] else None
        )


def test_a_model_is_pushed(m6: openm6.OpenM6, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", FakeHub)
    url = m6.push_to_hub("someone/model", private=True, commit_message="First")
    assert url == "https://huggingface.co/someone/model" and "README.md" in FakeHub.files
    upload = {"commit_message": "First", "revision": None, "create_pr": False, "delete_patterns": ["*.safetensors"]}
    named = [{"token": None}, {"private": True, "exist_ok": True}, upload]
    assert [one for _, one in FakeHub.calls] == named
    FakeHub.calls.clear()
    url = m6.push_to_hub("someone/model", token="secret", branch="next")
    assert [one for _, one in FakeHub.calls][::2] == [{"token": "secret"}, {"branch": "next", "exist_ok": True}]
    assert FakeHub.calls[-1][1]["revision"] == "next" and url == "https://huggingface.co/someone/model"
    assert m6.push_to_hub("someone/model", create_pr=True) == "https://huggingface.co/someone/model/discussions/1"
    with pytest.raises(OutputError, match=r"could not be published \(401 Client Error\): log in") as error:
        m6.push_to_hub("someone/refused")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        m6.push_to_hub("someone/model")
