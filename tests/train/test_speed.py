"""Which way blocks are run: as asked for, plainly on a processor, and never against another's choice."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from openm6.models.backbone import Backbone
from openm6.models.presets import preset
from openm6.models.running import CompiledBlocks, RecomputedBlocks, run_plainly
from openm6.train.config import LoopConfig
from openm6.train.speed import choose_way


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "plain"),  # on a processor, `auto` compiles nothing and keeps everything
        ({"compile": True}, "compiled"),
        ({"recompute": 2}, "recomputed"),
        ({"compile": True, "recompute": 3}, "recomputed, compiled"),
    ],
)
def test_blocks_run_as_the_config_says(settings, expected):
    backbone = Backbone(preset("nano").backbone)
    choose_way(backbone, LoopConfig(**settings), 1024, 0)
    run = backbone.run_block
    words = []
    if isinstance(run, RecomputedBlocks):
        assert run.num_layers == settings["recompute"]
        words.append("recomputed")
        run = run.run
    words += ["compiled"] if isinstance(run, CompiledBlocks) else []
    assert (", ".join(words) or "plain") == expected


def test_a_choice_of_others_stands():
    backbone = Backbone(preset("nano").backbone)
    own = RecomputedBlocks(run_plainly, 1)
    backbone.run_block = own
    choose_way(backbone, LoopConfig(compile=True), 1024, 0)
    assert backbone.run_block is own


def test_no_layers_below_zero():
    with pytest.raises(ValidationError, match="0 or more"):
        LoopConfig(recompute=-1)
