"""A loss spike is told from noise and from a falling loss."""

from __future__ import annotations

import json

import numpy as np

from openm6.train.watch import SpikeWatch


def noisy_losses(count: int) -> list[float]:
    draw = np.random.default_rng(1)
    return [5 * float(np.exp(-step / 200)) + 2 + 0.1 * float(draw.normal()) for step in range(count)]


def test_noise_is_no_spike() -> None:
    watch = SpikeWatch()
    assert not any(watch.observe(loss) for loss in noisy_losses(2000))


def test_a_spike_is_told_and_the_next_ordinary_loss_is_not() -> None:
    watch = SpikeWatch()
    losses = noisy_losses(300)
    losses[200] += 5
    assert [step for step, loss in enumerate(losses) if watch.observe(loss)] == [200]


def test_the_first_losses_and_those_that_are_not_finite_are_no_spikes() -> None:
    watch = SpikeWatch()
    assert not watch.observe(2.0) and not watch.observe(50.0)
    assert not watch.observe(float("nan")) and not watch.observe(float("inf"))
    assert watch.seen == 2


def test_its_state_survives_json() -> None:
    whole, first, second = SpikeWatch(), SpikeWatch(), SpikeWatch()
    losses = noisy_losses(100)
    for loss in losses:
        whole.observe(loss)
    for loss in losses[:40]:
        first.observe(loss)
    second.load_state(json.loads(json.dumps(first.state())))
    for loss in losses[40:]:
        second.observe(loss)
    assert second.state() == whole.state()
