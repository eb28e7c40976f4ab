"""Prompts that arrive one after the other, answered by us and by the peer's continuous batching: who begins sooner."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.arrivals import tails
from benchmarks.our_text import Seen, answer_prompts
from benchmarks.peer_qwen import QwenPeer
from openm6.inference.text import TextRows

SHARE = 0.7  # of what the peer's best setting answers at once, so that it keeps up


def compare_under_load(
    rows: TextRows, peer: QwenPeer | None, prompts: list[list[int]], given: int, rates: dict[str, float]
) -> dict[str, Any]:
    """The same prompts at the same random moments to each; `rates` are requests a second when all are there at once.

    The peer takes part as it comes and in its best setting, where that is one of continuous batching.
    """
    others = [rate for name, rate in rates.items() if name != "openm6"]
    rate = SHARE * max(others or list(rates.values()))
    moments = arrival_moments(len(prompts), rate)
    found: dict[str, Any] = {"arrivals_a_second": rate}
    ways: dict[str, Callable[[], Seen | str]] = {
        "openm6": lambda: answer_prompts(rows, prompts, given, moments)
    }
    if peer is not None:
        settings = peer.batching_settings(prompts, given)
        ways |= {n: partial(peer.under_load, prompts, given, moments, settings[n]) for n in wanted(rates)}
    for name, call in ways.items():
        seen = call()
        found[name] = {"error": seen} if isinstance(seen, str) else told(seen, moments)
    return found


def wanted(rates: dict[str, float]) -> list[str]:
    """The peer's continuous batching as it comes (the first that was measured) and its fastest setting."""
    batching = [name for name in rates if "continuous" in name]
    return (
        list(dict.fromkeys([*batching[:1], max(batching, key=lambda name: rates[name])])) if batching else []
    )


def arrival_moments(count: int, rate: float) -> list[float]:
    """Seconds after the start, with exponential gaps; the same on every machine but for the rate."""
    dice, moment, found = random.Random(1), 0.0, []
    for _ in range(count):
        moment += dice.expovariate(rate)
        found.append(moment)
    return found


def told(seen: Seen, moments: list[float]) -> dict[str, Any]:
    """Waiting times from each arrival to the first token and to the whole answer, and requests a second."""
    first = [seen.first[number] - moment for number, moment in enumerate(moments)]
    whole = [seen.last[number] - moment for number, moment in enumerate(moments)]
    return {
        "requests_a_second": len(moments) / max(seen.last.values()),
        "first_token_seconds": tails(first),
        "answer_seconds": tails(whole),
    }
