"""Masked-parallel decoding of images and audio, batched: each at its own step, with its own settings and seed.

MaskGIT's decoding (arXiv 2202.04200, section 3.2): all masked positions are predicted at once, the most confident are
kept, the others are predicted again; classifier-free guidance grows over the steps. Positions whose codes are given
stay as they are, so inpainting is the same loop.

A step runs the block of codes after the cached prompt, some steps without it as well, and the head on masked positions
alone. How many these are follows from the step, so the device is not asked for it.
"""

# Shapes: B targets, R rows (B, and one more for each that runs without its prompt), N positions, M masked positions of
# all targets, G codes of a position, C codebook size, D hidden size

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.inference.prefill import Prompt, prefill_all, prompt_length, run_block
from openm6.inference.sampling import MaskedSampling, draw_from, gumbel
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Segment
from openm6.models.omni import Omni
from openm6.nn.cache import SlotCache
from openm6.ops.random_bits import uniform


class MaskedDecodeState:
    """Codes being decoded on a device. `slot` holds the prompt (None: there is none), `position` follows it.

    `remaining` positions are masked. `unprompted` are the hidden states of the last pass without the prompt (N D), None
    before the first one.
    """

    def __init__(
        self, key: Any, target: Segment, sampling: MaskedSampling, slot: int | None, position: int, device: torch.device
    ) -> None:
        self.key, self.target, self.sampling, self.slot, self.position = key, target, sampling, slot, position
        self.unknown = torch.from_numpy(target.arrays["is_masked"]).to(device)  # N
        self.codes = torch.from_numpy(target.arrays["codes"]).to(device).masked_fill(self.unknown[:, None], 0)  # N G
        self.first_unknown = self.remaining = int(target.arrays["is_masked"].sum())
        self.step = self.draws = 0
        self.unprompted: Tensor | None = None

    @property
    def progress(self) -> float:
        return self.step / self.sampling.steps

    @property
    def like(self) -> tuple[str, int]:
        """States that are equal in this can share a pass."""
        return self.target.kind, len(self.target)


def decode_masked(omni: Omni, prompts: list[Prompt], targets: list[Segment], sampling: MaskedSampling) -> Tensor:
    """Codes of targets of one kind and size, masked ones drawn after each prompt; row i by seed + i.  # -> B N G"""
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
    unprompted = [row for row, state in enumerate(states) if state.sampling.runs_unprompted(state.step)]
    # With each prompt, then without it.
    rows = [*range(len(states)), *unprompted]
    slots = [state.slot for state in states] + [None] * len(unprompted)
    starts = [state.position for state in states] + [0] * len(unprompted)
    # States of one size have the same grid, but may differ in the embeddings of its cells.
    positions = torch.from_numpy(np.concatenate([states[row].target.arrays["positions"] for row in rows]))
    flat, is_masked = codes[rows].flatten(0, 1), unknown[rows].flatten()
    arrays = {"shown": flat, "codes": flat, "is_masked": is_masked, "positions": positions.to(codes.device)}
    hidden = run_block(omni, cache, slots, starts, states[0].target, arrays)  # R N D
    for row, found in zip(unprompted, hidden[len(states) :], strict=True):
        states[row].unprompted = found
    # The masked positions are sorted to the front.
    masked = sum(state.remaining for state in states)
    index = unknown.flatten().to(torch.int8).argsort(descending=True, stable=True)[:masked]  # M
    sampled, confidence = _sample(omni, states, hidden[: len(states)], index)
    codes.view(-1, codes.shape[-1]).index_copy_(0, index, sampled)
    order = confidence.new_zeros(unknown.numel()).index_copy_(0, index, confidence).view_as(unknown)
    unknown = _still_unknown(states, order, unknown)
    for state, own, mask in zip(states, codes, unknown, strict=True):
        state.codes, state.unknown = own, mask
    return [state for state in states if not state.remaining]


def _sample(omni: Omni, states: list[MaskedDecodeState], hidden: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """A code for each group of each masked position in turn, and its log-probability.  # B N D, M -> M G, M"""
    adapter = omni.adapter(states[0].target.kind)
    assert isinstance(adapter, CodesAdapter)
    branches = [hidden]
    if any(state.unprompted is not None for state in states):
        # States without guidance have a scale of zero.
        pairs = zip(states, hidden, strict=True)
        branches.append(torch.stack([own if state.unprompted is None else state.unprompted for state, own in pairs]))
    both = torch.cat([branch.flatten(0, 1)[index] for branch in branches])  # M D, or 2M D
    guidance = [0.0 if state.unprompted is None else state.sampling.guidance * state.progress for state in states]
    scale = _per_position(guidance, hidden)[index]  # M 1
    temperature = _per_position([state.sampling.temperature for state in states], hidden)[index]
    sampled = torch.zeros(len(index), adapter.groups, dtype=torch.int64, device=hidden.device)
    confidence = torch.zeros(len(index), device=hidden.device)
    for group in range(adapter.groups):
        logits = adapter.group_logits(both, sampled.repeat(len(branches), 1), group).float()
        own = logits[: len(index)]  # M C
        if len(branches) > 1:
            own = own + scale * (own - logits[len(index) :])
        code = own.argmax(-1)
        if any(state.sampling.temperature > 0 for state in states):
            quantile = uniform(*_seeds(states, hidden.device), hidden.shape[1]).flatten()[index]
            drawn = draw_from(own / torch.where(temperature > 0, temperature, 1.0), quantile)
            code = torch.where(temperature[:, 0] > 0, drawn, code)
        for state in states:
            state.draws += state.sampling.temperature > 0
        sampled[:, group] = code
        confidence += own.log_softmax(-1).gather(-1, code[:, None])[:, 0]
    return sampled, confidence


def _still_unknown(states: list[MaskedDecodeState], confidence: Tensor, unknown: Tensor) -> Tensor:
    """Which positions stay masked after this step.  # B N, B N -> B N"""
    noise = gumbel(*_seeds(states, unknown.device), unknown.shape[1])
    for state in states:
        state.draws += 1
        # Every step settles at least one.
        left = math.floor(state.first_unknown * math.cos(math.pi / 2 * state.progress))
        state.remaining = min(left, state.remaining - 1) if state.step < state.sampling.steps else 0
    scale = torch.tensor([state.sampling.noise * (1 - state.progress) for state in states], device=unknown.device)
    at_random = torch.tensor([state.sampling.order == "random" for state in states], device=unknown.device)
    order = torch.where(at_random[:, None], noise, confidence + scale[:, None] * noise)
    # The positions of the lowest confidence stay masked.
    rank = order.masked_fill(~unknown, float("inf")).argsort(-1).argsort(-1)
    remaining = torch.tensor([state.remaining for state in states], device=unknown.device)
    return unknown & (rank < remaining[:, None])


def _seeds(states: list[MaskedDecodeState], device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and index of the next draw of each state.  # B, B"""
    seeds = torch.tensor([state.sampling.seed for state in states], device=device)
    return seeds, torch.tensor([state.draws for state in states], device=device)


def _per_position(values: list[float], hidden: Tensor) -> Tensor:
    """One value per target, repeated for its positions.  # B N D -> B*N 1"""
    return torch.tensor(values, device=hidden.device).repeat_interleave(hidden.shape[1])[:, None]
