"""GGUF files in and out: written by us and by the reference library, and read as llama.cpp computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.hub.export import export_run
from openm6.hub.gguf_file import GgufFile, gguf_tokenizer, read_gguf_tokenizer
from openm6.hub.importing import Additions, import_model, imported_logits
from openm6.inference.engine import generate_texts
from openm6.inference.load import load
from openm6.inference.sampling import Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# They need transformers.
from tests.hub.dequantized import dequantized  # noqa: E402
from tests.hub.published import LLAMA3, ORIGINAL, PROMPT, ROWS, STEPS, TEMPLATE, publish, their_text  # noqa: E402

UNGROUPED = {"olmoe": {"num_key_value_heads": 4}}  # llama.cpp has no grouped queries there
# Architectures of GGUF with experts, and their fields of sizes.
STACKED = {
    "qwen3_moe": ("qwen3moe", {"expert_feed_forward_length": 32}),
    "mixtral": ("llama", {"feed_forward_length": 96}),
    "olmoe": ("olmoe", {"feed_forward_length": 96}),
}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, **ORIGINAL}}
IDS = torch.tensor([[40, 7, 300, 12, 99, 250, 3, 3, 17, 201]])


def logits(run: Path) -> torch.Tensor:
    return torch.cat(list(imported_logits(run, load(run, "cpu").description.backbone, IDS, ROWS)), -1)


@pytest.mark.parametrize(
    "name", ["llama", "llama, tied", "llama 3.1", "llama, linear", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe"]
)
def test_what_is_exported_is_read_again_and_by_transformers(name: str, tmp_path: Path) -> None:
    """Safetensors, GGUF and safetensors again, each through a run."""
    model = publish(name, tmp_path / "published", **UNGROUPED.get(name, {}))
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "gguf", "gguf", "fp32")
    summary = import_model(str(tmp_path / "gguf/model.gguf"), tmp_path / "again")
    if name in STACKED:
        assert "no receipt" in summary
        check_stacks(gguf.GGUFReader(tmp_path / "gguf/model.gguf"), model, *STACKED[name])
    else:
        assert float(summary.partition("at most ")[2].split()[0]) < 1e-4
    first, again = (load(tmp_path / run, "cpu") for run in ("run", "again"))
    assert again.description.backbone == first.description.backbone
    assert again.text.imported == first.text.imported
    assert again.text.encode("seven 画 12") == first.text.encode("seven 画 12")
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "run"), rtol=0, atol=1e-5)
    export_run(tmp_path / "again", tmp_path / "out", "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        expected = theirs(IDS).logits[0]
        torch.testing.assert_close(expected, model(IDS).logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(tmp_path / "again"), expected, rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = source_segments([Part("text", PROMPT)], again.modalities)
    (text,) = generate_texts(again, [prompt], Sampling(max_tokens=STEPS))
    new = their_text(theirs, tokenizer(PROMPT)["input_ids"], again.text.end)
    assert text == tokenizer.decode(new, skip_special_tokens=True)
    assert tokenizer.eos_token_id == again.text.end and tokenizer.chat_template == TEMPLATE
    vocabulary = json.loads((tmp_path / "published/tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.get_vocab() == vocabulary | tokenizer.get_added_vocab(), "unused rows have no names"


def check_stacks(reader: Any, model: Any, architecture: str, own: dict[str, int]) -> None:
    """Names, shapes and metadata of llama.cpp for experts: one stack for each of the three matrices, E rows columns."""
    tensors, state = {one.name: one for one in reader.tensors}, model.state_dict()
    gate, up = state["model.layers.1.mlp.experts.gate_up_proj"].chunk(2, 1)
    found = {"gate_exps": gate, "up_exps": up, "down_exps": state["model.layers.1.mlp.experts.down_proj"]}
    for name, expected in {**found, "gate_inp": state["model.layers.1.mlp.gate.weight"]}.items():
        np.testing.assert_array_equal(tensors[f"blk.1.ffn_{name}.weight"].data, expected.numpy())
    counts = {"expert_count": 4, "expert_used_count": 2, **own}
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(f"{architecture}.")}
    assert {name: fields.get(f"{architecture}.{name}") for name in counts} == counts


@pytest.mark.parametrize(("dtype", "step"), [("fp16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.6 / 127)])
def test_values_are_rounded_to_the_nearest(dtype: str, step: float, tmp_path: Path) -> None:
    """By at most half a step of the largest value of 32, whose scale in Q8_0 is rounded, too."""
    model = publish("llama", tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "out", "gguf", dtype)
    tensors = {one.name: dequantized(one) for one in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    for ours, theirs in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        expected = state[f"model.layers.1.{theirs}.weight"].reshape(-1, 32)
        errors = np.abs(tensors[f"blk.1.{ours}.weight"].reshape(-1, 32) - expected)
        assert (errors <= step * np.abs(expected).max(1, keepdims=True)).all() and errors.any()
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_norm.weight"], state["model.layers.1.post_attention_layernorm.weight"]
    )


@pytest.mark.parametrize(("name", "tolerance"), [("llama, tied", 1.0), ("qwen3_moe", 3.0)])
def test_matrices_may_be_rounded(name: str, tolerance: float, tmp_path: Path) -> None:
    publish(name, tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "out", "gguf", "q8_0")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors}
    exact = {name for name in kinds if "norm" in name or "ffn_gate_inp" in name}
    assert {kinds.pop(name) for name in exact} == {"F32"} and set(kinds.values()) == {"Q8_0"}
    import_model(str(tmp_path / "out/model.gguf"), tmp_path / "again", receipt=False)
    torch.testing.assert_close(logits(tmp_path / "again"), logits(tmp_path / "run"), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("name", "experts"), [("llama, tied", None), ("mixtral", None), ("llama, tied", 4)])
def test_llama_rotates_neighbours_in_a_gguf_file(name: str, experts: int | None, tmp_path: Path) -> None:
    """A decoder in NumPy, as the file's own conventions have it: pairs x[2i], x[2i + 1] turn together."""
    model = publish(name, tmp_path / "published")
    added = Additions(experts=experts)
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False, additions=added)
    export_run(tmp_path / "run", tmp_path / "out", "gguf", "fp32")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    tensors = {one.name: one.data.astype(np.float64) for one in reader.tensors}
    theta, eps = model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps
    found = numpy_llama(tensors, IDS[0].numpy(), layers=3, heads=4, kv_heads=2, theta=theta, eps=eps)
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(IDS).logits[0].numpy(), atol=1e-4)


def numpy_llama(
    tensors: dict[str, np.ndarray], ids: np.ndarray, layers: int, heads: int, kv_heads: int, theta: float, eps: float
) -> np.ndarray:
    """Logits of a Llama, dense or with two experts for each token, from the tensors of a GGUF file.  # S -> S V"""
    count, size = len(ids), len(tensors["blk.0.attn_q.weight"]) // heads
    angle = np.arange(count)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def turn(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).reshape(x.shape)

    def network(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        hidden = x @ gate.T
        return (hidden / (1 + np.exp(-hidden)) * (x @ up.T)) @ down.T

    x = tensors["token_embd.weight"][ids]
    for layer in range(layers):
        own = {name.split(".")[2]: one for name, one in tensors.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, own["attn_norm"])
        query, key, value = ((h @ own[f"attn_{name}"].T).reshape(count, -1, size) for name in "qkv")
        query, key, value = turn(query), *(np.repeat(part, heads // kv_heads, 1) for part in (turn(key), value))
        score = np.einsum("thd,shd->hts", query, key) / size**0.5 + np.triu(np.full((count, count), -np.inf), 1)
        weight = np.exp(score - score.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shd->thd", weight, value).reshape(count, -1) @ own["attn_output"].T
        h = norm(x, own["ffn_norm"])
        if "ffn_gate_inp" not in own:
            x = x + network(h, own["ffn_gate"], own["ffn_up"], own["ffn_down"])
            continue
        stacks = [own[f"ffn_{kind}_exps"] for kind in ("gate", "up", "down")]
        each = np.stack([network(h, *matrices) for matrices in zip(*stacks, strict=True)])  # E S D
        score = h @ own["ffn_gate_inp"].T
        score = np.where(score >= np.sort(score)[:, -2:-1], np.exp(score - score.max(-1, keepdims=True)), 0)
        x = x + np.einsum("se,esd->sd", score / score.sum(-1, keepdims=True), each)
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return norm(x, tensors["output_norm.weight"]) @ head.T


def one_tensor(path: Path, kind: str) -> None:
    """A file with one matrix of random codes, whose scales are small numbers that differ, or of halves below 2."""
    kind_of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind_of]
    data = np.random.default_rng(0).integers(0, 255, (4, 512 // block * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    scales = {"Q6_K": (208, 1), "Q4_K": (0, 2), "Q4_0": (0, 1), "Q4_1": (0, 2), "Q8_0": (0, 1)}
    if kind in scales:
        start, count = scales[kind]
        values = np.linspace(0.01, 0.02, len(blocks) * count, dtype=np.float16)
        blocks[:, start : start + 2 * count] = values.view(np.uint8).reshape(len(blocks), -1)
    else:
        data.view(np.uint16)[:] &= 0xBFFF  # without the highest bit of the exponent
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", data, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_matrices_of_every_type_are_read(kind: str, tmp_path: Path) -> None:
    one_tensor(tmp_path / "one.gguf", kind)
    file = GgufFile(tmp_path / "one.gguf")
    found = file.read("model.norm.weight")
    assert file.shape("model.norm.weight") == tuple(found.shape) == (4, 512)
    assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert found.isfinite().all() and 0 < found.abs().max() < 100
    if not kind.endswith("_K"):
        (tensor,) = gguf.GGUFReader(tmp_path / "one.gguf").tensors
        np.testing.assert_array_equal(found.float().numpy(), dequantized(tensor))
    assert torch.equal(file.read("model.norm.weight", slice(1, 3)), found[1:3])


def sentence_pieces() -> dict[str, Any]:
    """The metadata of a small SentencePiece tokenizer."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁h"]
    return {
        "ggml.model": "llama", "ggml.tokens": [*pieces, *words],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "ggml.scores": [0.0] * 259 + [-99.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0,
    }  # fmt: skip


def test_a_tokenizer_of_sentence_pieces_is_read() -> None:
    """Merges follow from the scores, and what has no token is spelled in bytes."""
    text, special = read_gguf_tokenizer(sentence_pieces() | {"ggml.eot_token_id": 5})
    tokenizer = Tokenizer.from_str(text)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert special == {"bos": 1, "eos": 2, "stops": (5,), "chat_template": None, "names": names}
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode(" é", add_special_tokens=False).tokens == ["▁", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.encode("<unk>", add_special_tokens=False).tokens == ["<unk>"]
    assert tokenizer.decode(tokenizer.encode("hello hello é").ids) == "hello hello é"


def test_a_tokenizer_of_sentence_pieces_is_written(tmp_path: Path) -> None:
    publish("llama", tmp_path / "published")
    text, special = read_gguf_tokenizer(sentence_pieces())
    (tmp_path / "published/tokenizer.json").write_text(text)
    (tmp_path / "published/tokenizer_config.json").write_text(json.dumps(special["names"]))
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "out", "gguf")
    fields = GgufFile(tmp_path / "out/model.gguf").tokenizer_fields
    kinds = fields["ggml.token_type"]
    assert kinds[:270] == sentence_pieces()["ggml.token_type"] and set(kinds[270:]) == {5}
    scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
    assert sorted(scores, key=lambda token: -scores[token])[:6] == ["he", "ll", "hell", "hello", "▁hello", "▁h"]
    import_model(str(tmp_path / "out/model.gguf"), tmp_path / "again", receipt=False)
    first, again = (load(tmp_path / run, "cpu").text for run in ("run", "again"))
    assert first.imported == again.imported
    for words in ("hello hellhe  oll", " é<unk>hello</s> hel", "", "\n"):
        assert again.encode(words) == first.encode(words)


@pytest.mark.parametrize("missing", ["merge", "normalizer"])
def test_other_rules_of_sentence_pieces_are_refused(missing: str) -> None:
    content = json.loads(read_gguf_tokenizer(sentence_pieces())[0])
    assert gguf_tokenizer(Tokenizer.from_str(json.dumps(content)), ROWS)["ggml.model"] == "llama"
    if missing == "merge":
        content["model"]["merges"].pop()  # llama.cpp would make its token, this tokenizer does not
    else:
        content["normalizer"] = None
    with pytest.raises(ConfigError, match="no rules that give the tokens of this tokenizer: export with --format hf"):
        gguf_tokenizer(Tokenizer.from_str(json.dumps(content)), ROWS)


@pytest.mark.parametrize(
    ("breaking", "complaint"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is cut short"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is cut short"),
        (lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]), "no GGUF file"),
        (lambda path: one_tensor(path, "Q8_0"), r"the tokenizer None"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"llama", b"gemma")), "'gemma' cannot be imported"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gpt-9")), "pre-tokenizer 'gpt-9'"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"head_count_kv", b"head_count_xv")), "has shape"),
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xy")),
            "lacks the tensor",
        ),
    ],
)
def test_broken_files_are_refused(breaking: Any, complaint: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.read_bytes())
    breaking(path)
    with pytest.raises(OpenM6Error, match=complaint) as error:
        import_model(str(path), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    publish("llama", folder / "published")
    import_model(str(folder / "published"), folder / "run", receipt=False)
    export_run(folder / "run", folder / "out", "gguf")
    file = GgufFile(folder / "out/model.gguf")
    assert read_gguf_tokenizer(file.tokenizer_fields)[1]["chat_template"] == TEMPLATE
    return folder / "out/model.gguf"


def test_a_type_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_tensor(tmp_path / "one.gguf", "Q8_0")

    def refuse(data: np.ndarray, kind: Any) -> np.ndarray:
        raise NotImplementedError

    monkeypatch.setattr("gguf.quants.dequantize", refuse)
    with pytest.raises(CheckpointError, match=r"output_norm\.weight is of the type Q8_0"):
        GgufFile(tmp_path / "one.gguf")


def test_positions_scaled_by_the_key_of_older_files(whole: Path) -> None:
    file = GgufFile(whole)
    file.fields["llama.rope.scale_linear"] = 8.0
    assert {"rope_type": "linear", "factor": 8.0}.items() <= file._settings()["rope_parameters"].items()


def test_a_broken_tokenizer_is_one_sentence() -> None:
    whole = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "b"], "ggml.token_type": [1, 1]}
    whole["ggml.merges"] = []
    for change in (
        {"ggml.merges": ["a c"]},
        {"ggml.token_type": [1]},
        {"ggml.bos_token_id": 7, "ggml.add_bos_token": 1},
    ):
        with pytest.raises(ConfigError, match="the tokenizer in the GGUF is broken"):
            read_gguf_tokenizer({**whole, **change})
    with pytest.raises(ConfigError, match=r"the GGUF lacks tokenizer\.ggml\.token_type"):
        read_gguf_tokenizer({"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": []})
    with pytest.raises(ConfigError, match="'gpt2' with pre-tokenizer 'default' in the GGUF cannot be read"):
        read_gguf_tokenizer({key: value for key, value in whole.items() if key != "ggml.pre"})


def test_a_normalizer_that_llama_cpp_lacks_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.NFC()
    assert gguf_tokenizer(tokenizer, 2)["ggml.model"] == "gpt2"
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="no rules that give the tokens"):
        gguf_tokenizer(tokenizer, 2)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        (
            "qwen3_moe, in part",
            {},
            "no qwen3moe with dense layers, gates that do not sum to 1: export with --format hf",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, "no qwen3moe with gates that do not sum to 1"),
        ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}, "no olmoe with gates that sum to 1"),
        ("olmoe", {"tie_word_embeddings": True}, "no olmoe with grouped queries, a tied output layer"),
        ("qwen3", {"rope_parameters": {**LLAMA3, **ORIGINAL}}, "no qwen3 with rotary positions scaled as in Llama 3"),
        ("qwen2, yarn", YARN, "no qwen2 with settings of yarn other than the usual ones"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    name: str, changes: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    publish(name, tmp_path / "published", **changes)
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    with pytest.raises(ConfigError, match=complaint):
        export_run(tmp_path / "run", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
