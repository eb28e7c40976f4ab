"""Numbers as distributions: one pass over the prompt and the queries."""

from __future__ import annotations

import numpy as np
import torch

from openm6.generate.prompt import Prompt, read_prompts
from openm6.modalities.interface import Segment
from openm6.modalities.numbers import Histogram, NumbersOut
from openm6.models.omni import Omni


@torch.inference_mode()
def predict(omni: Omni, prompts: list[Prompt], wanted: list[Segment]) -> list[Histogram]:
    """For each prompt the distributions of the values that `wanted` asks for (its observed ones), in order."""
    answers: list[Histogram | None] = [None] * len(prompts)
    for length in sorted({len(tokens) for tokens in wanted}):  # rows of one batch ask for equally many tokens
        rows = [row for row, tokens in enumerate(wanted) if len(tokens) == length]
        found = _predict_alike(omni, [prompts[row] for row in rows], [wanted[row] for row in rows])
        for row, histogram in zip(rows, found, strict=True):
            answers[row] = histogram
    return [answer for answer in answers if answer is not None]


def _predict_alike(omni: Omni, prompts: list[Prompt], wanted: list[Segment]) -> list[Histogram]:
    adapter = omni.adapter("numbers_out")
    assert isinstance(adapter, NumbersOut)
    reading = read_prompts(omni, prompts, len(wanted[0]))
    arrays = {
        name: torch.from_numpy(np.concatenate([tokens.arrays[name] for tokens in wanted])).to(omni.device)
        for name in wanted[0].arrays
    }
    grid = torch.from_numpy(wanted[0].grid).to(omni.device)
    layout = reading.layout(1, grid, block_id=1, moves=wanted[0].moves)
    hidden = reading.run("numbers_out", arrays, layout)  # B T D
    probability = (
        adapter.logits(hidden.flatten(0, 1)).float().softmax(-1).unflatten(0, hidden.shape[:2])
    )  # B T P B
    answers = []
    for row, tokens in zip(probability.flatten(1, 2).cpu().numpy(), wanted, strict=True):
        scale = np.repeat(tokens.arrays["scale"], tokens.arrays["observed"].shape[1], axis=0)  # T*P 2
        asked = tokens.arrays["observed"].reshape(-1)
        answers.append(Histogram(row[asked], scale[asked]))
    return answers
