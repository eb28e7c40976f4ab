"""What can be said of a checkpoint without loading its weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm6.checkpoint.folder import SHIPPED, STATE_FILE, latest
from openm6.checkpoint.load import load_model
from openm6.core.errors import CheckpointError, ConfigError
from openm6.inference.engine import generate_texts
from openm6.inference.load import convert_weights, load, precision_of, read_texts, weight_bytes
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.models.description import MODEL_FILE, TOKENIZER_FILE, build_model
from tests.small_model import loaded


def test_a_checkpoint_is_looked_at_without_its_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        latest(tmp_path / "nowhere")
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / STATE_FILE).write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match="not a checkpoint of a multimodal model"):
        read_texts(latest(folder))
    (folder / MODEL_FILE).write_text(loaded().description.to_json(), encoding="utf-8")
    (folder / TOKENIZER_FILE).write_text("{}")
    read_texts(latest(folder))  # there are no weights at all


@pytest.mark.parametrize(("task", "gaps"), [("text_denoising", 1), ("text_generation", 0)])
def test_the_mark_of_a_gap_is_text_unless_gaps_were_trained(
    task: str, gaps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(trained_tasks=((task, "poems"),))
    (tmp_path / STATE_FILE).write_text(json.dumps({"files": {}}))
    (tmp_path / MODEL_FILE).write_text(model.description.to_json(), encoding="utf-8")
    (tmp_path / TOKENIZER_FILE).write_text(model.text.tokenizer.to_str(), encoding="utf-8")
    monkeypatch.setattr("openm6.inference.load.load_model", lambda *_: None)
    found = load(tmp_path, "cpu")
    (segment,) = source_segments([Part("text", "a \N{OBJECT REPLACEMENT CHARACTER} c")], found.modalities)
    assert (segment.arrays["ids"] == found.text.mask).sum() == gaps


def test_weights_are_read_and_not_drawn_first() -> None:
    """Those of `mini` are equal to the bit to those of a model that had first values, and so are its constants."""
    folder = SHIPPED / "mini"
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = load(folder, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    description, tokenizer = read_texts(folder)
    drawn, _ = build_model(description, tokenizer, "", predictors=found.numbers.predictors)
    assert not torch.equal(torch.get_rng_state(), before)
    load_model(folder, drawn)
    expected = dict([*drawn.named_parameters(), *drawn.named_buffers()])
    own = dict([*found.omni.named_parameters(), *found.omni.named_buffers()])
    assert own.keys() == expected.keys()
    assert not [name for name, tensor in own.items() if not torch.equal(tensor, expected[name])]


def test_weights_in_int8_take_less_memory_and_write_the_same_texts() -> None:
    """Alone as in a batch; prompts go through the same weights."""
    plain, model = loaded(5), loaded(5)
    before = weight_bytes(model.omni)
    convert_weights(model.omni, "int8")
    convert_weights(model.omni, "int8")  # does nothing again
    assert weight_bytes(model.omni) < 0.92 * before, "most of this small model are adapters and the embedding"
    prompts = [source_segments([Part("text", words)], model.modalities) for words in ("draw the digit", "x", "a dog")]
    found = generate_texts(model, prompts, Sampling(max_tokens=8))
    assert found == [generate_texts(model, [prompt], Sampling(max_tokens=8))[0] for prompt in prompts]
    # The tokens of an untrained model are nearly equally likely.
    first = Sampling(max_tokens=1)
    pairs = zip(generate_texts(model, prompts, first), generate_texts(plain, prompts, first), strict=True)
    assert sum(one == other for one, other in pairs) >= 2


def test_names_of_dtypes() -> None:
    assert [precision_of(name) for name in ("auto", "bf16", "int8")] == [None, "bfloat16", "int8"]
    with pytest.raises(ConfigError, match="choose auto, fp32, bf16, int8"):
        precision_of("int4")


def test_settings_that_are_not_given_are_those_of_the_evaluation() -> None:
    model = loaded()
    plain = MaskedSampling()
    assert model.masked_sampling(MaskedSampling(seed=3)) == plain.model_copy(update={"seed": 3})
    description = model.description.model_copy(update={"eval": {"decoding": {"steps": 3, "guidance": 1.5}}})
    model = replace(model, description=description)
    assert model.masked_sampling(MaskedSampling(steps=plain.steps)).steps == plain.steps
    found = model.masked_sampling(MaskedSampling(seed=3).model_copy(update={"temperature": 0.5}))
    assert (found.steps, found.guidance, found.seed, found.temperature) == (3, 1.5, 3, 0.5)
