"""Runs of our own as decoders of other programs: what they can express, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from openm6.checkpoint.save import Snapshot, save
from openm6.core.errors import ConfigError
from openm6.hub.export import export_run
from openm6.hub.importing import imported_logits
from openm6.inference.engine import generate_texts
from openm6.inference.load import load
from openm6.inference.question import chat_prompt
from openm6.inference.sampling import Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import (
    ModalitiesConfig,
    PromptAttention,
    TextConfig,
    prompt_segments,
    source_segments,
    split_opening,
)
from openm6.modalities.text import ImportedText, train_tokenizer
from openm6.models.config import BackboneConfig
from openm6.models.description import CheckpointConfig, TrainedTask, build_model
from openm6.nn.config import DenseConfig, ExpertsConfig, ModalityExpertsConfig
from tests.small_model import SCALES, WORDS

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 64, "num_layers": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
EXPERTS = ExpertsConfig(intermediate_size=48, num_experts=4, top_k=2, balance="aux")
BACKBONES = {
    "sparse": BackboneConfig(**SIZE, experts=EXPERTS),
    "dense": BackboneConfig(**SIZE, dense=DenseConfig(intermediate_size=96)),
    "shared": BackboneConfig(**SIZE, experts=EXPERTS, sharing="all"),
    "llama": BackboneConfig(**SIZE, dense=DenseConfig(intermediate_size=96), qk_norm=False),
}


def run_of(
    folder: Path, backbone: BackboneConfig, attention: PromptAttention = "causal", tasks: tuple[str, ...] = (),
    chat: list[str] | None = None, imported: ImportedText | None = None,
) -> Path:  # fmt: skip
    """An untrained run."""
    tokenizer = train_tokenizer(WORDS, 320).to_str()
    description = CheckpointConfig(
        backbone=backbone,
        modalities=ModalitiesConfig(prompt_attention=attention, text=TextConfig(imported=imported)),
        scales=SCALES,
        trained_tasks=[TrainedTask(task=task, source="digits", modalities=chat or []) for task in tasks],
    )
    torch.manual_seed(0)
    model, _ = build_model(description, tokenizer, "")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    files = {"model.json": description.to_json(), "tokenizer.json": tokenizer}
    save(Snapshot(1, model, {}, {}, files=files), folder / "checkpoints", keep=1)
    return folder


@pytest.mark.parametrize("name", BACKBONES)
def test_a_run_of_ours_writes_the_same_text_in_transformers(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", BACKBONES[name])
    export_run(run, tmp_path / "out", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded, words = load(run, "cpu"), "draw the digit"
    prompt = source_segments([Part("text", words)], loaded.modalities)
    (text,) = generate_texts(loaded, [prompt], Sampling(max_tokens=12))
    ids = tokenizer(words, return_tensors="pt")["input_ids"]
    unused = [loaded.text.start, *range(loaded.text.mask, loaded.text.vocab_size)]
    new = model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=unused, pad_token_id=0)
    assert tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True) == text and text
    assert tokenizer.eos_token_id == loaded.text.end


def test_a_chat_is_the_same_by_the_template_of_an_export(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", BACKBONES["llama"], tasks=("chat",), chat=["text"])
    export_run(run, tmp_path / "out", "hf")
    turns = [("system", ""), ("user", " draw the digit "), ("assistant", "seven"), ("user", "What is this?")]
    tokenizer, loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), load(run, "cpu")
    messages = [{"role": role, "content": said} for role, said in turns]
    shown = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    asked = chat_prompt([(role, [Part("text", said)]) for role, said in turns], loaded)
    prompt, opening = split_opening(prompt_segments(asked, loaded.modalities))
    ids = [int(token) for segment in prompt for token in segment.arrays["ids"]]
    assert tokenizer(shown)["input_ids"] == [*ids, opening]


def test_turns_that_an_imported_tokenizer_cannot_mark_are_named(tmp_path: Path) -> None:
    imported = ImportedText(vocab_size=384)
    run = run_of(tmp_path / "run", BACKBONES["llama"], tasks=("chat",), chat=["text"], imported=imported)
    with pytest.raises(ConfigError, match="cannot express the turns of chats: add --text-only"):
        export_run(run, tmp_path / "out", "hf")


def test_what_a_decoder_cannot_express_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", BACKBONES["dense"], "bidirectional", ("text_to_image",))
    with pytest.raises(ConfigError, match="prompts with bidirectional attention and the modalities image: add --text"):
        export_run(run, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    talk = run_of(tmp_path / "talk", BACKBONES["dense"], tasks=("chat",), chat=["text", "image"])
    with pytest.raises(ConfigError, match="cannot express the modalities image: add --text"):
        export_run(talk, tmp_path / "out", "hf")
    summary = export_run(run, tmp_path / "out", "hf", "bf16", text_only=True)
    assert summary.endswith(
        "left out: prompts with bidirectional attention and the modalities image, so answers differ from ours"
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_texts_without_the_experts_of_other_modalities_are_ours(tmp_path: Path) -> None:
    added = ModalityExpertsConfig(intermediate_size=16, num_experts=2, top_k=1, balance="aux", modalities=("image",))
    backbone = BACKBONES["llama"].model_copy(update={"modality_experts": (added,)})
    run = run_of(tmp_path / "run", backbone)
    with pytest.raises(ConfigError, match="cannot express the experts of image: add --text-only"):
        export_run(run, tmp_path / "out", "hf")
    summary = export_run(run, tmp_path / "out", "hf", text_only=True)
    assert summary.endswith("3 layers; left out: the experts of image")
    tokens = torch.arange(40, 52)[None]
    rows = load(run, "cpu").text.vocab_size
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        theirs = plain(tokens).logits[0]
    torch.testing.assert_close(torch.cat(list(imported_logits(run, backbone, tokens, rows)), -1), theirs)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"experts": ExpertsConfig(intermediate_size=48, num_experts=4, top_k=2)}, "a balance bias of the router"),
        ({"experts": EXPERTS.model_copy(update={"num_shared": 1})}, "shared experts"),
        ({"experts": EXPERTS.model_copy(update={"top_k": None, "num_prototypes": 2})}, "prototypes"),
        ({"dense": DenseConfig(intermediate_size=96, hidden_act="gelu")}, "GELU networks"),
        ({"dense": DenseConfig(intermediate_size=96), "qkv_bias": True}, "this combination of norms, biases"),
    ],
)
def test_what_no_decoder_computes_is_refused(changes: dict, complaint: str, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", BackboneConfig(**SIZE, **changes))
    with pytest.raises(ConfigError, match=complaint):
        export_run(run, tmp_path / "out", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_wrong_dtype_and_a_folder_with_files_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", BACKBONES["dense"])
    with pytest.raises(ConfigError, match="fp32, fp16, bf16 for --format hf"):
        export_run(run, tmp_path / "out", "hf", "q8_0")
    with pytest.raises(ConfigError, match="is not empty"):
        export_run(run, run, "hf")
