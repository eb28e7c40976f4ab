"""Published decoders of every shape: our logits and texts are those of `transformers`, in and out again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import openm6
from openm6.checkpoint.reader import CheckpointReader
from openm6.core.errors import CheckpointError, ConfigError, DataError, OpenM6Error
from openm6.core.files import new_folder
from openm6.hub.architectures import backbone_config
from openm6.hub.export import export_run
from openm6.hub.importing import compare_logits, import_model, imported_logits
from openm6.inference.engine import generate_texts
from openm6.inference.load import load
from openm6.inference.sampling import Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import prompt_segments, source_segments
from openm6.modalities.text import read_tokenizer
from openm6.nn.config import RopeScaling

transformers = pytest.importorskip("transformers")

# It needs transformers.
from tests.hub.published import PROMPT, ROWS, SIZE, STEPS, VARIANTS, publish, their_text  # noqa: E402


@pytest.mark.parametrize("name", VARIANTS)
def test_a_round_trip_keeps_logits_and_texts(name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path / "published", shard="150KB" if name == "llama" else "5GB")
    summary = import_model(str(tmp_path / "published"), tmp_path / "run")
    assert float(summary.partition("at most ")[2].split()[0]) < 1e-4 and not list(tmp_path.glob(".*"))
    loaded = load(tmp_path / "run", "cpu")
    tokenizer = read_tokenizer((tmp_path / "published/tokenizer.json").read_text(), "")
    ids = tokenizer.encode(PROMPT).ids
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.5, "logits near zero would prove little"
    (found,) = imported_logits(tmp_path / "run", loaded.description.backbone, torch.tensor([ids]), ROWS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    prompt = source_segments([Part("text", PROMPT)], loaded.modalities)
    end = tokenizer.token_to_id("<|im_end|>")
    assert loaded.text.end == end
    (text,) = generate_texts(loaded, [prompt], Sampling(max_tokens=STEPS))
    assert text == tokenizer.decode(their_text(model, ids, end))
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        torch.testing.assert_close(again(torch.tensor([ids])).logits[0], expected, rtol=0, atol=1e-5)
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "draw the digit seven"}]
    templated = kept.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert templated == PROMPT and kept(PROMPT)["input_ids"] == ids and kept.eos_token == "<|im_end|>"
    assert their_text(again, ids, kept.eos_token_id) == their_text(model, ids, end)


def test_a_published_decoder_answers_in_python(tmp_path: Path) -> None:
    model = publish("llama", tmp_path / "published")
    tokenizer = read_tokenizer((tmp_path / "published/tokenizer.json").read_text(), "")
    expected = tokenizer.decode(their_text(model, tokenizer.encode(PROMPT).ids, tokenizer.token_to_id("<|im_end|>")))
    for out in (None, tmp_path / "run"):
        m6 = openm6.from_hf(tmp_path / "published", out, device="cpu")
        assert m6.generate(PROMPT, max_new_tokens=STEPS) == expected
    assert (tmp_path / "run/checkpoints").is_dir()


def test_names_of_special_tokens_and_all_ends_of_an_answer_are_kept(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    tokenizer = read_tokenizer((tmp_path / "published/tokenizer.json").read_text(), "")
    start, end = (tokenizer.token_to_id(mark) for mark in ("<|im_start|>", "<|im_end|>"))
    for name, change in (
        ("tokenizer_config.json", {"pad_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}),
        ("generation_config.json", {"eos_token_id": [end, start]}),
    ):
        path = tmp_path / "published" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    loaded = load(tmp_path / "run", "cpu")
    assert loaded.text.ends == {start, end} and loaded.text.end == end
    with pytest.raises(DataError, match="more than the 256 tokens that this model reads"):
        prompt_segments([Part("text", "draw the digit seven " * 200)], loaded.modalities)
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    kept = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert kept.pad_token == "<|im_end|>" and kept.bos_token == "<|im_start|>" and kept.eos_token == "<|im_end|>"
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [end, start]


def test_half_precision_is_kept_and_marks_take_unused_rows(tmp_path: Path) -> None:
    publish("qwen3", tmp_path / "published", torch.bfloat16)
    summary = import_model(str(tmp_path / "published"), tmp_path / "run")
    assert float(summary.partition("at most ")[2].split()[0]) < 1e-4
    step = tmp_path / "run/checkpoints/step-0"
    weights = {name: tensor for path in step.glob("model-*.safetensors") for name, tensor in load_file(path).items()}
    assert weights["backbone.layers.0.attention.qkv"].dtype == torch.bfloat16
    text = load(step, "cpu").text
    assert text.mask < ROWS == text.vocab_size == len(weights["adapters.text.embedding.weight"])


def test_a_full_vocabulary_gets_more_rows(tmp_path: Path) -> None:
    publish("llama, tied", tmp_path / "published")
    folder = tmp_path / "published"
    tokenizer = read_tokenizer((folder / "tokenizer.json").read_text(), "")
    tokenizer.add_tokens([f"word{index}" for index in range(ROWS - tokenizer.get_vocab_size())])
    tokenizer.save(str(folder / "tokenizer.json"))
    import_model(str(folder), tmp_path / "run", receipt=False)
    loaded = load(tmp_path / "run", "cpu")
    assert loaded.text.mask >= ROWS and loaded.text.vocab_size == 384
    weight = loaded.omni.text.embedding.weight
    torch.testing.assert_close(weight[ROWS:], weight[:ROWS].mean(0).expand(384 - ROWS, -1))
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == ROWS


def test_an_imported_tokenizer_opens_a_text_as_it_always_does(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    folder = tmp_path / "published"
    tokenizer = read_tokenizer((folder / "tokenizer.json").read_text(), "")
    mark = ("<|im_start|>", tokenizer.token_to_id("<|im_start|>"))
    tokenizer.post_processor = TemplateProcessing(single=f"{mark[0]} $A", special_tokens=[mark])
    tokenizer.save(str(folder / "tokenizer.json"))
    import_model(str(folder), tmp_path / "run", receipt=False)
    modalities = load(tmp_path / "run", "cpu").modalities
    for words in ("draw", "<|im_start|>draw"):
        (segment,) = source_segments([Part("text", words)], modalities)
        assert segment.arrays["ids"].tolist() == tokenizer.encode("draw").ids


def test_logits_are_compared_over_all_blocks() -> None:
    ours, theirs = torch.randn(2, 7, 30) + 3
    found = compare_logits(iter(ours.split(8, -1)), iter(theirs.split(8, -1)))
    assert found == pytest.approx(((ours - theirs).abs().max().item(), theirs.std().item()))
    ours[0, 3] = torch.nan
    assert math.isnan(compare_logits(iter(ours.split(8, -1)), iter(theirs.split(8, -1)))[0])


DEEP = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 24, "head_dim": 32}
WIDE = {"vocab_size": 100_000}
LARGE = {
    "layers": ("Qwen3", DEEP, 0.5),
    "tied embedding": ("Qwen3", {**WIDE, "tie_word_embeddings": True}, 1.3),
    "embedding and head": ("Llama", WIDE, 1.3),
}


@pytest.mark.parametrize("name", LARGE)
def test_neither_a_model_nor_its_logits_are_in_memory_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors on the host count from the first weight to the end of the receipt, and files that torch maps."""
    kind, changes, limit = LARGE[name]
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    @contextmanager
    def measured(out: Path) -> Iterator[Path]:
        with new_folder(out) as run, profile:
            yield run

    monkeypatch.setitem(VARIANTS, name, (kind, changes))
    monkeypatch.setattr("openm6.hub.importing.new_folder", measured)
    monkeypatch.setattr("openm6.hub.importing.HEAD_ROWS", 512)
    monkeypatch.setattr("openm6.hub.importing.RECEIPT_TEXT", 20 * "draw the digit seven ")
    publish(name, tmp_path / "published", torch.bfloat16)
    assert "at most" in import_model(str(tmp_path / "published"), tmp_path / "run")
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    size = (tmp_path / "published/model.safetensors").stat().st_size
    peak = max(accumulate(event.nbytes() for event in events))
    print("PEAK", peak, size, peak / size)
    assert 0.05 * size < peak < limit * size


CHANGES: dict[str, tuple[Any, str]] = {
    "another architecture": ({"model_type": "gemma3"}, "'gemma3' cannot be imported"),
    "a sliding window": ({"use_sliding_window": True, "sliding_window": 64}, "a sliding window of 64"),
    "scaled positions": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "half of each head": ({"partial_rotary_factor": 0.5}, "rotary positions in part of each head"),
    "an activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantized weights": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "a missing field": ({"num_attention_heads": None, "hidden_size": ...}, "lacks hidden_size"),
    "an architecture of no text": ({"model_type": ["llama"]}, "cannot be imported"),
    "a size of no number": ({"num_attention_heads": "4"}, "is broken"),
    "no heads": ({"num_attention_heads": 0}, "is broken"),
    "positions of no mapping": ({"rope_parameters": [1]}, "is broken"),
    "a size": ({"intermediate_size": 100}, "multiple of 8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_backbone_lacks_is_refused(name: str) -> None:
    changes, complaint = CHANGES[name]
    settings = {**SIZE, "model_type": "qwen3", "rms_norm_eps": 1e-6, "hidden_act": "silu", **changes}
    with pytest.raises(ConfigError, match=complaint):
        backbone_config({key: value for key, value in settings.items() if value is not ...})


DEFAULTS = {"mixtral": transformers.MixtralConfig, "llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_missing_theta_is_that_of_the_library(name: str) -> None:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2} if name == "mixtral" else {}
    settings = {**SIZE, "model_type": name, "rms_norm_eps": 1e-6, "hidden_act": "silu", **experts}
    settings.pop("rope_theta", None)
    theirs = DEFAULTS[name](**SIZE).to_dict()
    expected = theirs.get("rope_theta") or theirs["rope_parameters"]["rope_theta"]
    assert backbone_config(settings).rope_theta == expected


def test_a_missing_window_of_mistral_is_4096() -> None:
    settings = {**SIZE, "model_type": "mistral", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    assert transformers.MistralConfig().sliding_window == 4096
    with pytest.raises(ConfigError, match="a sliding window of 4096"):
        backbone_config({**settings, "max_position_embeddings": 32_768})
    backbone_config({**settings, "max_position_embeddings": 4096})
    backbone_config({**settings, "max_position_embeddings": 32_768, "sliding_window": None})


@pytest.mark.parametrize("form", ["linear", "llama3", "yarn"])
def test_the_factor_of_attention_is_that_of_yarn_alone(form: str) -> None:
    scaling = RopeScaling(rope_type=form, factor=4.0, attention_factor=1.5)
    assert scaling.amplitude == (1.5 if form == "yarn" else 1.0)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_beside_a_tied_embedding_counts_if_it_differs(differs: bool, tmp_path: Path) -> None:
    publish("llama", tmp_path / "theirs")
    if not differs:
        changed(
            tmp_path / "theirs", lambda state: {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}
        )
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    import_model(str(tmp_path / "theirs"), tmp_path / "run", receipt=False)
    with torch.inference_mode():
        ids = torch.arange(1, 9)[None]
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(ids).logits[0]
    model = load(tmp_path / "run", "cpu")
    assert model.text.imported is not None and model.text.imported.tie_word_embeddings is not differs
    found = torch.cat(list(imported_logits(tmp_path / "run", model.description.backbone, ids, ROWS)), -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-100])


def changed(folder: Path, change: Any) -> None:
    for path in folder.glob("*.safetensors"):
        save_file(change(load_file(path)), path, {"format": "pt"})


def without_a_tensor(folder: Path) -> None:
    changed(folder, lambda state: {name: value for name, value in state.items() if "layers.1.mlp.up_proj" not in name})


def of_another_shape(folder: Path) -> None:
    changed(folder, lambda state: {name: value[:8] if "q_proj" in name else value for name, value in state.items()})


def with_another_tokenizer(folder: Path) -> None:
    tokenizer = read_tokenizer((folder / "tokenizer.json").read_text(), "")
    tokenizer.add_tokens([f"word{index}" for index in range(100)])
    tokenizer.save(str(folder / "tokenizer.json"))


BROKEN = {
    without_a_shard: "lacks model-00002-of",
    cut_short: "not a readable safetensors file",
    without_a_tensor: "lacks the tensor model.layers.1.mlp.up_proj.weight",
    of_another_shape: r"q_proj.weight has shape \[8, 64\]",
    with_another_tokenizer: "but the embedding 330 rows",
    lambda folder: (folder / "tokenizer.json").unlink(): "lacks tokenizer.json",
    lambda folder: (folder / "tokenizer.json").write_text("{}"): "is not a tokenizer.json",
    lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"): "tokenizer.json cannot be read",
    lambda folder: (folder / "config.json").write_text("{"): "config.json is not JSON",
    lambda folder: (folder / "config.json").unlink(): "config.json cannot be read",
    lambda folder: [path.unlink() for path in folder.glob("*.safetensors*")]: "holds no safetensors file",
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish("llama", folder, shard="150KB")
    return folder


@pytest.mark.parametrize("breaking", BROKEN)
def test_what_is_not_whole_is_refused_before_anything_is_written(breaking: Any, sharded: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded, tmp_path / "published")
    breaking(tmp_path / "published")
    with pytest.raises(OpenM6Error, match=BROKEN[breaking]) as error:
        import_model(str(tmp_path / "published"), tmp_path / "run")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["published"]


def test_a_failure_while_writing_leaves_nothing(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: CheckpointReader, name: str) -> torch.Tensor:
        if "layers.2" in name:
            raise CheckpointError("the disk failed")
        return torch.zeros(self.shape(name))

    monkeypatch.setattr(CheckpointReader, "read", read)
    with pytest.raises(CheckpointError, match="the disk failed"):
        import_model(str(sharded), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_receipt_that_fails_leaves_the_run(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: Any) -> None:
        raise RuntimeError("of another version\nwith details")

    monkeypatch.setattr("openm6.hub.importing.reference_logits", refuse)
    summary = import_model(str(sharded), tmp_path / "run")
    assert "no receipt: transformers does not compute this model (of another version)" in summary
    assert load(tmp_path / "run", "cpu").text.imported


def test_a_file_of_another_sha256_is_refused_before_it_is_read(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no GGUF file")
    right, wrong = hashlib.sha256(b"no GGUF file").hexdigest(), hashlib.sha256(b"").hexdigest()
    for source, number, complaint in (
        (tmp_path / "model.gguf", wrong, f"has the sha256 {right}, not {wrong}: download it again"),
        (tmp_path / "model.gguf", right.upper(), "no GGUF file"),
        (sharded, right, "sha256 is for a single file"),
    ):
        with pytest.raises(OpenM6Error, match=complaint):
            import_model(str(source), tmp_path / "run", sha256=number)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "a/b/c/d"])
def test_a_source_that_is_not_there_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model at"):
        import_model(source, tmp_path / "run")


def test_a_folder_with_files_is_left_alone(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        import_model(str(sharded), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_repository_of_the_hub_is_downloaded_at_a_revision_and_without_a_second_copy(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: str) -> str:
        kept = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        assert list(kept) == ["config.json", "model-00001-of-00002.safetensors"]
        asked.append((name, revision))
        if len(asked) > 1:
            raise OSError("no network\nwith details")
        return str(sharded)

    files = ["config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors", "model.bin"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    import_model("owner/name@v1.0", tmp_path / "run", receipt=False)
    assert load(tmp_path / "run", "cpu").description.base_model == "owner/name@v1.0" and asked == [
        ("owner/name", "v1.0")
    ]
    with pytest.raises(CheckpointError, match=r"downloaded \(no network\): check"):
        import_model("owner/name", tmp_path / "other")
