"""Settings of the loop that cannot work are refused, with the fix."""

from __future__ import annotations

from typing import Any

import pytest

from openm6.core.config import build
from openm6.core.errors import ConfigError
from openm6.train.config import LoopConfig


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"steps": 0}, "steps: must be at least 1, or auto"),
        ({"steps": "auto"}, "steps: auto needs minutes"),
        ({"minutes": 5, "schedule": {"decay_fraction": 1.0}}, "steps: auto needs some steps at the full rate"),
        (
            {"early_stopping_patience": 2, "held_out": {"every": 5}, "schedule": {"decay_fraction": 1.0}},
            "early_stopping_patience needs some steps at the full rate",
        ),
        ({"offload": {}, "compile": True}, "by loop.offload.compile"),
        ({"optimizer": {"precision": "int8-adafactor"}, "activation_checkpointing": 2}, "by loop.offload.compile"),
        (
            {"steps": "auto", "minutes": 3, "schedule": {"decay_fraction": 1.0}},
            "decay_fraction to 0.9 or less",
        ),
        ({"optimizer": {"name": "adamm"}}, "no optimizer 'adamm'; did you mean 'adamw'"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "betas must both be at least 0 and below 1"),
        ({"save_evry": 3}, "did you mean 'save_every'"),
        ({"keep_last": 0}, "keep_last"),
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        build(LoopConfig, values, "loop")
    assert sentence in str(refusal.value)


def test_minutes_alone_are_the_length() -> None:
    assert build(LoopConfig, {"minutes": 5}, "loop").steps == "auto"
    assert build(LoopConfig, {"minutes": 5, "steps": 7}, "loop").steps == 7
    assert build(LoopConfig, {}, "loop").steps == 1000


def test_the_config_survives_a_file() -> None:
    config = LoopConfig(steps="auto", minutes=2)
    assert LoopConfig.model_validate(config.model_dump(mode="json")) == config
