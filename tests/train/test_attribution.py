"""A step's work by modality and task adds up to its tokens."""

from __future__ import annotations

import numpy as np
import pytest

from openm6.modalities.batch import build_sequence, collate
from openm6.models.config import count_parameters
from openm6.models.omni import Omni
from openm6.train.attribution import PASSES, Attribution
from tests.small_model import BACKBONE, modalities


def test_operations_follow_tokens_and_what_their_adapters_multiply() -> None:
    omni = Omni(BACKBONE, modalities())
    text = modalities()["text"]
    read = text.source("seven red apples")
    wanted = text.target("apples")
    rng = np.random.default_rng(0)
    heard = modalities()["sound"].source(rng.normal(size=8000).astype(np.float32) * 0.1)
    batch = collate(
        [[build_sequence([read, wanted], "echo"), build_sequence([heard, wanted], "transcribe")]], 256
    )
    shares = Attribution(omni).shares(batch)
    kinds, tasks = shares["modality"], shares["task"]
    assert set(tasks) == {"echo", "transcribe"} and set(kinds) == set(batch.kinds)
    assert sum(share.tokens for share in kinds.values()) == batch.tokens
    assert sum(share.tokens for share in tasks.values()) == batch.tokens
    assert sum(share.operations for share in kinds.values()) == pytest.approx(
        sum(share.operations for share in tasks.values())
    )
    backbone = PASSES * count_parameters(omni.config).active
    head = PASSES * omni.text.embedding.weight.numel()
    learned = 2 * len(wanted)
    assert kinds["text"].operations == pytest.approx((len(read) + learned) * backbone + learned * head)
