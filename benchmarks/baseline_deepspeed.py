"""Baseline of offloading: the largest dense model that DeepSpeed ZeRO-3 trains here with everything offloaded.

Each size runs in its own process, because the system may kill one that is too large:
python -m benchmarks.baseline_deepspeed WIDTH LAYERS ROWS LENGTH
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.harness import Deadline
from openm6.core.device import resolve_device

VOCABULARY = 32_768
SIZES = ((1024, 16), (2048, 16), (2048, 32), (3072, 24), (4096, 16), (4096, 20), (4096, 24), (4096, 32))
LONGEST = 600.0  # seconds that one size may take


def max_deepspeed_size(length: int, deadline: Deadline, ran: list[dict[str, Any]]) -> tuple[bool, str]:
    """Add the results of each size to `ran`, until one fails or the time is over; return whether one failed, a note."""
    if importlib.util.find_spec("deepspeed") is None or resolve_device().type == "cpu":
        return False, "deepspeed needs a GPU and `pip install deepspeed transformers`; neither was measured here"
    for width, layers in SIZES:
        found = None if deadline.passed else _run(width, layers, length, min(LONGEST, deadline.left))
        if found is None and deadline.passed:
            return False, "time was up before a size failed: larger ones may run, too"
        if found is None:
            return True, f"width {width} with {layers} layers failed (memory, or {LONGEST:.0f} s)"
        ran.append(found)
    return False, "every size of the list ran: larger ones may run, too"


def _run(width: int, layers: int, length: int, seconds: float) -> dict[str, Any] | None:
    words = [sys.executable, "-m", "benchmarks.baseline_deepspeed", str(width), str(layers), "8", str(length)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds)
        return json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        return None


def train(width: int, layers: int, rows: int, length: int) -> dict[str, Any]:
    """Run four steps of a dense model under ZeRO-3, weights and optimizer in host memory."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed, transformers = (importlib.import_module(name) for name in ("deepspeed", "transformers"))
    settings = _settings(rows)
    deepspeed.init_distributed("nccl")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(width * 3.5), num_hidden_layers=layers,
        num_attention_heads=width // 128, num_key_value_heads=max(1, width // 512), use_cache=False,
        max_position_embeddings=length,
    )  # fmt: skip
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    model.gradient_checkpointing_enable()
    parameters = sum(getattr(one, "ds_numel", one.numel()) for one in model.parameters())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    words = torch.randint(0, VOCABULARY, (rows, length), device="cuda")
    seconds = min(_step(engine, words) for _ in range(4))
    return {
        "parameters": parameters,
        "seconds_per_step": seconds,
        "tokens_per_second": words.numel() / seconds,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _step(engine: Any, words: torch.Tensor) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    engine.backward(engine(input_ids=words, labels=words).loss)
    engine.step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def _settings(rows: int) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": rows,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "offload_optimizer": host,
            "offload_param": host,
            "sub_group_size": int(1e8),
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(train(*(int(word) for word in sys.argv[1:5]))) + "\n")
