"""GGUF files in and out: written by us and by the reference library, and read as llama.cpp computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.hub.export import export_run
from openm6.hub.gguf_file import GgufFile, gguf_tokenizer, read_gguf_tokenizer
from openm6.hub.importing import import_model, imported_logits
from openm6.inference.engine import generate_texts
from openm6.inference.load import load
from openm6.inference.sampling import Sampling
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

# They need transformers.
from tests.hub.published import PROMPT, ROWS, STEPS, TEMPLATE, decoder, publish, their_text  # noqa: E402

IDS = torch.tensor([[40, 7, 300, 12, 99, 250, 3, 3, 17, 201]])


def logits(run: Path) -> torch.Tensor:
    return torch.cat(list(imported_logits(run, load(run, "cpu").description.backbone, IDS, ROWS)), -1)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama 3.1", "llama, linear", "qwen2", "qwen3"])
def test_what_is_exported_is_read_again(name: str, tmp_path: Path) -> None:
    publish(name, tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    for dtype, tolerance in (("fp32", 1e-5), ("q8_0", 1.0)):
        export_run(tmp_path / "run", tmp_path / dtype, "gguf", dtype)
        summary = import_model(str(tmp_path / dtype / "model.gguf"), tmp_path / f"again-{dtype}")
        assert float(summary.partition("at most ")[2].split()[0]) < 1e-4
        again = load(tmp_path / f"again-{dtype}", "cpu")
        first = load(tmp_path / "run", "cpu")
        assert again.description.backbone == first.description.backbone
        assert again.text.imported == first.text.imported and again.text.encode("seven 画 12") == first.text.encode(
            "seven 画 12"
        )
        torch.testing.assert_close(
            logits(tmp_path / f"again-{dtype}"), logits(tmp_path / "run"), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize("name", ["llama", "llama 3.1", "qwen2", "qwen3"])
def test_a_gguf_file_becomes_a_folder_of_transformers(name: str, tmp_path: Path) -> None:
    model = publish(name, tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "first", receipt=False)
    export_run(tmp_path / "first", tmp_path / "gguf", "gguf", "fp32")
    import_model(str(tmp_path / "gguf/model.gguf"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        theirs = again(IDS).logits[0]
        torch.testing.assert_close(theirs, model(IDS).logits[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs, logits(tmp_path / "run"), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    loaded = load(tmp_path / "run", "cpu")
    prompt = source_segments([Part("text", PROMPT)], loaded.modalities)
    (text,) = generate_texts(loaded, [prompt], Sampling(max_tokens=STEPS))
    ids = tokenizer(PROMPT)["input_ids"]
    assert text and text == tokenizer.decode(their_text(again, ids, loaded.text.end))
    assert tokenizer.eos_token_id == loaded.text.end and tokenizer.chat_template == TEMPLATE
    first = json.loads((tmp_path / "published/tokenizer.json").read_text())["model"]["vocab"]
    assert tokenizer.get_vocab() == first | tokenizer.get_added_vocab(), "unused rows of the embedding have no names"


def test_llama_rotates_neighbours_in_a_gguf_file(tmp_path: Path) -> None:
    """A decoder in NumPy, as the file's own conventions have it: pairs x[2i], x[2i + 1] turn together."""
    model = publish("llama, tied", tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    export_run(tmp_path / "run", tmp_path / "out", "gguf", "fp32")
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    tensors = {one.name: one.data.astype(np.float64) for one in reader.tensors}
    found = numpy_llama(tensors, IDS[0].numpy(), layers=3, heads=4, kv_heads=2, theta=10_000.0, eps=1e-6)
    with torch.inference_mode():
        np.testing.assert_allclose(found, model(IDS).logits[0].numpy(), atol=1e-4)


def numpy_llama(
    tensors: dict[str, np.ndarray], ids: np.ndarray, layers: int, heads: int, kv_heads: int, theta: float, eps: float
) -> np.ndarray:
    """Logits of a tied Llama from the tensors of a GGUF file.  # S -> S V"""
    count, size = len(ids), len(tensors["blk.0.attn_q.weight"]) // heads
    angle = np.arange(count)[:, None] / theta ** (np.arange(0, size, 2) / size)
    cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def turn(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).reshape(x.shape)

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
        gate = h @ own["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ own["ffn_up"].T)) @ own["ffn_down"].T
    return norm(x, tensors["output_norm.weight"]) @ tensors["token_embd.weight"].T


def write_experts(model: Any, architecture: str, path: Path, tokenizer: Tokenizer) -> None:
    """A mixture of experts as GGUF files hold it: one stack for each of the three matrices."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    for name, value in {
        "embedding_length": 64, "block_count": 3, "attention.head_count": 4, "attention.head_count_kv": 2,
        "context_length": 256, "feed_forward_length": config.intermediate_size, "expert_count": 4,
        "expert_used_count": 2, "attention.key_length": 16, "rope.dimension_count": 16,
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", config.intermediate_size),
    }.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_parameters["rope_theta"])
    for name, value in gguf_tokenizer(tokenizer, ROWS).items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(f"tokenizer.{name}", value)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    kind_of = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kind_of[architecture], 3)
    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        if name.endswith("gate_up_proj"):
            for half, kind in zip(tensor.chunk(2, 1), ("gate", "up"), strict=True):
                writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_{kind}_exps.weight", half.contiguous().numpy())
        elif name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{name.split('.')[2]}.ffn_down_exps.weight", tensor.numpy())
        elif stem in outer:
            writer.add_tensor(f"{outer[stem]}.{ending}", tensor.numpy())
        else:
            own = names.get_name(stem)
            if architecture == "llama" and own.endswith(("attn_q", "attn_k")):
                heads = 4 if own.endswith("attn_q") else 2
                tensor = tensor.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"{own}.{ending}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("name", "architecture"), [("qwen3_moe", "qwen3moe"), ("mixtral", "llama"), ("olmoe", "olmoe")]
)
def test_stacks_of_experts_are_read(name: str, architecture: str, tmp_path: Path) -> None:
    publish(name, tmp_path / "published")
    model, path = decoder(name), tmp_path / "experts.gguf"
    write_experts(model, architecture, path, Tokenizer.from_file(str(tmp_path / "published/tokenizer.json")))
    assert "no receipt" in import_model(str(path), tmp_path / "run")
    with torch.inference_mode():
        torch.testing.assert_close(logits(tmp_path / "run"), model(IDS).logits[0], rtol=0, atol=1e-4)


def one_tensor(path: Path, kind: str) -> None:
    """A file with one quantized matrix, whose scales are small numbers."""
    kind_of = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind_of]
    data = np.random.default_rng(0).integers(0, 255, (4, 512 // block * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    scales = {"Q6_K": (208, 1), "Q4_K": (0, 2), "Q4_0": (0, 1), "Q4_1": (0, 2), "Q8_0": (0, 1), "IQ2_XXS": (0, 1)}
    start, count = scales[kind]
    blocks[:, start : start + 2 * count] = np.full(count, 0.01, np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", data, raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_quantized_matrices_are_read(kind: str, tmp_path: Path) -> None:
    one_tensor(tmp_path / "one.gguf", kind)
    file = GgufFile(tmp_path / "one.gguf")
    found = file.read("model.norm.weight")
    assert file.shape("model.norm.weight") == tuple(found.shape) == (4, 512)
    assert found.dtype == torch.float32 and found.isfinite().all() and 0 < found.abs().max() < 100
    assert torch.equal(file.read("model.norm.weight", slice(1, 3)), found[1:3])


def test_a_tokenizer_of_sentence_pieces_is_read() -> None:
    """Merges follow from the scores, and what has no token is spelled in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁h"]
    fields = {
        "ggml.model": "llama", "ggml.tokens": [*pieces, *words],
        "ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "ggml.scores": [0.0] * 259 + [-99.0] * 5 + [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],
        "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, "ggml.unknown_token_id": 0,
    }  # fmt: skip
    text, special = read_gguf_tokenizer(fields | {"ggml.eot_token_id": 5})
    tokenizer = Tokenizer.from_str(text)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert special == {"bos": 1, "eos": 2, "stops": (5,), "chat_template": None, "names": names}
    assert tokenizer.encode("hello").tokens == ["<s>", "▁hello"]
    assert tokenizer.encode(" é", add_special_tokens=False).tokens == ["▁", "▁", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("hello hello é").ids) == "hello hello é"


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


def test_a_broken_tokenizer_is_one_sentence() -> None:
    whole = {"ggml.model": "gpt2", "ggml.tokens": ["a", "b"], "ggml.token_type": [1, 1], "ggml.merges": []}
    for change in (
        {"ggml.merges": ["a c"]},
        {"ggml.token_type": [1]},
        {"ggml.bos_token_id": 7, "ggml.add_bos_token": 1},
    ):
        with pytest.raises(ConfigError, match="the tokenizer in the GGUF is broken"):
            read_gguf_tokenizer({**whole, **change})
    with pytest.raises(ConfigError, match=r"the GGUF lacks tokenizer\.ggml\.token_type"):
        read_gguf_tokenizer({"ggml.model": "gpt2", "ggml.tokens": []})


def test_yarn_of_unusual_settings_has_no_form_in_gguf(tmp_path: Path) -> None:
    publish("qwen2, yarn", tmp_path / "published")
    path = tmp_path / "published/config.json"
    settings = json.loads(path.read_text())
    settings["rope_parameters"]["beta_fast"] = 16.0
    path.write_text(json.dumps(settings))
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    with pytest.raises(ConfigError, match="GGUF has only the usual settings of yarn"):
        export_run(tmp_path / "run", tmp_path / "out", "gguf")


def test_a_mixture_of_experts_is_exported_as_safetensors_only(tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "published")
    import_model(str(tmp_path / "published"), tmp_path / "run", receipt=False)
    with pytest.raises(ConfigError, match="qwen3_moe as GGUF is not supported"):
        export_run(tmp_path / "run", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
