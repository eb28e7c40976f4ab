"""Baselines of `decode`: the same dense decoder in `transformers`, and in llama.cpp as GGUF files."""

# Shapes: D hidden size, V vocabulary

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.models.backbone import Backbone
from openm6.nn.layers import MLP

LLAMA_CPP_MISSING = (
    "llama.cpp is left out: pip install llama-cpp-python gguf (built with CMAKE_ARGS=-DGGML_NATIVE=ON) to measure it."
)
FORMATS = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7}  # GGUF's numbers of file types
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTEXT = 256

Decode = Callable[[], list[int]]  # a greedy text after the prompt


def named_weights(backbone: Backbone, embedding: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a dense backbone by their names in `transformers`."""
    config = backbone.config
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", embedding
    yield "model.norm.weight", backbone.final_norm.weight
    for index, block in enumerate(backbone.blocks):
        prefix, mlp = f"model.layers.{index}.", block.mlp
        assert isinstance(mlp, MLP)
        parts = block.attention.qkv.split([query, key, key]), mlp.up.chunk(2)
        names = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        yield from zip((f"{prefix}self_attn.{name}.weight" for name in names[0]), parts[0], strict=True)
        yield f"{prefix}self_attn.o_proj.weight", block.attention.output
        yield from zip((f"{prefix}mlp.{name}.weight" for name in names[1]), parts[1], strict=True)
        yield f"{prefix}mlp.down_proj.weight", mlp.down
        yield f"{prefix}input_layernorm.weight", block.attention_norm.weight
        yield f"{prefix}post_attention_layernorm.weight", block.mlp_norm.weight


def transformers_candidates(
    library: Any, backbone: Backbone, embedding: Tensor, prompt: list[int], new_tokens: int
) -> dict[str, Decode]:
    """Return `generate`, a loop with a static cache, and the same compiled, each in fp32 and bf16."""
    config, dense = backbone.config, backbone.config.dense
    assert dense is not None
    settings = library.LlamaConfig(
        vocab_size=len(embedding),
        hidden_size=config.hidden_size,
        intermediate_size=dense.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    ids = torch.tensor([prompt])
    found: dict[str, Decode] = {}

    def generate(model: Any) -> list[int]:
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        return list(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def loop(model: Any, forward: Any) -> list[int]:
        cache, tokens = library.StaticCache(config=settings, max_cache_len=CONTEXT), []
        positions = torch.arange(len(prompt))
        out = model(input_ids=ids, past_key_values=cache, cache_position=positions, logits_to_keep=1)
        for position in range(len(prompt), len(prompt) + new_tokens):
            token = out.logits[:, -1].argmax(-1)
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
            at = torch.tensor([position])
            out = forward(input_ids=token[:, None], past_key_values=cache, cache_position=at, logits_to_keep=1)
        return tokens

    for name, dtype in TYPES.items():
        model = library.LlamaForCausalLM(settings).eval()
        missing = model.load_state_dict(dict(named_weights(backbone, embedding)), strict=False).missing_keys
        assert missing in ([], ["lm_head.weight"]), missing
        model.tie_weights()
        model.to(dtype).requires_grad_(False)
        compiled = torch.compile(model.forward, dynamic=False)
        found[f"transformers {name}, generate"] = partial(generate, model)
        found[f"transformers {name}, static cache"] = partial(loop, model, model.forward)
        found[f"transformers {name}, static cache, compiled"] = partial(loop, model, compiled)
    return found


def write_gguf(path: Path, gguf: Any, backbone: Backbone, embedding: Tensor, quantization: str) -> None:
    """Write the weights as a GGUF file without a tokenizer."""
    config, dense = backbone.config, backbone.config.dense
    assert dense is not None
    target = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(dense.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(embedding))
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(FORMATS[quantization])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for name, weight in named_weights(backbone, embedding):
        values = weight.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours, not halves
            halves = values.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        known = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(known, values)
        else:
            writer.add_tensor(known, gguf.quants.quantize(values, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One GGUF file in llama.cpp, through the functions of its C interface."""

    def __init__(self, library: Any, path: Path, threads: int) -> None:
        self.library = library
        # Kept, because C calls it.
        self.silent = library.llama_log_callback(lambda *_: None)
        library.llama_log_set(self.silent, ctypes.c_void_p(0))
        library.llama_backend_init()
        settings = library.llama_model_default_params()
        settings.use_mmap = False
        self.model = library.llama_model_load_from_file(str(path).encode(), settings)
        context = library.llama_context_default_params()
        context.n_ctx, context.n_threads, context.n_threads_batch = CONTEXT, threads, threads
        self.context = library.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError(f"llama.cpp does not read {path}")
        self.vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self.model))

    def decode(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Return the greedy text after a prompt."""
        library, tokens = self.library, []
        library.llama_memory_clear(library.llama_get_memory(self.context), True)
        fresh = prompt
        for _ in range(new_tokens):
            ids = (library.llama_token * len(fresh))(*fresh)
            if library.llama_decode(self.context, library.llama_batch_get_one(ids, len(fresh))):
                raise RuntimeError("llama.cpp failed to decode")
            logits = np.ctypeslib.as_array(library.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
            fresh = [int(logits.argmax())]
            tokens += fresh
        return tokens


def llama_cpp_candidates(
    libraries: tuple[Any, Any],
    folder: Path,
    backbone: Backbone,
    embedding: Tensor,
    prompt: list[int],
    new_tokens: int,
    threads: int,
) -> dict[str, Decode]:
    """Return one candidate per format; `libraries` are llama_cpp and gguf."""
    found: dict[str, Decode] = {}
    for name in FORMATS:
        path = folder / f"{name}.gguf"
        write_gguf(path, libraries[1], backbone, embedding, name)
        model = LlamaCpp(libraries[0], path, threads)
        path.unlink()
        found[f"llama.cpp {name}"] = partial(model.decode, prompt, new_tokens)
    return found
