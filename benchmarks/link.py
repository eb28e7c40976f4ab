"""What the link between a GPU and its host carries, both ways at once: the ceiling for streamed weights."""

from __future__ import annotations

import time

import torch

BYTES, ROUNDS = 2**28, 16


def link_ceiling(device: torch.device) -> float | None:
    """Gigabytes a second, in and out together, from registered memory; None where there is no link."""
    if device.type != "cuda":
        return None
    inside = [torch.empty(BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    outside = [torch.empty(BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    pairs = [(inside[0], outside[0]), (outside[1], inside[1])]
    _copy(pairs, streams, 2)
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    _copy(pairs, streams, ROUNDS)
    torch.cuda.synchronize(device)
    return 2 * ROUNDS * BYTES / (time.perf_counter() - began) / 1e9


def _copy(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], streams: list[torch.cuda.Stream], rounds: int
) -> None:
    for _ in range(rounds):
        for (target, source), stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
