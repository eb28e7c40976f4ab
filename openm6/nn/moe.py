"""Mixture-of-experts layer: router -> dispatch -> experts -> combine, and what the router reports."""

# Dimensions: B rows, S tokens of a row, N = B·S, D width, F hidden, P first product, E experts, K choices, R rows sent

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.nn.config import ExpertsConfig
from openm6.nn.layers import MLP, Adaptable, activate, fill_normal, first_width
from openm6.ops import moe as ops
from openm6.ops.int8 import Int8Weight
from openm6.ops.matmul import cast_alike, grouped_mm

ChunkOfExperts = Callable[[int, Tensor, Tensor], Tensor]  # chunk, R D, rows of each of its experts -> R D
Meanwhile = Callable[[], Tensor | None]


class TokenDispatcher:
    """Passes rows, sorted by expert, to their experts, all of them on this device; subclasses send rows to other ranks.

    Only rows are sent: gates stay with their tokens and multiply afterwards. A subclass may divide the experts of a
    rank, in order, into `chunks` of equal size, so that the rows of one are sent while another is computed.
    """

    chunks = 1
    is_local = True  # whether all experts are on this device

    def exchange(
        self, rows: Tensor, counts: Tensor, capacity: int | None, experts: ChunkOfExperts, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """R D and E -> outputs R D of `experts`, and of `meanwhile`; `capacity` equals all counts, if given."""
        result = meanwhile()
        return experts(0, rows, counts), result

    def all_reduce(self, load: Tensor) -> Tensor:
        """Return a count of this rank's tokens, summed over all ranks of the run."""
        return load


@dataclass(frozen=True)
class RouterStats:
    """What one layer's router did with the valid tokens of a step.

    load: E, tokens per expert, before any were dropped; dropped: fraction of choices dropped (0 without a capacity)
    side_loss: weighted sum of the balance loss and the z-loss of ops/moe.py, to be added to the loss
    """

    layer: int
    load: Tensor
    dropped: Tensor
    side_loss: Tensor

    @property
    def load_cv(self) -> Tensor:
        """Coefficient of variation σ/μ of the load: 0 is perfect balance (M6-T, §3.1)."""
        return self.load.std(correction=0) / self.load.mean().clamp(min=1e-9)


@dataclass(frozen=True)
class Routing:
    """The router's choice for N tokens: gates N K, chosen experts N K, load E, side loss as in `RouterStats`."""

    gate: Tensor
    chosen: Tensor
    load: Tensor
    side_loss: Tensor


class Router(nn.Module):
    """Scores all experts for each token, in fp32, and chooses."""

    bias: Tensor | None

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.register_buffer("bias", torch.empty(config.num_experts) if config.balance == "bias" else None)

    def reset_parameters(self, deviation: float) -> None:
        fill_normal(self.weight, deviation)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, valid: Tensor, dispatcher: TokenDispatcher | None = None) -> Routing:
        """N D, N bool -> the routing of N tokens; tokens that are not valid are routed, but not counted.

        The auxiliary loss compares this rank's probabilities with the load of all ranks. Where a batch is divided into
        parts (`num_processes`, `gradient_accumulation_steps`), it is that of each part alone.
        """
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # N E
            prototypes = config.num_prototypes is not None
            gate, chosen, probability = ops.choose_experts(
                logits, self.bias, config.experts_per_token, prototypes, config.norm_topk_prob
            )
            load = ops.tokens_per_expert(chosen, valid, config.num_experts)
            side = logits.new_zeros(())
            if config.balance == "aux":
                total = dispatcher.all_reduce(load) if dispatcher else load
                side = config.router_aux_loss_coef * ops.balance_loss(probability, total, valid)
            if config.router_z_loss_coef:
                side = side + config.router_z_loss_coef * ops.z_loss(logits, valid, config.num_prototypes or 1)
        return Routing(gate, chosen, load, side)

    def update_balance(self, load: Tensor) -> None:
        """Loss-free balancing (2408.15664): bias up for too small a `load`, down for too large, summed over all."""
        if self.bias is not None:
            load = load.to(self.bias.device)
            self.bias.copy_(self.bias + self.config.balance_rate * torch.sign(load.mean() - load))


class Experts(Adaptable):
    """The matrices of E small networks, and the backends that apply them to tokens that are routed."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.num_experts, config.intermediate_size
        self.up = nn.Parameter(torch.empty(experts, width, first_width(hidden, config.hidden_act)))  # E D P
        self.down = nn.Parameter(torch.empty(experts, hidden, width))  # E F D

    @property
    def capacity_factor(self) -> float | None:
        """That of the config while training; a trained model drops no token, as decoding cannot."""
        return self.config.capacity_factor if self.training else None

    def forward(
        self, x: Tensor, routing: Routing, valid: Tensor, dispatcher: TokenDispatcher, shared: MLP | None
    ) -> tuple[Tensor, Tensor | None]:
        """B S D, B S bool -> B S D with the output of `shared` added, and which assignments were kept; None: all."""
        config, flat = self.config, x.flatten(0, 1)  # N D
        local = config.hidden_act == "swiglu" and self.capacity_factor is None and dispatcher.is_local
        backend = ops.choose_backend(flat, config.experts_per_token, config.num_experts, local)
        # Weights in int8 and low-rank updates have grouped products only.
        backend = "permute" if len(self.lora) or isinstance(self.up, Int8Weight) else backend
        if backend == "permute":
            return self._permuted(x, routing, valid.flatten(), dispatcher, shared)
        if backend == "per_expert":
            y = ops.moe_mlp_per_expert(flat, routing.gate, routing.chosen, self.up, self.down)
        else:
            rows, up = cast_alike(flat, self.up)
            y = ops.moe_mlp_fused(rows, routing.gate, routing.chosen, up, cast_alike(rows, self.down)[1])
        y = y.view_as(x)
        return y if shared is None else y + shared(x), None

    def _permuted(
        self, x: Tensor, routing: Routing, valid: Tensor, dispatcher: TokenDispatcher, shared: MLP | None
    ) -> tuple[Tensor, Tensor | None]:
        """The general backend: permute, dispatch, two grouped products, combine, unpermute."""
        config, factor, capacity = self.config, self.capacity_factor, None
        if factor is None:
            permutation = ops.dropless_permutation(routing.chosen, config.num_experts)
        else:
            # C = k·T/N·γ, rounded up (M6-T, §2), with k choices, T tokens and N experts
            mean = config.experts_per_token * len(valid) / config.num_experts
            capacity = max(1, math.ceil(mean * factor))
            permutation = ops.capacity_permutation(routing.chosen, valid, config.num_experts, capacity)
        rows = ops.permute(x.flatten(0, 1), permutation)  # N D -> R D
        chunks = dispatcher.chunks
        # The whole weight as it is, since a view would copy its gradient.
        ups, downs = ([weight] if chunks == 1 else weight.chunk(chunks) for weight in (self.up, self.down))

        def experts(chunk: int, rows: Tensor, counts: Tensor) -> Tensor:
            product = self.updated("up", grouped_mm(rows, ups[chunk], counts), rows, counts)  # R D -> R P
            hidden = activate(product, config.hidden_act)  # R P -> R F
            return self.updated("down", grouped_mm(hidden, downs[chunk], counts), hidden, counts)  # R F -> R D

        outputs, dense = dispatcher.exchange(
            rows, permutation.counts, capacity, experts, lambda: None if shared is None else shared(x)
        )
        y = ops.unpermute(outputs, routing.gate, permutation).view_as(x)
        return y if dense is None else y + dense, permutation.kept


class MoE(nn.Module):
    """Send each token through its K of E small networks, which layers may share, and sum their outputs by the gates."""

    def __init__(self, router: Router, experts: Experts, shared_experts: MLP | None) -> None:
        super().__init__()
        self.router, self.experts, self.shared_experts = router, experts, shared_experts

    def forward(self, x: Tensor, valid: Tensor, dispatcher: TokenDispatcher, layer: int) -> tuple[Tensor, RouterStats]:
        """B S D, B S bool -> B S D and the statistics of the router."""
        config = self.router.config
        routing = self.router(x.flatten(0, 1), valid.flatten(), dispatcher)
        y, kept = self.experts(x, routing, valid, dispatcher, self.shared_experts)
        dropped = routing.load.new_zeros(())
        if kept is not None:
            dropped = 1 - kept.sum() / (valid.sum().clamp(min=1) * config.experts_per_token)
        return y, RouterStats(layer, routing.load, dropped, routing.side_loss)
