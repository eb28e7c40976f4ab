"""Pictures and sounds from codes: all hidden places predicted at once, the surest kept, the rest predicted again.

MaskGIT's decoding (arXiv 2202.04200, section 3.2) with classifier-free guidance that grows over the steps. Places
whose codes are given stay as they are, so filling in a hole is the same loop.
"""

# Letters: B prompts, N places, G codes a place, C codebook size, D width

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openm6.base.config import Config
from openm6.generate.prompt import Prompt, Reading, read_prompts
from openm6.generate.sampling import RowNoise
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni


class MaskedSampling(Config):
    """`guidance` 0 leaves the unconditional pass out; `noise` is what the confidences are shaken with at first."""

    steps: int = Field(default=8, ge=1, le=256)
    guidance: float = Field(default=2.0, ge=0)
    temperature: float = Field(default=1.0, ge=0)
    noise: float = Field(default=2.0, ge=0)
    order: Literal["confidence", "random"] = "confidence"
    seed: int = 0


@torch.inference_mode()
def fill_codes(omni: Omni, prompts: list[Prompt], wanted: list[Segment], sampling: MaskedSampling) -> Tensor:
    """Codes of the wanted target tokens, those that are hidden drawn in answer to each prompt.  # -> B N G

    All of `wanted` are of one kind and size; their codes are read only where they are not hidden. Row i draws from
    seed + i.
    """
    adapter = omni.adapter(wanted[0].kind)
    assert isinstance(adapter, CodesAdapter)
    rows = (
        [*prompts, *([] for _ in prompts)] if sampling.guidance > 0 else prompts
    )  # the empty prompts come last
    reading = read_prompts(omni, rows, len(wanted[0]))
    unknown, given = (
        _stacked(wanted, name, reading.place.device) for name in ("hidden", "codes")
    )  # B N, B N G
    codes = given.masked_fill(unknown[..., None], 0)
    noise = RowNoise([sampling.seed + row for row in range(len(prompts))])
    first_unknown = unknown.sum(
        1
    )  # of this request, not of the grid: a small hole must not be filled one by one
    for step in range(1, sampling.steps + 1):
        share = step / sampling.steps
        states = _run(reading, wanted[0], codes, unknown)
        drawn, confidence = _draw(adapter, states, codes, sampling.guidance * share, sampling, noise)
        codes = torch.where(unknown[..., None], drawn, codes)
        shaken = noise.gumbel(codes.shape[1]).to(codes.device)
        if sampling.order == "confidence":
            shaken = confidence + sampling.noise * (1 - share) * shaken
        left = torch.floor(first_unknown * math.cos(math.pi / 2 * share)).long() * (step < sampling.steps)
        unknown = least_sure(shaken, unknown, left)
        if not bool(unknown.any()):
            break
    return codes


def _stacked(wanted: list[Segment], name: str, device: torch.device) -> Tensor:
    return torch.from_numpy(np.stack([tokens.arrays[name] for tokens in wanted])).to(device)


def _run(reading: Reading, like: Segment, codes: Tensor, unknown: Tensor) -> Tensor:
    """Hidden states of all places for every prompt read, the empty ones included.  # -> B' N D"""
    repeat = reading.batch // len(codes)
    flat = codes.repeat(repeat, 1, 1).flatten(0, 1)  # B N G -> B'*N G
    places = torch.from_numpy(like.arrays["places"]).to(codes.device).repeat(reading.batch, 1)
    arrays = {"shown": flat, "codes": flat, "hidden": unknown.repeat(repeat, 1).flatten(), "places": places}
    grid = torch.from_numpy(like.grid).to(codes.device)
    states = reading.run(like.kind, arrays, reading.layout(1, grid, block_id=1, moves=like.moves))
    reading.forget()
    return states


def _draw(
    adapter: CodesAdapter,
    states: Tensor,
    codes: Tensor,
    scale: float,
    sampling: MaskedSampling,
    noise: RowNoise,
) -> tuple[Tensor, Tensor]:
    """A code for each group of each place in turn, and the log-probability of what was drawn.  # -> B N G, B N"""
    batch, places, groups = codes.shape
    drawn = torch.zeros_like(codes)
    confidence = torch.zeros(batch, places, device=codes.device)
    for group in range(groups):
        before = drawn.repeat(len(states) // batch, 1, 1).flatten(0, 1)
        logits = (
            adapter.group_logits(states.flatten(0, 1), before, group)
            .float()
            .unflatten(0, (len(states), places))
        )
        if scale:
            with_prompt, without = logits[:batch], logits[batch:]
            logits = with_prompt + scale * (with_prompt - without)
        logits = logits[:batch]
        scores = logits
        if sampling.temperature > 0:
            scores = logits / sampling.temperature + noise.gumbel(places, logits.shape[-1]).to(logits.device)
        chosen = scores.argmax(-1)
        drawn[..., group] = chosen
        confidence += logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    return drawn, confidence


def least_sure(confidence: Tensor, unknown: Tensor, count: Tensor) -> Tensor:
    """The `count` unknown places of each row with the lowest confidence.  # B N, B N, B -> B N"""
    rank = confidence.masked_fill(~unknown, float("inf")).argsort(-1).argsort(-1)
    still = torch.minimum(count, (unknown.sum(1) - 1).clamp(min=0))  # every step settles at least one place
    return unknown & (rank < still[:, None])
