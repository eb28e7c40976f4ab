"""How often a rank looks whether another one has failed."""

from __future__ import annotations

from openm6.distributed.failure import LOOK_EVERY, LOOK_LATER, PATIENCE, pause_before


def test_looks_become_rarer_and_never_stop() -> None:
    pauses = [pause_before(look) for look in range(200)]
    assert pauses[0] == LOOK_EVERY and pauses == sorted(pauses)
    assert pauses[-1] == LOOK_LATER and pause_before(10**9) == LOOK_LATER
    assert sum(pauses[:10]) < 10, "a failure at the start is noticed soon"


def test_rank_0_looks_before_the_others_lose_patience() -> None:
    assert LOOK_LATER + 2 * LOOK_EVERY < PATIENCE
