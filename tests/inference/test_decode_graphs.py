"""A replayed pass of a decode batch gives what the pass gives when it runs, for small and large batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from openm6.inference.decode import Precision, TextHead
from openm6.inference.decode_batch import ATTENTION, BATCHES, DecodeBatch
from openm6.inference.sampling import Sampling
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import ExpertsConfig
from tests.devices import CPU, on_each_device

VOCABULARY, STEPS = 96, 5
CONFIG = BackboneConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    experts=ExpertsConfig(intermediate_size=64, num_experts=8, top_k=2),
)  # fmt: skip


class Recording:
    """What a CPU has for a CUDA graph: outputs at fixed addresses, which `replay` fills again."""

    def __init__(self, batch: DecodeBatch, batch_size: int, longest: int, mode: Any) -> None:
        self.run = lambda: batch._run(batch_size, longest, mode)
        self.outputs = (
            torch.zeros(batch_size, dtype=torch.int64),
            torch.zeros(batch_size, len(batch.text_head.head)),
        )

    def replay(self) -> None:
        for fixed, new in zip(self.outputs, self.run(), strict=True):
            fixed.copy_(new)


def recorded(batch: DecodeBatch, *size: Any) -> tuple[Any, Tensor, Tensor]:
    recording = Recording(batch, *size)
    return (recording, *recording.outputs)


def text_head(device: torch.device, dtype: torch.dtype) -> TextHead:
    torch.manual_seed(0)
    backbone = Backbone(CONFIG).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    embedding = torch.randn(VOCABULARY, 64).to(device, dtype)
    return TextHead(backbone.to(device, dtype), embedding, embedding, None)


def opened(head: TextHead, rows: int, precision: Precision, replays: bool) -> DecodeBatch:
    """A batch of so many texts, each with a first token of its own, which replays its passes or runs them."""
    # A GPU has slots for a whole padded pass: the next larger of BATCHES.
    slots = next(size for size in BATCHES if size >= rows)
    batch = DecodeBatch(head, slots, 64, precision)
    for row in range(rows):
        sampling = Sampling(max_tokens=STEPS - row % 2, temperature=0.8 if row % 3 == 0 else 0.0, seed=row)
        batch.add(row, sampling, 0, row % VOCABULARY)
    batch.graphed = replays
    return batch


def written(batch: DecodeBatch) -> dict[int, tuple[list[int], float]]:
    """All texts, which shrink the batch when they end."""
    done = {}
    with sdpa_kernel(ATTENTION):  # a replayed pass was recorded with these
        while batch.rows:
            for row in batch.step():
                done[row.key] = (row.tokens, row.nll)
                batch.remove(row)
    return done


@on_each_device
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows", [1, 8, 129, 300])
def test_replayed_is_run(
    rows: int, precision: Precision, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows above 170 are sorted by expert in bf16; fp32 and int8 must not sort, which would wait for a count."""
    if device == CPU:
        monkeypatch.setattr(DecodeBatch, "_captured", recorded)
    head = text_head(device, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    replayed, run = (opened(head, rows, precision, replays) for replays in (True, False))
    monkeypatch.setattr(run, "_padded", replayed._padded)  # the same shapes, and with them the same kernels
    found, expected = written(replayed), written(run)
    assert replayed.graphs and not run.graphs
    assert {row: tokens for row, (tokens, _) in found.items()} == {row: tokens for row, (tokens, _) in expected.items()}
    for row, (tokens, nll) in found.items():
        assert len(tokens) == STEPS - row % 2 and nll == pytest.approx(expected[row][1], rel=1e-3, abs=1e-3)
    assert len({tuple(tokens) for tokens, _ in found.values()}) >= min(rows, 8) // 2, "the texts must differ"
