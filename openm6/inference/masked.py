"""Masked-parallel decoding of images and audio, batched: each at its own step, with its own settings and seed.

MaskGIT's decoding (arXiv 2202.04200, section 3.2): all masked positions are predicted at once, the most confident are
kept, the others are predicted again; classifier-free guidance grows over the steps. Positions whose codes are given
stay as they are, so inpainting is the same loop.
"""

# Shapes: B targets, R rows (B, and one more for each that is guided), N positions, G codes of a position, C codebook
# size, D hidden size

from __future__ import annotations

import math
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


class MaskedDecodeState:
    """Codes being decoded on a device. `slot` holds the prompt (None: there is none), `position` follows it."""

    def __init__(
        self, key: Any, target: Segment, sampling: MaskedSampling, slot: int | None, position: int, device: torch.device
    ) -> None:
        self.key, self.target, self.sampling, self.slot, self.position = key, target, sampling, slot, position
        self.unknown = torch.from_numpy(target.arrays["is_masked"]).to(device)  # N
        self.codes = torch.from_numpy(target.arrays["codes"]).to(device).masked_fill(self.unknown[:, None], 0)  # N G
        self.first_unknown = int(self.unknown.sum())
        self.step = self.draws = 0

    @property
    def progress(self) -> float:
        """Fraction of the steps that are done."""
        return self.step / self.sampling.steps

    @property
    def like(self) -> tuple[str, int]:
        """States that are equal in this can share a pass."""
        return self.target.kind, len(self.target)


def decode_masked(omni: Omni, prompts: list[Prompt], targets: list[Segment], sampling: MaskedSampling) -> Tensor:
    """Codes of target tokens, the masked ones drawn in answer to each prompt.  # -> B N G

    All targets are of one kind and size. Row i draws from seed + i.
    """
    cache = omni.backbone.new_cache(len(prompts), max(map(prompt_length, prompts)))
    states = []
    for row, position in enumerate(prefill_all(omni, prompts, cache)):
        own = sampling.model_copy(update={"seed": sampling.seed + row})
        states.append(MaskedDecodeState(row, targets[row], own, row, position, omni.device))
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
    guided = [row for row, state in enumerate(states) if state.sampling.guidance > 0]
    # With each prompt, then without it for those that are guided.
    rows = [*range(len(states)), *guided]
    slots = [state.slot for state in states] + [None] * len(guided)
    starts = [state.position for state in states] + [0] * len(guided)
    # States of one size have the same grid, but may differ in the embeddings of its cells.
    positions = np.concatenate([states[row].target.arrays["positions"] for row in rows])
    flat = codes[rows].flatten(0, 1)
    arrays = {
        "shown": flat,
        "codes": flat,
        "is_masked": unknown[rows].flatten(),
        "positions": torch.from_numpy(positions).to(codes.device),
    }
    hidden = run_block(omni, cache, slots, starts, states[0].target, arrays)  # R N D
    sampled, confidence = _sample(omni, states, guided, hidden, codes)
    codes = torch.where(unknown[..., None], sampled, codes)
    unknown = _still_unknown(states, confidence, unknown)
    left = unknown.any(1).tolist()
    for state, own, mask in zip(states, codes, unknown, strict=True):
        state.codes, state.unknown = own, mask
    return [state for state, more in zip(states, left, strict=True) if not more]


def _sample(
    omni: Omni, states: list[MaskedDecodeState], guided: list[int], hidden: Tensor, codes: Tensor
) -> tuple[Tensor, Tensor]:
    """A code for each group of each position in turn, and its log-probability.  # -> B N G, B N"""
    adapter = omni.adapter(states[0].target.kind)
    assert isinstance(adapter, CodesAdapter)
    batch, positions, groups = codes.shape
    index = torch.tensor(guided, dtype=torch.int64, device=codes.device)
    rows = torch.cat([torch.arange(batch, device=codes.device), index])
    scale = _column([states[row].sampling.guidance * states[row].progress for row in guided], codes)
    temperature = _column([state.sampling.temperature for state in states], codes)
    sampled = torch.zeros_like(codes)
    confidence = torch.zeros(batch, positions, device=codes.device)
    for group in range(groups):
        logits = adapter.group_logits(hidden.flatten(0, 1), sampled[rows].flatten(0, 1), group)
        logits = logits.float().unflatten(0, (len(rows), positions))  # R N C
        own, without = logits[:batch], logits[batch:]
        if guided:
            own = own.index_copy(0, index, own[index] + scale * (own[index] - without))
        scores = own / torch.where(temperature > 0, temperature, 1.0)
        if any(state.sampling.temperature > 0 for state in states):
            noise = _noise(states, codes.device, positions, own.shape[-1])
            scores = torch.where(temperature > 0, scores + noise, own)
        for state in states:
            state.draws += state.sampling.temperature > 0
        sampled[..., group] = scores.argmax(-1)
        confidence += own.log_softmax(-1).gather(-1, sampled[..., group, None])[..., 0]
    return sampled, confidence


def _still_unknown(states: list[MaskedDecodeState], confidence: Tensor, unknown: Tensor) -> Tensor:
    """Which positions stay masked after this step.  # B N, B N -> B N"""
    noise = _noise(states, unknown.device, unknown.shape[1])
    for state in states:
        state.draws += 1
    scale = _column([state.sampling.noise * (1 - state.progress) for state in states], confidence)[..., 0]
    at_random = torch.tensor([state.sampling.order == "random" for state in states], device=unknown.device)
    order = torch.where(at_random[:, None], noise, confidence + scale * noise)
    left = [
        math.floor(state.first_unknown * math.cos(math.pi / 2 * state.progress)) * (state.step < state.sampling.steps)
        for state in states
    ]
    # The positions of the lowest confidence stay masked; every step settles at least one.
    rank = order.masked_fill(~unknown, float("inf")).argsort(-1).argsort(-1)
    most = (unknown.sum(1) - 1).clamp(min=0)
    return unknown & (rank < torch.minimum(torch.tensor(left, device=unknown.device), most)[:, None])


def _noise(states: list[MaskedDecodeState], device: torch.device, *shape: int) -> Tensor:
    """Gumbel noise of the next draw of each state.  # -> B *shape"""
    seeds = torch.tensor([state.sampling.seed for state in states], device=device)
    return gumbel(seeds, torch.tensor([state.draws for state in states], device=device), *shape)


def _column(values: list[float], like: Tensor) -> Tensor:
    """One value per row, broadcast over positions and codes.  # B 1 1"""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1)
