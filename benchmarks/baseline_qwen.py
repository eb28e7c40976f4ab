"""Baseline of serving: the same weights as a Qwen3-MoE of `transformers`, by all methods of that library."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openm6.hub.architectures import NORM, Shape, backbone_config, layer_tensors, outer_tensors
from openm6.models.backbone import Backbone

BASELINE_MISSING = "transformers is not installed: pip install '.[hf]' to measure beside it."
PAD = 0
SMALL_PAGE = 32  # tokens


def open_baseline(
    backbone: Backbone, embedding: Tensor, positions: int, device: torch.device, dtype: torch.dtype
) -> QwenBaseline | None:
    """Return the baseline with the weights of `backbone` and a tied embedding; None if it is not installed."""
    try:
        import transformers  # noqa: PLC0415 - optional
    except ModuleNotFoundError:
        return None
    library: Any = transformers  # its own types are of no use here
    config = backbone.config
    experts = config.experts
    assert experts is not None and experts.top_k is not None
    settings = library.Qwen3MoeConfig(
        vocab_size=len(embedding),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_experts=experts.num_experts,
        num_experts_per_tok=experts.top_k,
        moe_intermediate_size=experts.intermediate_size,
        intermediate_size=2 * experts.intermediate_size,
        norm_topk_prob=True,
        rope_theta=config.rope_theta,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    model = library.Qwen3MoeForCausalLM(settings).eval()
    _copy_weights(model, backbone, embedding)
    return QwenBaseline(model.to(device, dtype), library)


def _copy_weights(model: Any, backbone: Backbone, embedding: Tensor) -> None:
    """Import the random weights of the baseline into the backbone, so that both have the same."""
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        backbone.load_state_dict(backbone_state(model))


class LoadedWeights:
    """The weights of a model of `transformers` in memory, by their published names: experts one by one."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.tensors: dict[str, Tensor] = {}
        for name, tensor in state.items():
            stem, _, last = name.rpartition(".")
            if last not in ("gate_up_proj", "down_proj"):
                self.tensors[name] = tensor
                continue
            for expert, matrix in enumerate(tensor):
                parts = {"gate": matrix[: len(matrix) // 2], "up": matrix[len(matrix) // 2 :]}
                for kind, part in (parts if last == "gate_up_proj" else {"down": matrix}).items():
                    self.tensors[f"{stem}.{expert}.{kind}_proj.weight"] = part

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> Shape:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]


def backbone_state(model: Any) -> dict[str, Tensor]:
    """The weights of a decoder of `transformers` as the state of our backbone."""
    settings, weights = model.config.to_dict(), LoadedWeights(model.state_dict())
    config, kind = backbone_config(settings), settings["model_type"]
    layers = [one for layer in range(config.num_layers) for one in layer_tensors(kind, config, layer)]
    norms = [one for one in outer_tensors(config, 0, tied=True) if one.ours == NORM]
    return {one.ours.removeprefix("backbone."): one.read(weights) for one in [*norms, *layers]}


@dataclass
class Seen:
    """Number of generated tokens, and times of the first and last token of each request, in seconds from the start."""

    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)


class QwenBaseline:
    """The methods of the baseline: each generates a fixed number of tokens per prompt, greedily."""

    def __init__(self, model: Any, transformers: Any) -> None:
        self.model, self.library = model, transformers
        self.version = f"transformers {transformers.__version__}"

    def ways(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Callable[[], dict[str, Any]]]:
        """Return the methods: batched `generate`, and continuous batching with default and with tuned settings."""
        found: dict[str, Callable[[], dict[str, Any]]] = {
            f"transformers generate, padded batches of {size}": partial(self._padded, prompts, new_tokens, size)
            for size in sorted({min(32, len(prompts)), len(prompts)})
        }
        for name, settings in self.batching_settings(prompts, new_tokens).items():
            found[name] = lambda way=settings: self._continuous(prompts, new_tokens, way)  # type: ignore[misc]
        return found

    def _padded(self, prompts: list[list[int]], new_tokens: int, size: int) -> dict[str, Any]:
        """Generate for prompts in order of length, which reduces padding; left padding, as `generate` requires."""
        began, tokens = time.perf_counter(), 0
        first: list[float] = []
        ordered = sorted(prompts, key=len)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            longest = max(map(len, batch))
            ids = torch.tensor([[PAD] * (longest - len(p)) + p for p in batch], device=self.model.device)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=(ids != PAD).long(),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=PAD,
            )
            tokens += (out.shape[1] - longest) * len(batch)
            first += [time.perf_counter() - began] * len(batch)  # a batch is seen when it is done
        return {"tokens": tokens, "first_token_seconds_median": statistics.median(first)}

    def batching_settings(self, prompts: list[list[int]], new_tokens: int) -> dict[str, dict[str, Any]]:
        """Return the settings of continuous batching by name: default, and tuned for this device."""
        ways: dict[str, dict[str, Any]] = {"transformers continuous batching": {}}
        if getattr(self.library, "ContinuousBatchingConfig", None) is None:  # an older version
            return ways
        if self.model.device.type == "cuda":
            graphs = {"use_cuda_graph": True}
            ways["transformers continuous batching, CUDA graphs"] = graphs
            ways["transformers continuous batching, CUDA graphs, compiled"] = {
                **graphs,
                "default_compile_level": 1,
            }
            return ways
        # Its mask covers the whole pool, which by default is as large as the memory: set it to the size of the prompts.
        blocks = sum(-(-(len(prompt) + new_tokens) // SMALL_PAGE) + 1 for prompt in prompts)
        ways["transformers continuous batching, small pool"] = {
            "page_size": SMALL_PAGE,
            "num_blocks": blocks,
            "max_batch_tokens": max(512, sum(map(len, prompts))),
            "allow_block_sharing": False,
        }
        return ways

    def _continuous(self, prompts: list[list[int]], new_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        seen = self.under_load(prompts, new_tokens, [0.0] * len(prompts), settings)
        if isinstance(seen, str):
            return {"error": seen}
        seconds = max(seen.last.values())
        # The allocation of its pool and its warm-up, which ours has before its clock starts as well.
        ready = time.perf_counter() - began - seconds
        return {
            "tokens": seen.tokens,
            "seconds": seconds,
            "first_token_seconds_median": statistics.median(seen.first.values()),
            "seconds_to_be_ready": ready,
        }

    def under_load(
        self, prompts: list[list[int]], new_tokens: int, moments: list[float], settings: dict[str, Any]
    ) -> Seen | str:
        """Generate for prompts that arrive at their moments; an error of the baseline is returned as text."""
        before = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("paged|sdpa")
            return self._arrive(prompts, new_tokens, moments, settings)
        except Exception as error:  # whatever it raises is its result, not ours
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            self.model.set_attn_implementation(before)

    def _arrive(
        self, prompts: list[list[int]], new_tokens: int, moments: list[float], settings: dict[str, Any]
    ) -> Seen:
        greedy = self.library.GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=PAD,
        )
        config = self.library.ContinuousBatchingConfig(**settings) if settings else None
        seen, numbers = Seen(), {}
        with self.model.continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=config, block=True, timeout=5
        ) as manager:
            began = time.perf_counter()
            for number, prompt in enumerate(prompts):
                time.sleep(max(0.0, began + moments[number] - time.perf_counter()))
                name = manager.add_request(prompt, max_new_tokens=new_tokens, record_timestamps=True)
                numbers[name] = number
            while len(seen.last) < len(prompts):
                found = manager.get_result(timeout=1)
                if found is None and not manager.is_running():
                    raise RuntimeError("its thread has ended")
                if found is not None and found.is_finished():
                    if found.error is not None:
                        raise RuntimeError(found.error)
                    number = numbers[found.request_id]
                    seen.tokens += len(found.generated_tokens)
                    seen.first[number] = found.timestamps[0] - began
                    seen.last[number] = found.timestamps[-1] - began
        return seen
