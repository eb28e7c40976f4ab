"""The decoders without a cache and without batches: the whole sequence again for each token and each step.

Slow and short, they are what the engine is compared with. The engine draws by the same rules, `gumbel` and `draw_from`.
"""

# Shapes: N positions, G codes of a position, V vocabulary

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from openm6.inference.load import LoadedModel
from openm6.inference.prefill import Prompt
from openm6.inference.sampling import MaskedSampling, Sampling, draw_from, filter_logits, gumbel
from openm6.modalities.batch import build_sequence, collate
from openm6.modalities.codes import CodesAdapter
from openm6.modalities.interface import Segment, line
from openm6.modalities.registry import split_opening
from openm6.ops.random_bits import uniform


def hidden_states(model: LoadedModel, prompt: Prompt, target: Segment) -> Tensor:
    """Hidden states of the target tokens from one pass over prompt and target.  # -> N D"""
    sequence = build_sequence([*prompt, target])
    batch = collate([[sequence]], len(sequence))
    return model.omni(batch.groups, batch.meta)[0][0, len(sequence) - len(target) :]


def noise(seed: int, draw: int, *shape: int) -> Tensor:
    return gumbel(torch.tensor([seed]), torch.tensor([draw]), *shape)[0]


@torch.inference_mode()
def write_reference(model: LoadedModel, prompt: Prompt, sampling: Sampling) -> str:
    """A text, token by token."""
    prompt, opening = split_opening(prompt)
    text, ids = model.text, [model.text.start if opening is None else opening]
    asked = {int(one) for segment in prompt if segment.kind == "text" for one in segment.arrays["ids"]} - text.ends
    token = torch.arange(text.vocab_size)
    suppressed = (token >= text.first_special) & (token != text.end)
    while len(ids) <= sampling.max_tokens and ids[-1] != text.end:
        arrays = {"ids": np.asarray(ids), "labels": np.asarray(ids)}
        target = Segment("text", arrays, line(len(ids)), len(ids), arrays["ids"] >= 0, "causal")
        logits = model.omni.text.logits(hidden_states(model, prompt, target)[-1:]).float()
        logits = logits.masked_fill(suppressed, float("-inf"))
        for one in {*asked, *ids[1:]}:
            logits[0, one] *= sampling.repetition_penalty ** (-1 if logits[0, one] > 0 else 1)
        if sampling.temperature > 0:
            k = torch.tensor([sampling.top_k or len(token)]).clamp(max=len(token))
            p = torch.tensor([1.0 if sampling.top_p is None else sampling.top_p])
            logits = filter_logits(logits / sampling.temperature, k, p)
            logits = logits + noise(sampling.seed, len(ids) - 1, len(token))
        ids.append(int(logits.argmax()))
    return text.decode([number for number in ids[1:] if number != text.end])


@torch.inference_mode()
def decode_masked_reference(model: LoadedModel, prompt: Prompt, target: Segment, sampling: MaskedSampling) -> Tensor:
    """Codes of one image or recording, step by step.  # -> N G"""
    adapter = model.omni.adapter(target.kind)
    assert isinstance(adapter, CodesAdapter)
    unknown = torch.from_numpy(target.arrays["is_masked"])
    codes = torch.from_numpy(target.arrays["codes"]).masked_fill(unknown[:, None], 0)
    first, draws, unprompted = int(unknown.sum()), 0, None
    for step in range(1, sampling.steps + 1):
        share = step / sampling.steps
        arrays = {
            **target.arrays,
            "shown": codes.numpy(),
            "codes": codes.numpy(),
            "is_masked": unknown.numpy(),
        }
        target = Segment(target.kind, arrays, target.grid, target.span, unknown.numpy(), "block", target.moves)
        hidden = hidden_states(model, prompt, target)
        if sampling.guidance > 0 and (sampling.steps - step) % sampling.unprompted_every == 0:
            unprompted = hidden_states(model, [], target)
        drawn, confidence = torch.zeros_like(codes), torch.zeros(len(codes))
        for group in range(codes.shape[1]):
            logits = adapter.group_logits(hidden, drawn, group).float()
            if unprompted is not None:
                without = adapter.group_logits(unprompted, drawn, group).float()
                logits = logits + sampling.guidance * share * (logits - without)
            drawn[:, group] = logits.argmax(-1)
            if sampling.temperature > 0:
                quantile = uniform(torch.tensor([sampling.seed]), torch.tensor([draws]), len(codes))[0]
                drawn[:, group] = draw_from(logits / sampling.temperature, quantile)
                draws += 1
            confidence += logits.log_softmax(-1).gather(-1, drawn[:, group, None])[:, 0]
        codes = torch.where(unknown[:, None], drawn, codes)
        order = noise(sampling.seed, draws, len(codes))
        draws += 1
        if sampling.order == "confidence":
            order = confidence + sampling.noise * (1 - share) * order
        left = math.floor(first * math.cos(math.pi / 2 * share)) * (step < sampling.steps)
        left = min(left, int(unknown.sum()) - 1)
        unknown = unknown & (order.masked_fill(~unknown, float("inf")).argsort().argsort() < left)
        if not unknown.any():
            break
    return codes
