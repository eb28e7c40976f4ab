"""`openm6 bench serve` and `generate`, at sizes of a test: what they print, and that both sides do the same work."""

from __future__ import annotations

import torch

from openm6.bench.generate import Setting, compare
from openm6.bench.serve import ServeSetting, make_models, make_prompts, ours_run
from openm6.bench.serve import compare as compare_text
from openm6.generate.graphs import open_rows

TINY = ServeSetting(
    width=32, layers=2, heads=2, kv_heads=1, head_dim=16, experts=4, hidden=16, vocabulary=96,
    requests=4, shortest=3, longest=8, given=5, rows=3, seconds=30,
)  # fmt: skip


def test_text_is_the_same_as_the_peers() -> None:
    prompts = make_prompts(TINY)
    speaker, peer = make_models(TINY, torch.device("cpu"))
    assert peer is not None
    rows = open_rows(speaker, 3, 64)
    assert ours_run(rows, prompts, TINY.given)["tokens"] == TINY.requests * TINY.given
    ids = torch.tensor([prompts[0]])
    theirs = peer.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )
    from_us: list[int] = []
    rows = open_rows(speaker, 1, 64)
    run_one(rows, prompts[0], from_us)
    assert theirs[0, len(prompts[0]) :].tolist() == from_us


def run_one(rows, prompt, found) -> None:
    """The tokens that our rows give to one prompt."""
    original = rows._settle

    def noted(drawn, logits):
        found.extend(drawn)
        return original(drawn, logits)

    rows._settle = noted
    ours_run(rows, [prompt], 5)


def test_what_bench_serve_prints() -> None:
    found = compare_text(TINY, torch.device("cpu"))
    assert found["text"]["openm6"]["tokens"] == 20 and found["peer"].startswith("transformers")
    assert set(found["ours_over_each"]) <= set(found["text"]) and found["ours_over_best_peer"] > 0


def test_what_bench_generate_prints() -> None:
    found = compare(Setting(steps=2, repeats=1))
    assert found["places"] == 256 and found["codes"] >= 256
    assert found["autoregressive_over_masked"] > 0
