"""Our logits equal those of `transformers` on the same random weights, in one pass and step by step."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from openm6.core.errors import CheckpointError, ConfigError
from openm6.models.backbone import Backbone
from openm6.models.import_qwen import ImportedModel, import_qwen, qwen_config, read_qwen
from openm6.nn.cache import SlotWriter
from openm6.ops.sequence import causal_meta
from tests.sequences import narrow

transformers = pytest.importorskip("transformers")

SIZE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 1000.0,
    "initializer_range": 0.2,
}
SPARSE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "sparse": {**SPARSE, "norm_topk_prob": True},
    "sparse, gates as they are": {**SPARSE, "norm_topk_prob": False},
    "sparse in part": {**SPARSE, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
}


def theirs(name: str) -> Any:
    torch.manual_seed(0)
    settings = {**SIZE, **VARIANTS[name]}
    if "num_experts" in settings:
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def ours(imported: ImportedModel) -> Backbone:
    model = Backbone(imported.config)
    model.load_state_dict(imported.backbone)
    return model.eval()


def singly(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights as published files hold them: each expert's three matrices by name."""
    single: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for number, matrix in enumerate(value):
                gate, up = matrix.chunk(2)
                stem = name.removesuffix("gate_up_proj") + str(number)
                single |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            single |= {f"{stem}{number}.down_proj.weight": matrix for number, matrix in enumerate(value)}
        else:
            single[name] = value
    return single


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name):
    reference = theirs(name)
    imported = import_qwen(reference.state_dict(), reference.config.to_dict())
    model, tokens = ours(imported), torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        expected = reference(tokens).logits
        hidden, _ = model(imported.embedding[tokens], causal_meta(2, 17))
        torch.testing.assert_close(hidden @ imported.head.t(), expected, rtol=0, atol=1e-5)
        assert expected.std() > 0.5, "logits near zero would prove little"


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_cached_decoding_equals_theirs(name):
    reference = theirs(name)
    imported = import_qwen(reference.state_dict(), reference.config.to_dict())
    model, tokens = ours(imported), torch.randint(0, 61, (2, 12))
    cache, past, meta = model.new_cache(2, 12), None, causal_meta(1, 12)
    with torch.no_grad():
        for start, stop in ((0, 8), (8, 9), (9, 10), (10, 12)):
            step = tokens[:, start:stop]
            expected = reference(step, past_key_values=past, use_cache=True)
            past = expected.past_key_values
            for row in range(2):
                embedded, new = imported.embedding[step[row : row + 1]], narrow(meta, start, stop)
                hidden, _ = model(embedded, new, SlotWriter(cache, row, start))
                logits = hidden[0] @ imported.head.t()
                torch.testing.assert_close(logits, expected.logits[row], rtol=0, atol=1e-5)


def test_published_files_are_read(tmp_path):
    """Two files, experts held singly, config.json as older versions wrote it."""
    reference = theirs("sparse")
    state = singly(reference.state_dict())
    names = sorted(state)
    for part in (0, 1):
        chosen = {name: state[name].contiguous() for name in names[part::2]}
        save_file(chosen, tmp_path / f"model-{part}.safetensors")
    settings = {key: value for key, value in reference.config.to_dict().items() if key != "rope_parameters"}
    settings = {**settings, "rope_theta": 1000.0, "rope_scaling": None, "num_experts": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    ours_read = read_qwen(tmp_path)
    direct = import_qwen(reference.state_dict(), reference.config.to_dict())
    assert ours_read.config == direct.config
    assert ours_read.backbone.keys() == direct.backbone.keys()
    assert all(torch.equal(ours_read.backbone[name], value) for name, value in direct.backbone.items())


def test_missing_tensors_and_files_are_named(tmp_path):
    reference = theirs("dense")
    state = reference.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        import_qwen(state, reference.config.to_dict())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_qwen(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict()))
    with pytest.raises(CheckpointError, match="safetensors"):
        read_qwen(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "llama"}, "choose a qwen3 or qwen3_moe"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "scaled rotary positions"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_models_of_another_kind_are_refused(change, complaint):
    settings = {**theirs("dense").config.to_dict(), **change}
    with pytest.raises(ConfigError, match=complaint):
        qwen_config(settings)
