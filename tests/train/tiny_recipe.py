"""A recipe small enough to be trained in a test: three sources, five tasks, width 64, a few steps."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

MODEL = {
    "preset": "nano",
    "overrides": {
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
        "experts": {"intermediate_size": 64, "num_experts": 4},
    },
}
EVAL = {"records": 4, "answers": 2, "drawn": 2, "samples": 1, "decoding": {"steps": 2}}


def tiny_recipe(steps: int = 6, **loop: Any) -> dict[str, Any]:
    """The recipe as plain values; words of `loop` change its training loop.

    In fp32: what is compared over ranks, processes and ways of training is held to 1e-5, which bf16 rounds away.
    """
    return {
        "kind": "multimodal",
        "model": deepcopy(MODEL),  # a test may change its recipe
        "modalities": {"text": {"vocab_size": 400}, "numbers": {"predictors": "ridge"}},
        "sources": {
            "digits": {"kind": "embedded", "name": "digits", "limit": 30},
            "spoken": {"kind": "embedded", "name": "espeak_digits", "limit": 20},
            "penguins": {"kind": "embedded", "name": "penguins", "limit": 40},
        },
        "mixture": [
            {"source": "digits", "task": "image_classification"},
            {"source": "digits", "task": "text_to_image"},
            {"source": "spoken", "task": "speech_recognition"},
            {"source": "spoken", "task": "text_to_speech"},
            {"source": "penguins", "task": "tabular_regression"},
        ],
        "packing": {"batch_size": 2, "seq_len": 160},
        "loop": {
            "steps": steps,
            "save_every": 2,
            "log_every": 1,
            "tensorboard": False,
            "precision": "fp32",
            **loop,
        },
        "eval": deepcopy(EVAL),
    }


def write_recipe(folder: Path, recipe: dict[str, Any], name: str = "tiny") -> str:
    """The path of the recipe's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return str(path)
