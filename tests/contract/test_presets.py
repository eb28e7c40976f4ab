"""What every preset must do: build without memory, and be as large as it says."""

from __future__ import annotations

import pytest
import torch

from openm6.models.backbone import Backbone
from openm6.models.config import count_parameters
from openm6.models.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_without_memory_and_counts_itself(name: str) -> None:
    chosen = preset(name)
    with torch.device("meta"):
        model = Backbone(chosen.backbone)
    assert all(parameter.is_meta for parameter in model.parameters())
    count = count_parameters(chosen.backbone)
    assert count.total == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < count.active <= count.total
    embedding = chosen.vocab_size * chosen.backbone.hidden_size
    assert chosen.parameters.total == count.total + embedding


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_name_and_says_what_it_is_for(name: str) -> None:
    assert PRESETS[name].name == name and PRESETS[name].description
