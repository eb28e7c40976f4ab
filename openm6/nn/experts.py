"""The sparse feed-forward part: a router, many small networks, and what the router reports."""

# Letters: B rows, S tokens of a row, N = B·S, D width, F hidden, P first product, E experts, K choices, R rows sent

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openm6.nn.config import DenseConfig, ExpertsConfig
from openm6.nn.exchange import ExpertExchange, LocalExchange
from openm6.nn.feedforward import FeedForward, activate, first_width
from openm6.nn.initial import fill_normal
from openm6.ops.expert_loop import sparse_network_by_expert
from openm6.ops.grouped import cast_alike, grouped_product
from openm6.ops.product import ROWS
from openm6.ops.routing import (
    RowPlan,
    balance_loss,
    balanced_bias,
    capacity_of,
    choose_prototypes,
    choose_top_k,
    combine_rows,
    expert_load,
    plan_capacity,
    plan_dropless,
    send_rows,
    variation,
    z_loss,
)
from openm6.ops.sparse_network import sparse_network


@dataclass(frozen=True)
class RouterLoad:
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
    def variation(self) -> Tensor:
        """c_v = σ/μ of the load."""
        return variation(self.load)


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

    def forward(self, x: Tensor, valid: Tensor, exchange: ExpertExchange | None = None) -> Routing:
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
                    logits, self.bias, config.choices, config.normalise_gates
                )
            load = expert_load(chosen, valid, config.num_experts)
            none = logits.new_zeros(())
            aux = none
            if config.balance == "aux":
                aux = balance_loss(probability, exchange.total(load) if exchange else load, valid)
            z = z_loss(logits, valid, config.num_prototypes or 1) if config.z_weight else none
        return Routing(gate, chosen, load, aux, z)

    def update_balance(self, load: Tensor) -> None:
        """Moves the bias a step towards balance; `load` is summed over layers, micro-batches and ranks first."""
        if self.bias is not None:
            self.bias.copy_(balanced_bias(self.bias, load.to(self.bias.device), self.config.balance_rate))


class Experts(nn.Module):
    """Sends each token through its K of E small networks and sums the answers by their gates."""

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden = config.num_experts, config.hidden
        self.up = nn.Parameter(torch.empty(experts, width, first_width(hidden, config.ffn)))  # E D P
        self.down = nn.Parameter(torch.empty(experts, hidden, width))  # E F D
        shared = DenseConfig(hidden=hidden * config.num_shared, ffn=config.ffn) if config.num_shared else None
        self.shared = FeedForward(width, shared) if shared else None

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        fill_normal(self.up, deviation)
        fill_normal(self.down, output_deviation)
        if self.shared is not None:
            self.shared.reset_parameters(deviation, output_deviation)

    def forward(
        self, x: Tensor, router: Router, valid: Tensor, exchange: ExpertExchange, layer: int
    ) -> tuple[Tensor, RouterLoad]:
        """B S D, B S bool -> B S D and the report of the router."""
        flat = x.flatten(0, 1)  # N D
        routing = router(flat, valid.flatten(), exchange)
        if self.config.capacity is None and runs_at_once(flat, self.config, exchange):
            y = self._at_once(flat, routing).view_as(x)
            y = y if self.shared is None else y + self.shared(x)
            return y, self._report(routing, None, valid, layer)
        plan = self._plan(routing, valid.flatten())
        parcels = exchange.dispatch(send_rows(flat, plan), plan.counts, self._capacity(len(flat)))
        shared = self.shared(x) if self.shared is not None else None  # while the rows travel
        ups, downs = (_divide(weight, len(parcels)) for weight in (self.up, self.down))
        for parcel, up, down in zip(parcels, ups, downs, strict=True):
            hidden = activate(
                grouped_product(parcel.rows(), up, parcel.counts), self.config.ffn
            )  # R D -> R F
            exchange.reply(parcel, grouped_product(hidden, down, parcel.counts))  # R F -> R D
        y = combine_rows(exchange.collect(parcels), routing.gate, plan).view_as(x)
        return y if shared is None else y + shared, self._report(routing, plan, valid, layer)

    def _at_once(self, flat: Tensor, routing: Routing) -> Tensor:
        """There and back as one step with a hand-written adjoint: N D -> N D."""
        if by_expert(flat):
            return sparse_network_by_expert(flat, routing.gate, routing.chosen, self.up, self.down)
        rows, up = cast_alike(flat, self.up)
        return sparse_network(rows, routing.gate, routing.chosen, up, cast_alike(rows, self.down)[1])

    def _capacity(self, num_tokens: int) -> int | None:
        """Rows that each expert takes of so many tokens; None where nothing is dropped."""
        config = self.config
        if config.capacity is None:
            return None
        return capacity_of(num_tokens, config.choices, config.num_experts, config.capacity)

    def _plan(self, routing: Routing, valid: Tensor) -> RowPlan:
        capacity, num_experts = self._capacity(len(valid)), self.config.num_experts
        if capacity is None:
            return plan_dropless(routing.chosen, num_experts)
        return plan_capacity(routing.chosen, valid, num_experts, capacity)

    def _report(self, routing: Routing, plan: RowPlan | None, valid: Tensor, layer: int) -> RouterLoad:
        config = self.config
        dropped = routing.load.new_zeros(())
        if plan is not None and plan.kept is not None:
            wanted = valid.sum().clamp(min=1) * config.choices
            dropped = 1 - plan.kept.sum() / wanted
        side = config.aux_weight * routing.aux_loss + config.z_weight * routing.z_loss
        return RouterLoad(
            layer, routing.load, routing.aux_loss.detach(), routing.z_loss.detach(), dropped, side
        )


def by_expert(x: Tensor) -> bool:
    """Whether the one step takes an expert at a time: on a processor, where a product of few rows is no slower."""
    return x.is_cpu


def runs_at_once(x: Tensor, config: ExpertsConfig, exchange: ExpertExchange) -> bool:
    """Whether the layer is one step here: SwiGLU experts that all live on this device and drop nothing.

    On a GPU in bf16; on a processor in fp32, and where rows are so many that filling them up costs little.
    """
    if config.ffn != "swiglu" or type(exchange) is not LocalExchange:
        return False
    if x.is_cpu:
        many = len(x) * config.choices >= 2 * ROWS * config.num_experts
        plain = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        return many and plain and not torch.compiler.is_compiling()
    half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
    return x.is_cuda and (half or x.dtype == torch.bfloat16)


def _divide(weight: Tensor, parts: int) -> tuple[Tensor, ...]:
    """E … -> equal parts of the experts; the whole as it is, since a view would copy its gradient."""
    return (weight,) if parts == 1 else weight.chunk(parts)
