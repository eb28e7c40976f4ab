"""Presets have the sizes that they promise, and the papers' are those of the papers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from openm6.core.errors import ConfigError
from openm6.models.backbone import Backbone
from openm6.models.config import count_parameters
from openm6.models.presets import PRESETS, ModelConfig, build_backbone, preset


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_modules_on_meta(name):
    config = preset(name).backbone
    with torch.device("meta"):
        model = Backbone(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "total", "digits"),
    [
        ("m6-base", 0.3e9, 1),
        ("m6-10b", 10.07e9, 4),
        ("m6-100b", 103e9, 3),
        ("m6t-1t", 1.003e12, 4),
        ("m6-10t", 10.05e12, 4),
    ],
)
def test_papers_sizes(name, total, digits):
    found = count_parameters(preset(name).backbone).total
    assert float(f"{found:.{digits - 1}e}") == total


def test_active_experts_of_the_largest():
    config = preset("m6-10t").backbone
    assert config.experts is not None
    assert (
        2 * config.num_layers * config.experts.experts_per_token * config.hidden_size * config.experts.intermediate_size
        == 78_517_370_880
    )


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("nano", 5e6, 2e6), ("tiny", 50e6, 20e6), ("small", 0.3e9, 0.08e9), ("base", 3e9, 0.3e9)],
)
def test_our_sizes(name, total, active):
    count = preset(name).parameters
    assert count.total == pytest.approx(total, rel=0.12)
    assert count.active == pytest.approx(active, rel=0.12)


def test_a_mistyped_name_gets_a_hint():
    with pytest.raises(ConfigError, match="did you mean 'm6-10t'"):
        preset("m6_10t")


def test_settings_of_modality_experts_without_effect_are_refused():
    def built(dense: bool = False, **settings: object) -> object:
        added = {"intermediate_size": 32, "num_experts": 2, "top_k": 1, **settings}
        layers = {"experts": None, "dense": {"intermediate_size": 64}} if dense else {}
        return build_backbone(ModelConfig(preset="nano", overrides={**layers, "modality_experts": added}))

    assert built(balance="aux") and built(dense=True)
    with pytest.raises(ConfigError, match="balance: bias has no effect beside other experts: set balance: aux"):
        built()
    with pytest.raises(ConfigError, match="num_shared=1 is not supported: leave it out"):
        built(balance="aux", num_shared=1)


@pytest.mark.parametrize(
    ("part", "added", "removed", "sentence"),
    [
        ("dense", {"intermediate_size": 64}, {"experts": None}, "overrides.dense has no effect, .* set experts: null"),
        ("experts", {"num_prototypes": 2}, {"top_k": None}, "either top_k or num_prototypes, and the other to null"),
    ],
)
def test_an_override_that_the_preset_contradicts_says_what_to_remove(part, added, removed, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build_backbone(ModelConfig(preset="nano", overrides={part: added}))
    overrides = {part: {**added, **removed}} if part == "experts" else {part: added, **removed}
    assert build_backbone(ModelConfig(preset="nano", overrides=overrides))


def test_presets_are_read_without_torch():
    code = "import sys, openm6.models.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
