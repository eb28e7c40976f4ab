"""The learning rate over a run: up, flat, down; moments that rounding would stop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from openm6.optim.config import OptimizerConfig, ScheduleConfig, decay_start, lr_multiplier


def test_warmup_stable_decay() -> None:
    config = ScheduleConfig(warmup_steps=10, decay_fraction=0.2, decay="linear")
    factors = [lr_multiplier(step, 100, config) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([1 - step / 21 for step in range(1, 21)])


def test_the_square_root_falls_faster_at_first() -> None:
    linear, root = (ScheduleConfig(warmup_steps=0, decay_fraction=0.5, decay=kind) for kind in ("linear", "sqrt"))
    for step in range(51, 100):
        assert lr_multiplier(step, 100, root) < lr_multiplier(step, 100, linear)


def test_an_unknown_length_has_no_decay() -> None:
    config = ScheduleConfig(warmup_steps=4, decay_fraction=1.0)
    assert [lr_multiplier(step, None, config) for step in (2, 4, 9999)] == [0.5, 1.0, 1.0]


@given(
    total=st.integers(1, 500),
    warmup=st.integers(0, 600),
    fraction=st.floats(0, 1),
    min_ratio=st.floats(0, 1),
    decay=st.sampled_from(["sqrt", "linear"]),
)
def test_every_factor_is_above_0_and_at_most_1(
    total: int, warmup: int, fraction: float, min_ratio: float, decay: str
) -> None:
    config = ScheduleConfig(warmup_steps=warmup, decay_fraction=fraction, min_lr_ratio=min_ratio, decay=decay)  # type: ignore[arg-type]
    factors = [lr_multiplier(step, total, config) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    start = decay_start(total, config)
    tail = factors[max(start, warmup) :]
    assert tail == sorted(tail, reverse=True)


def test_a_second_moment_in_bf16_that_never_falls_is_refused() -> None:
    with pytest.raises(ValidationError, match="set rounding: stochastic, or a beta of at most"):
        OptimizerConfig(moments="bf16", rounding="nearest", betas=(0.9, 0.999))
    OptimizerConfig(moments="bf16", rounding="nearest", betas=(0.9, 0.98))
    OptimizerConfig(moments="bf16", rounding="stochastic", betas=(0.9, 0.999))
    # Why: half a step of bf16 is 2**-9 of a value at most, so a fall by a thousandth leaves it as it is.
    moment = torch.tensor(1.0, dtype=torch.bfloat16)
    assert moment * 0.999 == moment and moment * 0.98 < moment
