"""What an import adds to a decoder: experts with copies of its networks, and experts for other modalities."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import openm6
from openm6.core.config import build
from openm6.core.errors import CheckpointError, ConfigError, OpenM6Error
from openm6.hub.export import export_run
from openm6.hub.importing import Additions, import_model
from openm6.inference.engine import generate_texts
from openm6.inference.load import LoadedModel, load
from openm6.inference.sampling import Sampling
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.interface import Part
from openm6.modalities.registry import source_segments
from openm6.nn.config import LoraConfig

transformers = pytest.importorskip("transformers")

# It needs transformers.
from tests.hub.published import publish  # noqa: E402

WORDS = Part("text", "draw the digit seven")
PIXELS = Part("image", Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)))


@torch.no_grad()
def states(loaded: LoadedModel, *parts: Part) -> Tensor:
    sequence = build_sequence(source_segments(parts, loaded.modalities))
    batch = collate([[sequence]], len(sequence) + 3)
    return loaded.omni(batch.groups, batch.meta)[0][0, : len(sequence)]


def text_of(loaded: LoadedModel) -> str:
    return generate_texts(loaded, [source_segments([WORDS], loaded.modalities)], Sampling(max_tokens=12))[0]


def largest_difference(summary: str) -> float:
    return float(summary.partition("at most ")[2].split()[0])


@pytest.mark.parametrize("kind", ["llama, tied", "qwen3"])
def test_copies_as_experts_compute_what_the_dense_network_does(kind: str, tmp_path: Path) -> None:
    publish(kind, tmp_path / "base")
    summary = import_model(str(tmp_path / "base"), tmp_path / "run", additions=Additions(experts=4, top_k=3))
    assert largest_difference(summary) < 1e-4
    import_model(str(tmp_path / "base"), tmp_path / "dense", receipt=False)
    sparse, dense = (load(tmp_path / name, "cpu") for name in ("run", "dense"))
    experts = sparse.description.backbone.experts
    assert experts is not None and (experts.num_experts, experts.top_k) == (4, 3)
    assert sparse.omni.backbone.blocks[0].router.weight.std() > 0
    torch.testing.assert_close(states(sparse, WORDS), states(dense, WORDS), atol=1e-4, rtol=1e-4)
    assert text_of(sparse) == text_of(dense)
    export_run(tmp_path / "run", tmp_path / "out", "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.model_type == {"qwen3": "qwen3_moe"}.get(kind, "mixtral")


@pytest.mark.parametrize(("experts", "prototypes"), [(4, 2), (6, 2), (2, 2)])
def test_copies_as_prototypes_compute_what_the_dense_network_does(
    experts: int, prototypes: int, tmp_path: Path
) -> None:
    publish("llama", tmp_path / "base")
    added = Additions(experts=experts, prototypes=prototypes)
    assert largest_difference(import_model(str(tmp_path / "base"), tmp_path / "run", additions=added)) < 1e-4
    backbone = load(tmp_path / "run", "cpu").omni.backbone
    found = backbone.config.experts
    assert found is not None and (found.num_prototypes, found.top_k) == (prototypes, None)
    x, valid = torch.randn(100, 64), torch.ones(100, dtype=torch.bool)
    load_of_each = backbone.blocks[0].router(x, valid).load
    assert (load_of_each > 0).all() and load_of_each.sum() == 100 * prototypes


def test_additions_in_python_are_those_of_the_command(tmp_path: Path) -> None:
    publish("llama", tmp_path / "base")
    m6 = openm6.from_hf(
        tmp_path / "base", device="cpu", experts=4, top_k=1, modalities=["numbers"], lora_rank=4, noise=0.1, reinit=0.5
    )
    backbone = m6.loaded.description.backbone
    assert backbone.experts is not None and (backbone.experts.num_experts, backbone.experts.top_k) == (4, 1)
    (others,) = backbone.modality_experts
    assert others.modalities == ("numbers",) and others.lora == LoraConfig(r=4)
    first = m6.loaded.omni.backbone.blocks[0].mlp.experts.up
    assert not torch.equal(first[0], first[1])
    with pytest.raises(ConfigError, match="openm6.from_hf: modalities.0"):
        openm6.from_hf(tmp_path / "base", modalities=["smell"])
    with pytest.raises(CheckpointError, match="adapter_config.json cannot be read"):
        openm6.from_hf(tmp_path / "base", adapter=tmp_path / "base")
    with pytest.raises(ConfigError, match="sha256 is for a single file"):
        openm6.from_hf(tmp_path / "base", sha256="0")


@pytest.mark.parametrize(("package", "source"), [("gguf", "model.gguf"), ("huggingface_hub", "owner/name")])
def test_a_package_that_is_not_installed_is_named(
    package: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{source} needs an optional package: pip install {package}$"):
        openm6.from_hf(source)


def test_noise_and_new_units_make_experts_differ(tmp_path: Path) -> None:
    publish("llama", tmp_path / "base")
    weights = {}
    for name, options in {"plain": {}, "noise": {"noise": 0.1}, "new": {"reinit": 0.25}}.items():
        summary = import_model(str(tmp_path / "base"), tmp_path / name, additions=Additions(experts=2, **options))
        assert (largest_difference(summary) > 1e-2) == bool(options)
        weights[name] = load(tmp_path / name, "cpu").omni.backbone.blocks[1].mlp.experts
    plain, noise, new = weights.values()
    assert torch.equal(plain.up[0], plain.up[1]) and torch.equal(plain.down[0], plain.down[1])
    assert 0.09 < (noise.up[0] - plain.up[0]).std() / plain.up[0].std() < 0.11
    changed = (new.up[0] != plain.up[0]).any(0)  # 2F
    assert changed.sum() == 48 and torch.equal(*changed.chunk(2)), "a quarter of 96 units, in gate and up alike"
    assert torch.equal((new.down[0] != plain.down[0]).any(1), changed[:96])
    assert not torch.equal(new.up[0], new.up[1])


def test_experts_are_not_added_to_experts(tmp_path: Path) -> None:
    publish("olmoe", tmp_path / "base")
    with pytest.raises(ConfigError, match="--experts is for a dense decoder"):
        import_model(str(tmp_path / "base"), tmp_path / "out", additions=Additions(experts=4))
    publish("llama", tmp_path / "dense")
    with pytest.raises(OpenM6Error, match="num_experts=4 must be a multiple of num_prototypes=3"):
        import_model(str(tmp_path / "dense"), tmp_path / "out", additions=Additions(experts=4, prototypes=3))
    with pytest.raises(ConfigError, match="prototypes is for experts, and there are none"):
        build(Additions, {"prototypes": 2}, "here")
    with pytest.raises(ConfigError, match="lora_rank is for modalities, and there are none"):
        build(Additions, {"lora_rank": 2}, "here")
    with pytest.raises(OpenM6Error, match="top_k=4 exceeds num_experts=2"):
        import_model(str(tmp_path / "dense"), tmp_path / "out", additions=Additions(experts=2, top_k=4))


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_modality_experts_serve_their_tokens_and_leave_text_as_it_is(kind: str, tmp_path: Path) -> None:
    publish(kind, tmp_path / "base")
    import_model(str(tmp_path / "base"), tmp_path / "text", receipt=False)
    added = Additions(modalities=("image", "numbers"), lora_rank=4)
    assert largest_difference(import_model(str(tmp_path / "base"), tmp_path / "run", additions=added)) < 1e-4
    text, run = load(tmp_path / "text", "cpu"), load(tmp_path / "run", "cpu")
    assert torch.equal(states(run, WORDS), states(text, WORDS)) and text_of(run) == text_of(text)
    before = states(run, WORDS, PIXELS, WORDS)
    with torch.no_grad():
        for block in run.omni.backbone.blocks:
            block.modality_experts[0].experts.down.mul_(-3)
    after, count = states(run, WORDS, PIXELS, WORDS), len(states(run, WORDS))
    update = run.omni.backbone.blocks[0].modality_experts[0].attention["qkv"]
    assert len(update.a["q_proj"]) == 4 and update.a["q_proj"].std() > 0 and not update.b["q_proj"].any()
    with torch.no_grad():
        update.b["v_proj"].normal_()
    assert (states(run, WORDS, PIXELS, WORDS)[count:] != after[count:]).any()
    after = states(run, WORDS, PIXELS, WORDS)
    torch.testing.assert_close(after[:count], before[:count])
    assert (after[count:] != before[count:]).any(1).all(), "the image, and the words after it"
    assert torch.equal(states(run, WORDS), states(text, WORDS))
    run.omni.train()  # rows of a training are padded
    torch.testing.assert_close(states(run, WORDS, PIXELS, WORDS), after)
