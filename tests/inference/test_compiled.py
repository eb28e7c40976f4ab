"""Compiled layers compute what they compute uncompiled, and a compiler that fails costs one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openm6.inference import decode as compiled
from openm6.inference.decode import DecodeStep, TextHead
from openm6.inference.load import Precision, quantize
from openm6.kernels.probe import compile_failure
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig, ExpertsConfig

DENSE = {"dense": DenseConfig(intermediate_size=64), "qk_norm": False}
EXPERTS = {"experts": ExpertsConfig(intermediate_size=32, num_experts=4, top_k=2)}


def text_head(shape: dict, precision: Precision) -> TextHead:
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = BackboneConfig(**size | shape)
    backbone, embedding = Backbone(config).eval().requires_grad_(False), torch.randn(50, 64)
    if precision == "int8":
        quantize(backbone)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return TextHead(backbone.to(dtype), embedding.to(dtype), embedding.to(dtype), frozenset())


@torch.inference_mode()
def two_steps(head: TextHead, rows: int, capacity: int, longest: int, compile: bool) -> tuple[Tensor, Tensor]:
    """Logits of the second step, and all keys, after texts of different lengths."""
    torch.manual_seed(1)
    cache = head.backbone.new_cache(rows + 1, capacity)
    for part in (cache.keys, cache.values):
        part.normal_()
    step = DecodeStep(head, cache, compiled=compile)
    length = torch.arange(rows) * 5 + 1
    step(torch.arange(rows), length, length, longest)
    logits = step(torch.arange(rows) + 7, length + 1, length + 1, longest)
    if compile:
        assert [single for single, _ in step.programs] == [rows == 1]
    return logits.float(), cache.keys.float()


@pytest.mark.parametrize(
    ("shape", "precision", "rows"),
    [(DENSE, "int8", 1), (DENSE | {"num_layers": 1}, "bfloat16", 1), (EXPERTS, "float32", 3)],
    ids=["int8", "bf16", "experts"],
)
def test_compiled_steps_are_the_steps(
    shape: dict, precision: Precision, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of keys, of positions in a slot and, from two on, of rows; compiled once, then loaded."""
    if reason := compile_failure(torch.device("cpu")):
        pytest.skip(reason)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_programs", {})
    head, tolerance = text_head(shape, precision), 0.03 if precision == "bfloat16" else 1e-4
    for count, capacity, longest in ((rows, 65, 64), (rows, 97, 33), (rows + 2 * (rows > 1), 40, 39)):
        for one, other in zip(
            two_steps(head, count, capacity, longest, True),
            two_steps(head, count, capacity, longest, False),
            strict=True,
        ):
            assert float((one - other).norm() / other.norm()) < tolerance
        assert [program is None for program in compiled._programs.values()] == [False]
        monkeypatch.setattr(compiled, "_programs", {})
        monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))


@pytest.mark.parametrize("wrong", [False, True], ids=["no compiler", "wrong result"])
def test_a_compiler_that_fails_costs_one_sentence(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_programs", {})

    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler was found")

    def prepare(digest: str, *_: Any) -> bool:
        compiled._programs[digest] = lambda inputs: [inputs[0], inputs[0]]
        return False

    monkeypatch.setattr(compiled, "_prepare" if wrong else "_compile", prepare if wrong else fail)
    head = text_head(DENSE, "float32")
    found, expected = (two_steps(head, 1, 33, 32, compile) for compile in (True, False))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert caplog.text.count("decoding runs uncompiled and slower") == 1
