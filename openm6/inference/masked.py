"""Masked-parallel decoding of images and audio, batched: each at its own step, with its own settings and seed.

MaskGIT's decoding (arXiv 2202.04200, section 3.2): all masked positions are predicted at once, the most confident are
kept, the others are predicted again; classifier-free guidance grows over the steps. Positions whose codes are given
stay as they are, so inpainting is the same loop.
"""

# Shapes: B canvases, R rows (B, and one more for each that is guided), N positions, G codes of a position, C codebook
# size, D width

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.inference.prefill import Prompt, prompt_length, read_all, run_block
from openm6.inference.sampling import MaskedSampling, gumbel
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache


@dataclass(eq=False)
class Canvas:
    """Codes being decoded. `slot` holds the prompt (None: there is none), `place` is the position that follows it."""

    key: Any
    wanted: Segment
    sampling: MaskedSampling
    slot: int | None
    place: int
    codes: Tensor  # N G
    unknown: Tensor  # N
    first_unknown: int
    step: int = 0
    draws: int = 0

    @classmethod
    def of(
        cls, key: Any, wanted: Segment, sampling: MaskedSampling, slot: int | None, place: int, device: Any
    ) -> Canvas:
        """Return the state before the first step; the true codes of masked positions are not read."""
        hidden = torch.from_numpy(wanted.arrays["hidden"]).to(device)
        codes = torch.from_numpy(wanted.arrays["codes"]).to(device).masked_fill(hidden[:, None], 0)
        return cls(key, wanted, sampling, slot, place, codes, hidden, int(hidden.sum()))

    @property
    def guided(self) -> bool:
        return self.sampling.guidance > 0

    @property
    def share(self) -> float:
        """Fraction of the steps that are done."""
        return self.step / self.sampling.steps

    @property
    def like(self) -> tuple[str, int]:
        """Canvases that are equal in this can share a pass."""
        return self.wanted.kind, len(self.wanted)


def fill_codes(omni: Omni, prompts: list[Prompt], wanted: list[Segment], sampling: MaskedSampling) -> Tensor:
    """Codes of target tokens, the masked ones drawn in answer to each prompt.  # -> B N G

    All of `wanted` are of one kind and size. Row i draws from seed + i.
    """
    cache = omni.backbone.new_cache(len(prompts), max(map(prompt_length, prompts)))
    canvases = [
        Canvas.of(
            row,
            wanted[row],
            sampling.model_copy(update={"seed": sampling.seed + row}),
            row,
            place,
            omni.device,
        )
        for row, place in enumerate(read_all(omni, prompts, cache))
    ]
    active = [canvas for canvas in canvases if canvas.first_unknown]
    while active:
        done = advance(omni, cache, active)
        active = [canvas for canvas in active if canvas not in done]
    return torch.stack([canvas.codes for canvas in canvases])


@torch.inference_mode()
def advance(omni: Omni, cache: SlotCache, canvases: list[Canvas]) -> list[Canvas]:
    """Run one step of canvases that are alike; return those that are done."""
    for canvas in canvases:
        canvas.step += 1
    codes = torch.stack([canvas.codes for canvas in canvases])  # B N G
    unknown = torch.stack([canvas.unknown for canvas in canvases])  # B N
    states = _states(omni, cache, canvases, codes, unknown)  # R N D
    drawn, confidence = _drawn(omni, canvases, states, codes)
    codes = torch.where(unknown[..., None], drawn, codes)
    unknown = _still_unknown(canvases, confidence, unknown)
    left = unknown.any(1).tolist()
    for canvas, own, hidden in zip(canvases, codes, unknown, strict=True):
        canvas.codes, canvas.unknown = own, hidden
    return [canvas for canvas, more in zip(canvases, left, strict=True) if not more]


def _states(omni: Omni, cache: SlotCache, canvases: list[Canvas], codes: Tensor, unknown: Tensor) -> Tensor:
    """Hidden states of all positions with each prompt, then without it for those that are guided.  # -> R N D"""
    guided = torch.tensor([row for row, canvas in enumerate(canvases) if canvas.guided], dtype=torch.int64)
    rows = torch.cat([torch.arange(len(canvases)), guided]).to(codes.device)
    slots = [canvas.slot for canvas in canvases] + [None] * len(guided)
    place = [canvas.place for canvas in canvases] + [0] * len(guided)
    like = canvases[0].wanted
    flat = codes[rows].flatten(0, 1)
    # Canvases of one size have the same grid, but may differ in the embeddings of its cells.
    places = np.concatenate([canvases[row].wanted.arrays["places"] for row in rows.tolist()])
    arrays = {
        "shown": flat,
        "codes": flat,
        "hidden": unknown[rows].flatten(),
        "places": torch.from_numpy(places).to(codes.device),
    }
    return run_block(omni, cache, slots, place, like, arrays)


def _drawn(omni: Omni, canvases: list[Canvas], states: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """A code for each group of each position in turn, and the log-probability of what was drawn.  # -> B N G, B N"""
    adapter = omni.adapter(canvases[0].wanted.kind)
    assert isinstance(adapter, CodesAdapter)
    batch, places, groups = codes.shape
    guided = torch.tensor([row for row, c in enumerate(canvases) if c.guided], device=codes.device)
    rows = torch.cat([torch.arange(batch, device=codes.device), guided.long()])
    scale = _column(canvases, [c.sampling.guidance * c.share for c in canvases], codes)[guided.long()]
    temperature = _column(canvases, [c.sampling.temperature for c in canvases], codes)
    drawn = torch.zeros_like(codes)
    confidence = torch.zeros(batch, places, device=codes.device)
    for group in range(groups):
        logits = adapter.group_logits(states.flatten(0, 1), drawn[rows].flatten(0, 1), group)
        logits = logits.float().unflatten(0, (len(rows), places))  # R N C
        own, without = logits[:batch], logits[batch:]
        if len(guided):
            own = own.index_copy(0, guided, own[guided] + scale * (own[guided] - without))
        scores = own / torch.where(temperature > 0, temperature, 1.0)
        if any(canvas.sampling.temperature > 0 for canvas in canvases):
            noise = gumbel(*_drawing(canvases, codes), places, own.shape[-1])
            scores = torch.where(temperature > 0, scores + noise, own)
        for canvas in canvases:
            canvas.draws += canvas.sampling.temperature > 0
        chosen = scores.argmax(-1)
        drawn[..., group] = chosen
        confidence += own.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    return drawn, confidence


def _still_unknown(canvases: list[Canvas], confidence: Tensor, unknown: Tensor) -> Tensor:
    """Which positions stay masked after this step.  # B N, B N -> B N"""
    noisy = gumbel(*_drawing(canvases, unknown), unknown.shape[1])
    for canvas in canvases:
        canvas.draws += 1
    noise = _column(canvases, [c.sampling.noise * (1 - c.share) for c in canvases], confidence)[..., 0]
    confident = confidence + noise * noisy
    at_random = torch.tensor([c.sampling.order == "random" for c in canvases], device=unknown.device)
    noisy = torch.where(at_random[:, None], noisy, confident)
    left = [
        math.floor(c.first_unknown * math.cos(math.pi / 2 * c.share)) * (c.step < c.sampling.steps)
        for c in canvases
    ]
    return least_confident(noisy, unknown, torch.tensor(left, device=unknown.device))


def _drawing(canvases: list[Canvas], like: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds and numbers of the draws."""
    seeds = torch.tensor([canvas.sampling.seed for canvas in canvases], device=like.device)
    return seeds, torch.tensor([canvas.draws for canvas in canvases], device=like.device)


def _column(canvases: list[Canvas], values: list[float], like: Tensor) -> Tensor:
    """One value per canvas, broadcast over positions and codes.  # B 1 1"""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)


def least_confident(confidence: Tensor, unknown: Tensor, count: Tensor) -> Tensor:
    """The `count` masked positions of each row with the lowest confidence.  # B N, B N, B -> B N"""
    rank = confidence.masked_fill(~unknown, float("inf")).argsort(-1).argsort(-1)
    still = torch.minimum(
        count, (unknown.sum(1) - 1).clamp(min=0)
    )  # every step settles at least one position
    return unknown & (rank < still[:, None])
