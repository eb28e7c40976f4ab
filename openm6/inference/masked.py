"""Masked-parallel decoding of images and audio, batched: each at its own step, with its own settings and seed.

MaskGIT's decoding (arXiv 2202.04200, section 3.2): all masked positions are predicted at once, the most confident are
kept, the others are predicted again; classifier-free guidance grows over the steps. Positions whose codes are given
stay as they are, so inpainting is the same loop.
"""

# Shapes: B targets, R rows (B, and one more for each that is guided), N positions, G codes of a position, C codebook
# size, D width

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.inference.prefill import Prompt, prefill_all, prompt_length, run_block
from openm6.inference.sampling import MaskedSampling, gumbel
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache


@dataclass(eq=False)
class MaskedDecodeState:
    """Codes being decoded. `slot` holds the prompt (None: there is none), `position` follows it."""

    key: Any
    target: Segment
    sampling: MaskedSampling
    slot: int | None
    position: int
    codes: Tensor  # N G
    unknown: Tensor  # N
    first_unknown: int
    step: int = 0
    draws: int = 0

    @classmethod
    def of(
        cls, key: Any, target: Segment, sampling: MaskedSampling, slot: int | None, position: int, device: Any
    ) -> MaskedDecodeState:
        """Return the state before the first step; the true codes of masked positions are not read."""
        mask = torch.from_numpy(target.arrays["is_masked"]).to(device)
        codes = torch.from_numpy(target.arrays["codes"]).to(device).masked_fill(mask[:, None], 0)
        return cls(key, target, sampling, slot, position, codes, mask, int(mask.sum()))

    @property
    def guided(self) -> bool:
        return self.sampling.guidance > 0

    @property
    def progress(self) -> float:
        """Fraction of the steps that are done."""
        return self.step / self.sampling.steps

    @property
    def like(self) -> tuple[str, int]:
        """States that are equal in this can share a pass."""
        return self.target.kind, len(self.target)


def decode_masked(
    omni: Omni, prompts: list[Prompt], targets: list[Segment], sampling: MaskedSampling
) -> Tensor:
    """Codes of target tokens, the masked ones drawn in answer to each prompt.  # -> B N G

    All targets are of one kind and size. Row i draws from seed + i.
    """
    cache = omni.backbone.new_cache(len(prompts), max(map(prompt_length, prompts)))
    states = [
        MaskedDecodeState.of(
            row,
            targets[row],
            sampling.model_copy(update={"seed": sampling.seed + row}),
            row,
            position,
            omni.device,
        )
        for row, position in enumerate(prefill_all(omni, prompts, cache))
    ]
    active = [state for state in states if state.first_unknown]
    while active:
        done = masked_step(omni, cache, active)
        active = [state for state in active if state not in done]
    return torch.stack([state.codes for state in states])


@torch.inference_mode()
def masked_step(omni: Omni, cache: SlotCache, states: list[MaskedDecodeState]) -> list[MaskedDecodeState]:
    """Run one step of states that are alike; return those that are done."""
    for state in states:
        state.step += 1
    codes = torch.stack([state.codes for state in states])  # B N G
    unknown = torch.stack([state.unknown for state in states])  # B N
    hidden = _hidden_states(omni, cache, states, codes, unknown)  # R N D
    drawn, confidence = _drawn(omni, states, hidden, codes)
    codes = torch.where(unknown[..., None], drawn, codes)
    unknown = _still_unknown(states, confidence, unknown)
    left = unknown.any(1).tolist()
    for state, own, mask in zip(states, codes, unknown, strict=True):
        state.codes, state.unknown = own, mask
    return [state for state, more in zip(states, left, strict=True) if not more]


def _hidden_states(
    omni: Omni, cache: SlotCache, states: list[MaskedDecodeState], codes: Tensor, unknown: Tensor
) -> Tensor:
    """Hidden states of all positions with each prompt, then without it for those that are guided.  # -> R N D"""
    guided = torch.tensor([row for row, state in enumerate(states) if state.guided], dtype=torch.int64)
    rows = torch.cat([torch.arange(len(states)), guided]).to(codes.device)
    slots = [state.slot for state in states] + [None] * len(guided)
    starts = [state.position for state in states] + [0] * len(guided)
    like = states[0].target
    flat = codes[rows].flatten(0, 1)
    # States of one size have the same grid, but may differ in the embeddings of its cells.
    positions = np.concatenate([states[row].target.arrays["positions"] for row in rows.tolist()])
    arrays = {
        "shown": flat,
        "codes": flat,
        "is_masked": unknown[rows].flatten(),
        "positions": torch.from_numpy(positions).to(codes.device),
    }
    return run_block(omni, cache, slots, starts, like, arrays)


def _drawn(
    omni: Omni, states: list[MaskedDecodeState], hidden: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """A code for each group of each position in turn, and the log-probability of what was drawn.  # -> B N G, B N"""
    adapter = omni.adapter(states[0].target.kind)
    assert isinstance(adapter, CodesAdapter)
    batch, positions, groups = codes.shape
    guided = torch.tensor([row for row, c in enumerate(states) if c.guided], device=codes.device)
    rows = torch.cat([torch.arange(batch, device=codes.device), guided.long()])
    scale = _column(states, [c.sampling.guidance * c.progress for c in states], codes)[guided.long()]
    temperature = _column(states, [c.sampling.temperature for c in states], codes)
    drawn = torch.zeros_like(codes)
    confidence = torch.zeros(batch, positions, device=codes.device)
    for group in range(groups):
        logits = adapter.group_logits(hidden.flatten(0, 1), drawn[rows].flatten(0, 1), group)
        logits = logits.float().unflatten(0, (len(rows), positions))  # R N C
        own, without = logits[:batch], logits[batch:]
        if len(guided):
            own = own.index_copy(0, guided, own[guided] + scale * (own[guided] - without))
        scores = own / torch.where(temperature > 0, temperature, 1.0)
        if any(state.sampling.temperature > 0 for state in states):
            noise = gumbel(*_drawing(states, codes), positions, own.shape[-1])
            scores = torch.where(temperature > 0, scores + noise, own)
        for state in states:
            state.draws += state.sampling.temperature > 0
        chosen = scores.argmax(-1)
        drawn[..., group] = chosen
        confidence += own.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    return drawn, confidence


def _still_unknown(states: list[MaskedDecodeState], confidence: Tensor, unknown: Tensor) -> Tensor:
    """Which positions stay masked after this step.  # B N, B N -> B N"""
    noisy = gumbel(*_drawing(states, unknown), unknown.shape[1])
    for state in states:
        state.draws += 1
    noise = _column(states, [c.sampling.noise * (1 - c.progress) for c in states], confidence)[..., 0]
    confident = confidence + noise * noisy
    at_random = torch.tensor([c.sampling.order == "random" for c in states], device=unknown.device)
    noisy = torch.where(at_random[:, None], noisy, confident)
    left = [
        math.floor(c.first_unknown * math.cos(math.pi / 2 * c.progress)) * (c.step < c.sampling.steps)
        for c in states
    ]
    return least_confident(noisy, unknown, torch.tensor(left, device=unknown.device))


def _drawing(states: list[MaskedDecodeState], like: Tensor) -> tuple[Tensor, Tensor]:
    """Seeds and numbers of the draws."""
    seeds = torch.tensor([state.sampling.seed for state in states], device=like.device)
    return seeds, torch.tensor([state.draws for state in states], device=like.device)


def _column(states: list[MaskedDecodeState], values: list[float], like: Tensor) -> Tensor:
    """One value per state, broadcast over positions and codes.  # B 1 1"""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)


def least_confident(confidence: Tensor, unknown: Tensor, count: Tensor) -> Tensor:
    """The `count` masked positions of each row with the lowest confidence.  # B N, B N, B -> B N"""
    rank = confidence.masked_fill(~unknown, float("inf")).argsort(-1).argsort(-1)
    still = torch.minimum(
        count, (unknown.sum(1) - 1).clamp(min=0)
    )  # every step settles at least one position
    return unknown & (rank < still[:, None])
