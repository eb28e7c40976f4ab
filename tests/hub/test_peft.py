"""Low-rank adapters in PEFT's format, both ways, for random decoders of every shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from openm6.checkpoint.folder import latest
from openm6.checkpoint.save import Snapshot, save
from openm6.core.errors import CheckpointError, ConfigError
from openm6.hub.export import export_run
from openm6.hub.importing import Additions, import_model
from openm6.inference.load import load, read_texts
from openm6.models.description import build_model
from openm6.models.omni import Omni
from openm6.nn.config import LoraConfig
from openm6.ops.sequence import causal_meta
from tests.hub.published import publish

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TOKENS = torch.arange(2, 34)[None] * 7 % 300
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS = ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmoe"]


@torch.no_grad()
def our_logits(run: Path) -> Tensor:
    omni = load(run, "cpu").omni
    hidden, _ = omni.backbone(omni.text.embedding.weight[TOKENS], causal_meta(*TOKENS.shape))
    return (hidden @ omni.text.output_weight.T)[0, :, :300]


@torch.no_grad()
def their_logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(TOKENS).logits[0, :, :300]


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """As after training: no factor is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def trained_run(source: Path, folder: Path, lora: LoraConfig) -> Path:
    """An imported run with random adapters."""
    import_model(str(source), folder / "imported", receipt=False)
    description, tokenizer = read_texts(latest(folder / "imported"))
    backbone = description.backbone.model_copy(update={"lora": lora})
    description = description.model_copy(update={"backbone": backbone})
    omni, _ = build_model(description, tokenizer, "")
    state = load(folder / "imported", "cpu").omni.state_dict()
    torch.manual_seed(2)
    for name, parameter in omni.state_dict(keep_vars=True).items():
        parameter.data = state[name] if name in state else torch.randn(parameter.shape) * 0.1
    files = {"model.json": description.to_json(), "tokenizer.json": tokenizer}
    save(Snapshot(1, omni, {}, {}, files=files), folder / "run/checkpoints", keep=1)
    return folder / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_gives_the_same_logits_here(kind: str, tmp_path: Path) -> None:
    base = publish(kind, tmp_path / "base")
    sparse = kind in ("qwen3_moe", "mixtral", "olmoe")
    config = peft.LoraConfig(
        r=5, lora_alpha=11, target_modules=DENSE[:4] if sparse else DENSE, rank_pattern={"q_proj": 3},
        target_parameters=EXPERTS if sparse else None,
        alpha_pattern={"o_proj": 4.0, "^model.layers.0.self_attn.q_proj": 7.0},
    )  # fmt: skip
    theirs = randomize(peft.get_peft_model(base, config))
    theirs.save_pretrained(tmp_path / "adapter")
    import_model(str(tmp_path / "base"), tmp_path / "run", additions=Additions(adapter=tmp_path / "adapter"))
    torch.testing.assert_close(our_logits(tmp_path / "run"), their_logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fused"), [*((kind, False) for kind in KINDS), ("qwen3_moe", True), ("mixtral", True)]
)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(kind: str, fused: bool, tmp_path: Path) -> None:
    base = publish(kind, tmp_path / "base")
    run = trained_run(tmp_path / "base", tmp_path, LoraConfig(r=8, alpha=12, use_rslora=True))
    export_run(run, tmp_path / "adapter", "peft", fused=fused)
    ours = our_logits(run)
    theirs = their_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    import_model(
        str(tmp_path / "base"), tmp_path / "again", receipt=False, additions=Additions(adapter=tmp_path / "adapter")
    )
    torch.testing.assert_close(our_logits(tmp_path / "again"), ours, atol=1e-4, rtol=1e-4)
    export_run(run, tmp_path / "merged", "hf")
    import_model(str(tmp_path / "merged"), tmp_path / "plain", receipt=False)
    torch.testing.assert_close(our_logits(tmp_path / "plain"), ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_updates_beside_the_weights_equal_merged_ones(kind: str, tmp_path: Path) -> None:
    publish(kind, tmp_path / "base")
    run = trained_run(
        tmp_path / "base", tmp_path, LoraConfig(r=8, targets=("q_proj", "o_proj", "up_proj", "down_proj"))
    )
    merged = load(run, "cpu").omni
    description, tokenizer = read_texts(latest(run))
    omni: Omni = build_model(description, tokenizer, "")[0]
    with torch.no_grad():
        for name, tensor in load_file(latest(run) / "model.safetensors").items():
            omni.state_dict(keep_vars=True)[name].copy_(tensor)
    x = torch.randn(2, 16, 64)
    (beside, _), (plain, _) = (one.backbone(x, causal_meta(2, 16)) for one in (omni, merged))
    torch.testing.assert_close(beside, plain, atol=1e-4, rtol=1e-4)
    beside.sum().backward()
    found = {name: one.grad for name, one in omni.backbone.named_parameters() if ".lora." in name}
    learning = {name.split(".a.")[0].split(".b.")[0] for name, one in found.items() if one is not None and one.any()}
    assert len(learning) == 4 * 3


def as_old(folder: Path, version: str | None) -> None:
    """Rewrite a fused adapter as PEFT before 0.19 did: A and B have each other's sizes."""
    tensors, experts = load_file(folder / "adapter_model.safetensors"), 4
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        a = tensors[key].view(experts, -1, tensors[key].shape[1])
        b = tensors[other].view(len(tensors[other]), -1, experts).permute(2, 0, 1)
        tensors[key] = b.mT.flatten(0, 1).contiguous()
        tensors[other] = a.mT.permute(1, 2, 0).flatten(1).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["peft_version"] = version
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("targets", ["all-linear", ("gate_proj", "up_proj")])
def test_the_old_layout_of_experts_is_told_by_sizes_or_the_version(targets: object, tmp_path: Path) -> None:
    publish("qwen3_moe", tmp_path / "base")  # D = 64 = 2F, so that gate_up alone does not tell
    run = trained_run(tmp_path / "base", tmp_path, LoraConfig(r=8, targets=targets))
    export_run(run, tmp_path / "adapter", "peft", fused=True)
    as_old(tmp_path / "adapter", None)
    if targets != "all-linear":
        with pytest.raises(CheckpointError, match="add the peft_version that wrote it"):
            import_model(
                str(tmp_path / "base"),
                tmp_path / "out",
                receipt=False,
                additions=Additions(adapter=tmp_path / "adapter"),
            )
        settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"peft_version": "0.18.1"}))
    import_model(
        str(tmp_path / "base"), tmp_path / "out", receipt=False, additions=Additions(adapter=tmp_path / "adapter")
    )
    torch.testing.assert_close(our_logits(tmp_path / "out"), our_logits(run), atol=1e-4, rtol=1e-4)


def test_an_adapter_that_names_another_base_of_the_same_sizes_gives_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish("llama", tmp_path / "Base-1B")
    run = trained_run(tmp_path / "Base-1B", tmp_path, LoraConfig(r=8))
    export_run(run, tmp_path / "adapter", "peft")
    path, added = tmp_path / "adapter/adapter_config.json", Additions(adapter=tmp_path / "adapter")
    for base, warned in (("owner/base-1b", False), ("gone/base-1B.Q4_K_M.gguf", False), ("owner/Base-1B-Chat", True)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        caplog.clear()
        import_model(str(tmp_path / "Base-1B"), tmp_path / base, receipt=False, additions=added)
        assert [record.getMessage().partition(":")[0] for record in caplog.records] == warned * [
            f"{tmp_path / 'adapter'} was trained for {base}"
        ]
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is not a readable safetensors file") as error:
        import_model(str(tmp_path / "Base-1B"), tmp_path / "out", receipt=False, additions=added)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_adapter_that_is_more_or_of_another_base_is_refused(tmp_path: Path) -> None:
    publish("llama", tmp_path / "base")
    run = trained_run(tmp_path / "base", tmp_path, LoraConfig(r=8))
    export_run(run, tmp_path / "adapter", "peft")
    publish("qwen3", tmp_path / "other")  # heads of another size
    with pytest.raises(CheckpointError, match="for another base"):
        import_model(str(tmp_path / "other"), tmp_path / "out", additions=Additions(adapter=tmp_path / "adapter"))
    publish("qwen3_moe", tmp_path / "sparse")
    with pytest.raises(CheckpointError, match="which this model lacks: it is for another base"):
        import_model(str(tmp_path / "sparse"), tmp_path / "out", additions=Additions(adapter=tmp_path / "adapter"))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ConfigError, match="an adapter with use_dora, which is not supported"):
        import_model(str(tmp_path / "base"), tmp_path / "out", additions=Additions(adapter=tmp_path / "adapter"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="has no low-rank adapters"):
        export_run(tmp_path / "imported", tmp_path / "none", "peft")
