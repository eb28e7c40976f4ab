"""A replayed pass of a decode batch gives what the pass gives when it runs, for small and large batches."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.nn.attention import sdpa_kernel

from openm6.core.log import get_log
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import ATTENTION, BATCHES, DecodeBatch
from openm6.inference.load import Precision, quantize
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
        self.outputs = batch.sampled[:batch_size], batch.logits[:batch_size]

    def replay(self) -> None:
        for fixed, new in zip(self.outputs, self.run(), strict=True):
            fixed.copy_(new)


def recorded(batch: DecodeBatch, *size: Any) -> Recording:
    return Recording(batch, *size)


def text_head(device: torch.device, precision: Precision) -> TextHead:
    torch.manual_seed(0)
    backbone = Backbone(CONFIG).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    embedding = torch.randn(VOCABULARY, 64).to(device, dtype)
    backbone.to(device, dtype)
    if precision == "int8":
        quantize(backbone)
    return TextHead(backbone, embedding, embedding, frozenset())


def opened(head: TextHead, rows: int, replays: bool) -> DecodeBatch:
    """A batch of so many texts, each with a first token of its own, which replays its passes or runs them."""
    # A GPU has slots for a whole padded pass: the next larger of BATCHES.
    slots = next(size for size in BATCHES if size >= rows)
    batch = DecodeBatch(head, slots, 64)
    for row in range(rows):
        sampling = Sampling(
            max_tokens=STEPS - row % 2, temperature=0.8 if row % 3 == 0 else 0.0, seed=row,
            repetition_penalty=1.0 if row % 4 else 1.5,
        )  # fmt: skip
        batch.add(row, sampling, 0, row % VOCABULARY)
    return graphed(batch) if replays else ungraphed(batch)


def graphed(batch: DecodeBatch) -> DecodeBatch:
    """The batch as on a GPU, where it has places for the outputs of graphs."""
    batch.graphed = True
    batch.sampled, batch.logits = torch.zeros_like(batch.token), batch.logits.new_zeros(len(batch.token), VOCABULARY)
    return batch


def ungraphed(batch: DecodeBatch) -> DecodeBatch:
    batch.graphed = False
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
    head = text_head(device, precision)
    replayed, run = (opened(head, rows, replays) for replays in (True, False))
    monkeypatch.setattr(run, "_padded", replayed._padded)  # the same shapes, and with them the same kernels
    found, expected = written(replayed), written(run)
    assert replayed.graphs and not run.graphs
    assert {row: tokens for row, (tokens, _) in found.items()} == {row: tokens for row, (tokens, _) in expected.items()}
    for row, (tokens, nll) in found.items():
        assert len(tokens) == STEPS - row % 2 and nll == pytest.approx(expected[row][1], rel=1e-3, abs=1e-3)
    assert len({tuple(tokens) for tokens, _ in found.values()}) >= min(rows, 8) // 2, "the texts must differ"


@on_each_device
def test_all_sizes_are_captured_before_the_first_text(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For 1, 8 and 16 texts, 128 and 200 keys, three ways to sample, none with a penalty; later nothing is captured."""
    if device == CPU:
        monkeypatch.setattr(DecodeBatch, "_captured", recorded)
    caplog.set_level(logging.INFO, get_log().name)
    batch = graphed(DecodeBatch(text_head(device, "float32"), 16, 200))
    before = [part.clone() for part in (batch.token, batch.position, batch.length, batch.draw)]
    batch.capture()
    modes = ("greedy", "unfiltered", "filtered")
    assert set(batch.graphs) == {(rows, keys, mode) for rows in (1, 8, 16) for keys in (128, 200) for mode in modes}
    assert all(map(torch.equal, before, (batch.token, batch.position, batch.length, batch.draw)))
    (line,) = caplog.messages
    assert line.startswith("18 passes of up to 16 texts captured in ")
    monkeypatch.setattr(DecodeBatch, "_captured", lambda *_: pytest.fail("captured while texts wait"))
    for row in range(10):
        batch.add(row, Sampling(max_tokens=STEPS, temperature=row % 2, seed=row), 0, row)
    assert len(written(batch)) == 10


@on_each_device
@pytest.mark.parametrize("limit", [0, 4])
def test_sizes_beyond_the_limit_run_as_they_are(
    limit: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == CPU:
        monkeypatch.setattr(DecodeBatch, "_captured", recorded)
    batch = DecodeBatch(text_head(device, "float32"), 8, 200, max_graphs=limit)
    assert not batch.graphed or limit
    batch = graphed(batch)
    batch.capture()
    assert len(batch.graphs) == limit
    for row in range(8):
        batch.add(row, Sampling(max_tokens=STEPS, temperature=0.5, top_k=4, seed=row), 0, row)
    assert len(written(batch)) == 8 and len(batch.graphs) == limit


def test_a_pass_that_cannot_be_captured_runs_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A lost device is no such failure."""

    def failing(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nmore")

    batch = opened(text_head(CPU, "float32"), 3, replays=True)
    monkeypatch.setattr(batch, "_captured", failing)
    batch.capture()
    assert len(written(batch)) == 3 and not batch.graphs
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "not permitted when stream is capturing), so it runs as it is" in line
    batch.max_graphs = 1
    lost = Mock(side_effect=torch.AcceleratorError("CUDA error: an illegal memory access"))
    monkeypatch.setattr("openm6.inference.decode_batch.check_alive", lost)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        batch.capture()


def test_a_pass_is_captured_on_the_gpu_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is current, and not on torch's own stream for captures, which is on the GPU of the first one."""
    batch, entered, side = graphed(DecodeBatch(text_head(CPU, "float32"), 1, 128)), Mock(), Mock()
    batch.stream = Mock()
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext(entered(tensor)))
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, side)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    recording = Mock(return_value=nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", recording)
    assert batch._graph(1, 128, "greedy") is side.return_value
    assert entered.call_args_list[0].args[0] is batch.token and recording.call_args.args[2] is batch.stream
