"""The benchmark decode at the size of a test: every candidate writes the same text, and the report has our ratios."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import baseline_llama
from benchmarks.decode import COMPILED, compare
from benchmarks.harness import Report
from openm6.inference import decode as compiled
from openm6.models.config import BackboneConfig
from openm6.nn.config import DenseConfig

TINY = BackboneConfig(
    hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    dense=DenseConfig(intermediate_size=96), qk_norm=False,
)  # fmt: skip


def no_compiler(*_: Any) -> None:
    raise RuntimeError("no compiler")


def test_all_candidates_write_the_same_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A compiler takes half a minute for nothing that is tested here.
    monkeypatch.setattr(baseline_llama.torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "_compile", no_compiler)
    report = Report(None, 60.0)
    with report:
        compare(TINY, 64, 4, 1, 1, tmp_path, report)
    capsys.readouterr()
    found: dict[str, Any] = report.found["candidates"]
    names = [name for name in found if name.startswith(("openm6", "transformers"))]
    assert len(names) == 12
    for name in names:
        assert found[name]["first_tokens_as_fp32"] == 4 or "bf16" in name or "int8" in name, name
    assert report.found["best_transformers"] in found and len(report.found["over_best_transformers"]) == 6
    if "llama.cpp F32" in found:
        assert found["llama.cpp F32"]["first_tokens_as_fp32"] == 4


def test_without_the_libraries_one_sentence_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "_compile", no_compiler)
    for name in ("llama_cpp", "gguf", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    report = Report(None, 60.0)
    with report:
        compare(TINY, 64, 2, 1, 1, tmp_path, report)
    capsys.readouterr()
    assert len(report.found["notes"]) == 2 and "pip install" in report.found["notes"][0]
    ours = {"openm6 fp32", "openm6 bf16", "openm6 int8"}
    assert set(report.found["candidates"]) == ours | {f"{name}{COMPILED}" for name in ours}
    assert report.found["best_transformers"] is None
