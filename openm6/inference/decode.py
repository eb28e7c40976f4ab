"""One decoder step: a new token of each of many sequences through all layers, its keys and values into the cache.

The same function as `Backbone.forward` with a cache, which is the reference in the tests, for one token per sequence.
Nothing here waits for the device or allocates by what the rows hold, so that a CUDA graph can replay it; with the same
number of rows, a row's bits do not depend on the others. A step of few rows takes as long as its weights take to be
read: only the experts that a row has chosen are read, and weights may be bf16 or int8 (see load.py).

Half of the time of a small model's step lies between the products: in Python, in torch's dispatch and in operations on
a few hundred numbers. Compiled ahead of time for a CPU and kept in a folder, a layer is one call, of five kernels
beside the products. Weights, cache and state are inputs, so one program serves all layers of a kind, and a model of the
same sizes loads it in milliseconds.
"""

# Shapes: B rows, T keys, D hidden size, H query heads, G key-value heads, M = H/G, d size of a head, E experts,
# K choices, F hidden, P first product, V vocabulary, C positions of a slot, O outputs, I inputs, R rows by expert

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.core.files import replace_bytes
from openm6.core.log import get_log
from openm6.kernels.probe import failure_of
from openm6.modalities.text import Text
from openm6.models.backbone import Backbone
from openm6.models.config import BackboneConfig
from openm6.models.omni import Omni
from openm6.nn.attention import normalize_heads
from openm6.nn.block import TransformerBlock
from openm6.nn.cache import SlotCache
from openm6.nn.layers import MLP, activate
from openm6.nn.moe import Experts, MoE
from openm6.ops.int8 import Int8Weight
from openm6.ops.matmul import grouped_mm, linear
from openm6.ops.moe import choose_experts, dropless_permutation, permute, unpermute
from openm6.ops.pointwise import rms_norm, rotary_table, rotate

Program = Callable[[list[Tensor]], Sequence[Tensor]]
# Its code is part of a program.
PACKAGE = Path(__file__).parents[1]
CODE = ("inference/decode.py", "nn/attention.py", "nn/layers.py", "ops/int8.py", "ops/matmul.py", "ops/pointwise.py")
STATE = 7  # inputs before the weights: tokens, cosines, sines, lengths, mask, keys, values
MAX_ERROR = 0.05  # of a program, relative to the norm: of rounding to bf16 or int8, not of a wrong program
# Of this process, by what they depend on; None if one cannot be used.
_programs: dict[str, Program | None] = {}


def program_of(layer: nn.Module, inputs: list[Tensor], settings: str) -> Program | None:
    """Return a layer compiled for such inputs, loaded or compiled now if need be; None if that fails.

    It is for a single row, or any number from two on, and for any numbers of keys and of positions in a slot.
    """
    # What a program depends on: processor, threads, torch, code, sizes and precisions.
    sizes = [(str(part.dtype), part.shape if index >= STATE else None) for index, part in enumerate(inputs)]
    code = [(PACKAGE / name).read_bytes() for name in CODE]
    processor = platform.machine(), torch.cpu.get_capabilities(), torch.get_num_threads()
    parts = processor, torch.__version__, code, sizes, len(inputs[0]) == 1, settings
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    if digest not in _programs:
        reason = failure_of(partial(_prepare, digest, layer, inputs), "TORCHINDUCTOR_CACHE_DIR")
        if reason is not None:
            _programs[digest] = None
            get_log().warning(f"decoding runs uncompiled and slower: {reason}")
    return _programs[digest]


def _prepare(digest: str, layer: nn.Module, inputs: list[Tensor]) -> bool:
    """Load or compile a program; return whether its result is right."""
    # Not in a folder that all users share: programs are executed.
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path.home() / ".cache" / "openm6")
    path = folder / f"decode-{digest}.pt2"
    if not path.exists():
        get_log().info("a layer is compiled for decoding, which takes about half a minute, once")
        _compile(layer, inputs, path)
    # torch's compiler takes seconds to import: only compiled decoding needs it.
    from torch._inductor import aoti_load_package  # noqa: PLC0415

    # The package's own call sorts its inputs first, which takes longer than some layers.
    program = _programs[digest] = aoti_load_package(str(path)).loader.run
    pairs = zip(program(inputs), layer(*inputs), strict=True)
    return all(bool((one - other).norm() < MAX_ERROR * other.norm()) for one, other in pairs)


def _compile(layer: nn.Module, inputs: list[Tensor], path: Path) -> None:
    # As above.
    from torch._inductor import aoti_compile_and_package  # noqa: PLC0415

    row: Any = torch.export.Dim("rows", min=2, max=4096) if len(inputs[0]) > 1 else torch.export.Dim.STATIC
    keys, capacity = (torch.export.Dim(name, min=2, max=2**20) for name in ("keys", "capacity"))
    slot = {0: row, 1: capacity}
    state = (*[{0: row}] * 4, {0: row, 1: keys}, slot, slot)
    shapes = {"tensors": (*state, *[None] * (len(inputs) - STATE))}
    # Tensors of inference mode cannot be traced.
    with torch.inference_mode(False), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        # A slot that is longer than the keys, lest both be taken for one number.
        examples = tuple(F.pad(part, (0, 0, 0, 0, 0, 1)) if part.dim() == 4 else part.clone() for part in inputs)
        traced = torch.export.export(
            layer, examples, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
        found = aoti_compile_and_package(traced, package_path=f"{folder}/layer.pt2")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, Path(found).read_bytes())


# Up to so many rows a GPU reads every expert's weights anyway, and multiplies all rows by all of them in less time.
ALL_EXPERTS_ROWS = 170
# Gathering the weights of chosen experts reads them, writes them and reads them again.
GATHER_COST = 3


@dataclass(frozen=True)
class TextHead:
    """What generates text: a backbone, its token embedding and its head (V D each), the id that closes a text.

    `suppress_tokens` (V bool) are ids that are never generated, or None.
    """

    backbone: Backbone
    embedding: Tensor
    head: Tensor | Int8Weight
    ends: frozenset[int]
    suppress_tokens: Tensor | None = None

    @classmethod
    def of(cls, omni: Omni, text: Text) -> TextHead:
        weight, quantized = omni.text.embedding.weight, omni.text.int8_head
        token = torch.arange(text.vocab_size, device=weight.device)
        suppress_tokens = (token >= text.first_special) & (token != text.end)
        head = omni.text.output_weight if quantized is None else quantized
        return cls(omni.backbone, weight, head, text.ends, suppress_tokens)


class DecodeLayer(nn.Module):
    """A layer, but for its experts, for one new token of each row; all tensors are inputs, as a compiler takes them."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.attention, self.dense = config.attention, config.dense

    @staticmethod
    def weights(block: TransformerBlock, qk_norm: Tensor | None) -> list[Tensor]:
        """Return the weights in the order of their use; a matrix in int8 is followed by its scale."""
        attention, mlp = block.attention, block.mlp
        norms = block.attention_norm.weight, block.mlp_norm.weight
        dense = (mlp.up, mlp.down) if isinstance(mlp, MLP) else ()
        parts = norms[0], attention.qkv, block.qkv_bias, qk_norm, attention.output, norms[1], *dense
        pairs = [(part.values, part.scale) if isinstance(part, Int8Weight) else (part,) for part in parts]
        return [tensor for pair in pairs for tensor in pair if tensor is not None]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """B D, cosines and sines B 1 d/2, lengths B, mask B T, cached keys and values B C G d, weights -> B D twice.

        Keys and values are written at `length`. Returns the residual stream, and the input of the experts if any.
        """
        x, cosine, sine, length, mask, keys, values, *left = tensors
        config, heads, kv_heads = self.attention, self.attention.num_heads, self.attention.num_kv_heads
        eps = config.norm_eps
        qkv = _product(rms_norm(x, left.pop(0), eps), left)
        qkv = (qkv + left.pop(0) if config.qkv_bias else qkv).unflatten(-1, (-1, config.head_dim))
        qk, value = qkv.split([heads + kv_heads, kv_heads], dim=1)  # B H+G d, B G d
        if config.qk_norm:
            qk = normalize_heads(qk, left.pop(0), config)
        query, key = rotate(qk, cosine, sine).split([heads, kv_heads], dim=1)
        index = torch.arange(x.shape[0], device=x.device), length
        keys.index_put_(index, key.to(keys.dtype))
        values.index_put_(index, value.to(values.dtype))
        # The heads of a group become queries of one head: no copies of keys, and no slow path for groups.
        grouped = query.unflatten(1, (kv_heads, -1)).to(keys.dtype)  # B G M d
        keys, values = (part[:, : mask.shape[1]].transpose(1, 2) for part in (keys, values))  # B G T d
        attended = _attend(grouped, keys, values, mask[:, None, None])
        x = x + _product(attended.flatten(1).to(x.dtype), left)
        normal = rms_norm(x, left.pop(0), eps)
        if left and self.dense is not None:
            x = x + _product(activate(_product(normal, left), self.dense.hidden_act), left)
        return x, normal


def _product(x: Tensor, left: list[Tensor]) -> Tensor:
    """Multiply by the first matrix of those that are left.  # B I -> B O"""
    matrix = left.pop(0)
    return linear(x, Int8Weight(matrix, left.pop(0)) if matrix.dtype == torch.int8 else matrix)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """B G M d, B G T d twice, B 1 1 T -> B G M d."""
    if query.shape[0] > 1 or not torch.compiler.is_compiling():
        mask = mask.expand(-1, -1, query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    # Sums of one row are fused; a call of the kernel takes longer.
    query, key, value = (part.float() for part in (query, key, value))
    scores = (query.unsqueeze(3) * key.unsqueeze(2)).sum(-1) * query.shape[-1] ** -0.5 + mask  # B G M T
    return (scores.softmax(-1).unsqueeze(-1) * value.unsqueeze(2)).sum(3)


class DecodeStep:
    """Runs one new token of each row b, in slot b, through all layers, `fixed` in shapes or `compiled` on a CPU."""

    def __init__(self, text_head: TextHead, cache: SlotCache, fixed: bool = False, compiled: bool = False) -> None:
        self.text_head, self.cache, self.fixed = text_head, cache, fixed
        self.backbone = text_head.backbone
        self.config = self.backbone.config
        self.layer = DecodeLayer(self.config)
        heads = self.config.num_heads, self.config.num_kv_heads
        norms = [block.qk_norm for block in self.backbone.blocks]
        self.qk_norms = [None if norm is None else norm(*heads).detach() for norm in norms]  # H+G d
        position = torch.arange(cache.capacity + 1, device=cache.keys.device)[:, None].expand(-1, 3)
        cosine, sine = rotary_table(position[None], *self.config.rotary)
        self.cosine, self.sine = cosine[0], sine[0]  # C+1 1 d/2
        # Blocks that stay on the device, and their weights.
        self.on_device: list[tuple[TransformerBlock, list[Tensor]]] = []
        if not self.backbone.executor.offloaded:
            pairs = zip(self.backbone.blocks, self.qk_norms, strict=True)
            self.on_device = [(block, DecodeLayer.weights(block, norm)) for block, norm in pairs]
        self.compiled = compiled and bool(self.on_device) and cache.keys.is_cpu
        # By whether there is one row, and by the number of inputs.
        self.programs: dict[tuple[bool, int], Program] = {}

    def __call__(self, token: Tensor, position: Tensor, length: Tensor, longest: int) -> Tensor:
        """Logits of the token after `token`, which stands at `position` and is the last of `length` + 1 in its slot.

        `longest` bounds the keys of a row and must exceed every length.  # B, B, B -> B V
        """
        x = F.embedding(token, self.text_head.embedding)  # B D
        logits = linear(self.states(x, position, length, longest), self.text_head.head).float()
        suppress_tokens = self.text_head.suppress_tokens
        return logits if suppress_tokens is None else logits.masked_fill_(suppress_tokens, float("-inf"))

    def states(self, x: Tensor, position: Tensor, length: Tensor, longest: int) -> Tensor:
        """Hidden states after the final norm of one embedded token per row.  # B D, B, B -> B D"""
        hidden = torch.arange(longest, device=x.device) > length[:, None]  # B T
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill_(hidden, float("-inf"))
        rows = self.cosine[position], self.sine[position], length, mask
        keys, values = (part[:, : len(x)].unbind() for part in (self.cache.keys, self.cache.values))
        # A program is for keys that are fewer than a slot has positions.
        compiled = self.compiled and longest < self.cache.capacity
        for layer, qk_norm in enumerate(self.qk_norms):
            if self.on_device:
                block, weights = self.on_device[layer]
            else:
                block = self.backbone.block(layer)
                weights = DecodeLayer.weights(block, qk_norm)
            inputs = [x, *rows, keys[layer], values[layer], *weights]
            x, normal = self._program(inputs)(inputs) if compiled else self.layer(*inputs)
            if isinstance(block.mlp, MoE):
                x = x + decode_moe(normal, block.mlp, self.fixed)
        return self.backbone.final_norm(x)

    def _program(self, inputs: list[Tensor]) -> Program:
        """Return the compiled layer for such inputs, or the layer itself if there is no compiler that works."""
        kind = len(inputs[0]) == 1, len(inputs)
        if kind not in self.programs:
            found = program_of(self.layer, inputs, self.config.model_dump_json())
            self.programs[kind] = found or (lambda inputs: self.layer(*inputs))
        return self.programs[kind]


def decode_moe(x: Tensor, moe: MoE, fixed: bool) -> Tensor:
    """A mixture of experts for one token of each row; `fixed`: no shape depends on the choice of experts.  # B D"""
    config, experts, shared = moe.experts.config, moe.experts, moe.shared_experts
    logits = F.linear(x.float(), moe.router.weight.float())  # B E
    num_choices, prototypes = config.experts_per_token, config.num_prototypes is not None
    gate, chosen, _ = choose_experts(logits, moe.router.bias, num_choices, prototypes, config.norm_topk_prob)
    # Sorting can be recorded in a graph if it is one kernel, in bfloat16 alone.
    captured = isinstance(experts.up, Tensor) and experts.up.dtype == torch.bfloat16
    if x.is_cpu and (fixed or len(x) == 1):
        y = _one_by_one(x, experts, gate, chosen)
    elif not x.is_cpu and not fixed and reads_chosen_experts(len(x), config.num_experts, num_choices):
        y = _gathered(x, experts, gate, chosen)
    elif not x.is_cpu and (fixed or meets_all_experts(len(x), captured)):
        y = _by_all(x, experts, gate, chosen)
    else:
        plan = dropless_permutation(chosen, config.num_experts)
        hidden = activate(grouped_mm(permute(x, plan), experts.up, plan.counts), config.hidden_act)
        y = unpermute(grouped_mm(hidden, experts.down, plan.counts), gate, plan)
    return y if shared is None else y + shared(x)


def reads_chosen_experts(rows: int, experts: int, choices: int) -> bool:
    """Whether a GPU gathers the weights of the chosen experts, which takes fewer bytes than to read all of them."""
    return GATHER_COST * rows * choices < experts


def meets_all_experts(rows: int, captured: bool) -> bool:
    """Whether a GPU multiplies every row by all experts, or sorts rows by their own.

    A pass is recorded in a graph, which cannot wait for a count; sorting needs one unless it is `captured`.
    """
    return not captured or rows <= ALL_EXPERTS_ROWS


def _one_by_one(x: Tensor, experts: Experts, gate: Tensor, chosen: Tensor) -> Tensor:
    """One chosen expert after the other on all rows; others add an exact 0, so bits do not depend on other rows."""
    weight = torch.zeros(len(x), experts.config.num_experts).scatter_(1, chosen, gate)  # B E
    y = torch.zeros(x.shape)
    for expert in sorted(set(chosen.flatten().tolist())):
        hidden = activate(linear(x, _matrix(experts.up, expert)), experts.config.hidden_act)  # B F
        y.addcmul_(linear(hidden, _matrix(experts.down, expert)).float(), weight[:, expert : expert + 1])
    return y.to(x.dtype)


def _matrix(stack: Tensor | Int8Weight, expert: int) -> Tensor | Int8Weight:
    return stack[expert].t() if isinstance(stack, Tensor) else stack[expert]


def _gathered(x: Tensor, experts: Experts, gate: Tensor, chosen: Tensor) -> Tensor:
    """Each choice times a copy of its expert's matrices: fixed shapes, and only the chosen weights are read."""
    index = chosen.flatten()  # B·K
    up, down = (
        stack[index] if isinstance(stack, Tensor) else stack[index].plain(x.dtype).mT
        for stack in (experts.up, experts.down)
    )  # B·K D P, B·K F D
    rows = x.unsqueeze(1).expand(-1, chosen.shape[1], -1).reshape(len(index), 1, -1)  # B·K 1 D
    hidden = activate(torch.bmm(rows, up), experts.config.hidden_act)
    found = torch.bmm(hidden, down).view(*chosen.shape, -1)  # B K D
    return (found * gate.unsqueeze(-1).to(x.dtype)).sum(1)


def _by_all(x: Tensor, experts: Experts, gate: Tensor, chosen: Tensor) -> Tensor:
    """Σ_e gate_e · E_e(x) with a gate of 0 for those not chosen: fixed shapes, no sorting."""
    up, down, count = experts.up, experts.down, experts.config.num_experts
    weight = torch.zeros(len(x), count, device=x.device).scatter_(1, chosen, gate)  # B E
    weight = weight.t().unsqueeze(-1).to(x.dtype)  # E B 1
    if isinstance(up, Tensor):
        hidden = activate(torch.bmm(x.expand(count, -1, -1), up), experts.config.hidden_act)  # E B F
        # One product does the sum, too.
        return (hidden * weight).transpose(0, 1).flatten(1) @ down.flatten(0, 1)  # B E·F -> B D
    hidden = activate(torch.stack([up[expert].linear(x) for expert in range(count)]), experts.config.hidden_act)
    return torch.stack([down[expert].linear(part) for expert, part in enumerate(hidden * weight)]).sum(0)
