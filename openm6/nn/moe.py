"""Mixture-of-experts layer: router -> dispatch -> experts -> combine, and what the router reports."""

# Letters: B rows, S tokens of a row, N = B·S, D width, F hidden, P first product, E experts, K choices, R rows sent

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.layers import FeedForward, activate, fill_normal, first_width
from openm6.ops.matmul import cast_alike, grouped_mm
from openm6.ops.moe import (
    TokenPermutation,
    balance_loss,
    balanced_bias,
    capacity_of,
    capacity_permutation,
    choose_backend,
    choose_prototypes,
    choose_top_k,
    dropless_permutation,
    load_cv,
    moe_mlp_fused,
    moe_mlp_per_expert,
    permute,
    tokens_per_expert,
    unpermute,
    z_loss,
)


class TokenChunk(Protocol):
    """Rows for some of this rank's experts; the chunks of a layer divide those evenly, in order."""

    @property
    def counts(self) -> Tensor:
        """Rows of each expert."""

    def rows(self) -> Tensor:
        """The rows, sorted by expert; waits for those from other ranks."""


AnyChunk = TypeVar("AnyChunk", bound=TokenChunk)


class TokenDispatcher(Protocol[AnyChunk]):
    """Sends rows, sorted by expert, to the ranks of their experts, and the answers back in the same order.

    Only rows are sent: gates stay with their tokens and multiply after `collect`. Rows may come in several chunks, so
    that one is sent while another is computed; `reply` starts to send the answers of a chunk back.
    """

    def dispatch(self, rows: Tensor, counts: Tensor, capacity: int | None) -> Sequence[AnyChunk]:
        """R D and E -> chunks of rows for this rank's experts; `capacity`, if given, equals all counts."""
        ...

    def reply(self, chunk: AnyChunk, answers: Tensor) -> None:
        """Start to send back what the experts of a chunk answered."""
        ...

    def collect(self, chunks: Sequence[AnyChunk]) -> Tensor:
        """All answers -> R D, in the order in which the rows were sent."""
        ...

    def total(self, load: Tensor) -> Tensor:
        """A count of this rank's tokens, summed over all ranks of the run."""
        ...


class LocalChunk:
    """All rows at once, for all experts."""

    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        self.counts = counts
        self.held = rows

    def rows(self) -> Tensor:
        return self.held


class LocalDispatcher:
    """All experts are on this device."""

    def dispatch(self, rows: Tensor, counts: Tensor, capacity: int | None) -> list[LocalChunk]:
        return [LocalChunk(rows, counts)]

    def reply(self, chunk: LocalChunk, answers: Tensor) -> None:
        chunk.held = answers

    def collect(self, chunks: Sequence[LocalChunk]) -> Tensor:
        return chunks[0].held

    def total(self, load: Tensor) -> Tensor:
        return load


@dataclass(frozen=True)
class RouterStats:
    """What one layer's router did with the valid tokens of a step.

    load: E, tokens per expert, before any were dropped; dropped: share of choices dropped (0 without a capacity)
    aux_loss, z_loss: as defined in ops/routing.py, for the log; side_loss: their weighted sum, to be added to the loss
    """

    layer: int
    load: Tensor
    aux_loss: Tensor
    z_loss: Tensor
    dropped: Tensor
    side_loss: Tensor

    @property
    def load_cv(self) -> Tensor:
        """σ/μ of the load."""
        return load_cv(self.load)


@dataclass(frozen=True)
class Routing:
    """The router's choice for N tokens: gates N K, chosen experts N K, load E, the two side losses."""

    gate: Tensor
    chosen: Tensor
    load: Tensor
    aux_loss: Tensor
    z_loss: Tensor


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

    def forward(self, x: Tensor, valid: Tensor, exchange: TokenDispatcher | None = None) -> Routing:
        """N D, N bool -> the routing of N tokens; tokens that are not valid are routed, but not counted.

        The auxiliary loss compares this rank's probabilities with the load of all ranks of the exchange.
        """
        config = self.config
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # N E
            if config.num_prototypes is not None:
                gate, chosen, probability = choose_prototypes(logits, self.bias, config.num_prototypes)
            else:
                gate, chosen, probability = choose_top_k(
                    logits, self.bias, config.experts_per_token, config.norm_topk_prob
                )
            load = tokens_per_expert(chosen, valid, config.num_experts)
            none = logits.new_zeros(())
            aux = none
            if config.balance == "aux":
                aux = balance_loss(probability, exchange.total(load) if exchange else load, valid)
            z = z_loss(logits, valid, config.num_prototypes or 1) if config.router_z_loss_coef else none
        return Routing(gate, chosen, load, aux, z)

    def update_balance(self, load: Tensor) -> None:
        """Moves the bias a step towards balance; `load` is summed over layers, micro-batches and ranks first."""
        if self.bias is not None:
            self.bias.copy_(balanced_bias(self.bias, load.to(self.bias.device), self.config.balance_rate))


class Experts(nn.Module):
    """Send each token through its K of E small networks and sum their outputs by the gates."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.num_experts, config.intermediate_size
        self.up = nn.Parameter(torch.empty(experts, width, first_width(hidden, config.hidden_act)))  # E D P
        self.down = nn.Parameter(torch.empty(experts, hidden, width))  # E F D
        shared = (
            DenseConfig(intermediate_size=hidden * config.num_shared, hidden_act=config.hidden_act)
            if config.num_shared
            else None
        )
        self.shared = FeedForward(width, shared) if shared else None

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        fill_normal(self.up, deviation)
        fill_normal(self.down, output_deviation)
        if self.shared is not None:
            self.shared.reset_parameters(deviation, output_deviation)

    def forward(
        self, x: Tensor, router: Router, valid: Tensor, exchange: TokenDispatcher, layer: int
    ) -> tuple[Tensor, RouterStats]:
        """B S D, B S bool -> B S D and the report of the router."""
        config, flat = self.config, x.flatten(0, 1)  # N D
        routing = router(flat, valid.flatten(), exchange)
        simple = (
            config.hidden_act == "swiglu"
            and config.capacity_factor is None
            and type(exchange) is LocalDispatcher
        )
        backend = choose_backend(flat, config.experts_per_token, config.num_experts, simple)
        if backend == "permute":
            return self._permuted(x, routing, valid, exchange, layer)
        if backend == "per_expert":
            y = moe_mlp_per_expert(flat, routing.gate, routing.chosen, self.up, self.down)
        else:
            rows, up = cast_alike(flat, self.up)
            y = moe_mlp_fused(rows, routing.gate, routing.chosen, up, cast_alike(rows, self.down)[1])
        y = y.view_as(x)
        y = y if self.shared is None else y + self.shared(x)
        return y, self._report(routing, None, valid, layer)

    def _permuted(
        self, x: Tensor, routing: Routing, valid: Tensor, exchange: TokenDispatcher, layer: int
    ) -> tuple[Tensor, RouterStats]:
        """The general way: permute, dispatch, two grouped products, collect, unpermute."""
        flat = x.flatten(0, 1)  # N D
        permutation = self._permutation(routing, valid.flatten())
        chunks = exchange.dispatch(permute(flat, permutation), permutation.counts, self._capacity(len(flat)))
        shared = self.shared(x) if self.shared is not None else None  # while the rows are sent
        ups, downs = (_divide(weight, len(chunks)) for weight in (self.up, self.down))
        for chunk, up, down in zip(chunks, ups, downs, strict=True):
            hidden = activate(
                grouped_mm(chunk.rows(), up, chunk.counts), self.config.hidden_act
            )  # R D -> R F
            exchange.reply(chunk, grouped_mm(hidden, down, chunk.counts))  # R F -> R D
        y = unpermute(exchange.collect(chunks), routing.gate, permutation).view_as(x)
        return y if shared is None else y + shared, self._report(routing, permutation, valid, layer)

    def _capacity(self, num_tokens: int) -> int | None:
        """Rows that each expert takes of so many tokens; None if nothing is dropped."""
        config = self.config
        if config.capacity_factor is None:
            return None
        return capacity_of(num_tokens, config.experts_per_token, config.num_experts, config.capacity_factor)

    def _permutation(self, routing: Routing, valid: Tensor) -> TokenPermutation:
        capacity, num_experts = self._capacity(len(valid)), self.config.num_experts
        if capacity is None:
            return dropless_permutation(routing.chosen, num_experts)
        return capacity_permutation(routing.chosen, valid, num_experts, capacity)

    def _report(
        self, routing: Routing, permutation: TokenPermutation | None, valid: Tensor, layer: int
    ) -> RouterStats:
        config = self.config
        dropped = routing.load.new_zeros(())
        if permutation is not None and permutation.kept is not None:
            routed = valid.sum().clamp(min=1) * config.experts_per_token
            dropped = 1 - permutation.kept.sum() / routed
        side = config.router_aux_loss_coef * routing.aux_loss + config.router_z_loss_coef * routing.z_loss
        return RouterStats(
            layer, routing.load, routing.aux_loss.detach(), routing.z_loss.detach(), dropped, side
        )


def _divide(weight: Tensor, parts: int) -> tuple[Tensor, ...]:
    """E … -> equal parts of the experts; the whole as it is, since a view would copy its gradient."""
    return (weight,) if parts == 1 else weight.chunk(parts)
