"""Tiny random decoders of `transformers`, saved as published models are, with a tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken

from openm6.modalities.text import train_tokenizer
from tests.small_model import WORDS

ROWS = 330
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT = "<|im_start|>user\ndraw the digit seven<|im_end|>\n<|im_start|>assistant\n"
STEPS = 12
SIZE: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 64, "rope_theta": 10_000.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama 3": ("Llama", {"rope_parameters": {**LLAMA3, **ORIGINAL}}),
    "llama 3.1": ("Llama", {"rope_parameters": {**LLAMA3, **ORIGINAL, "original_max_position_embeddings": 8192}}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL}}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe, in part": ("Qwen3Moe", {**MOE, "head_dim": 16, "decoder_sparse_step": 2, "mlp_only_layers": [0]}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False}),
}


def decoder(name: str, **changes: Any) -> Any:
    """A model whose norms and biases matter; changes: of the config of this variant."""
    kind, own = VARIANTS[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{kind}Config")(**{**SIZE, **own, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.normal_()
    return model.eval()


def publish(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """Save a model with its tokenizer; return it."""
    model = decoder(name, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer = train_tokenizer(WORDS, 320)
    marks = [AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return model


@torch.inference_mode()
def their_text(model: Any, ids: list[int], end: int) -> list[int]:
    """Tokens that a greedy model generates; those without a name in the tokenizer cannot be shown by either."""
    new = model.generate(
        torch.tensor([ids]), max_new_tokens=STEPS, do_sample=False, eos_token_id=end, pad_token_id=end,
        suppress_tokens=list(range(end + 1, ROWS)),
    )  # fmt: skip
    return new[0, len(ids) :].tolist()
