"""The whole model: adapters embed every kind of token for one backbone and compute losses of its hidden states."""

# Dimensions: R rows, S tokens a row, N = R*S, D width, n tokens of one kind, m of them learned

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from openm6.core.errors import ConfigError, nearest
from openm6.modalities.batch import Batch, TokenGroup
from openm6.modalities.interface import Adapter, modality_of
from openm6.modalities.pool import POOL, PoolAdapter, PoolConfig
from openm6.modalities.registry import Modalities
from openm6.modalities.text import TextAdapter
from openm6.models.backbone import Backbone, Refill
from openm6.models.config import BackboneConfig, count_parameters, modality_parameters
from openm6.nn.cache import TokenCache
from openm6.nn.moe import Router, RouterStats
from openm6.ops.matmul import autocast_dtype
from openm6.ops.sequence import SequenceMeta


@dataclass(frozen=True)
class TokenLosses:
    """Losses of learned tokens of a kind: nll, example and weight m each; total is Σ weight · nll, for training."""

    total: Tensor
    nll: Tensor
    example: Tensor
    weight: Tensor


class Omni(nn.Module):
    """Text, images, audio and numbers in; a loss, or hidden states to decode from, out."""

    def __init__(
        self, config: BackboneConfig, modalities: Modalities, embedding: PoolConfig | None = None,
        meta_matrices: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        self.backbone = Backbone(config, meta_matrices)
        adapters: dict[str, Adapter] = {}
        for modality in modalities.values():
            adapters |= modality.adapters(config.hidden_size)
        if embedding is not None:
            adapters[POOL] = PoolAdapter(config.hidden_size, embedding)
        self.adapters = nn.ModuleDict(adapters)
        names = list(dict.fromkeys([*map(modality_of, adapters), *adapters]))
        chosen = [name for experts in config.modality_experts for name in experts.modalities]
        if wrong := [name for name in chosen if name not in names]:
            raise ConfigError(f"modality_experts.modalities names {wrong[0]!r}; {nearest(wrong[0], names)}")
        if "text" in chosen:
            raise ConfigError(
                "modality_experts are not for text, whose tokens are decoded without them: take text out of modalities"
            )
        if twice := [kind for kind in adapters if len(self.modality_experts_of(kind)) > 1]:
            raise ConfigError(f"two of modality_experts are for the tokens {twice[0]}: leave one out")

    def round_weights(self) -> None:
        """Round all weights to bf16 but the small balance bias of routers: rounded, it would choose other experts."""
        biases = [(module, module.bias) for module in self.modules() if isinstance(module, Router)]
        self.to(torch.bfloat16)
        for router, bias in biases:
            router.bias = bias

    def adapter(self, kind: str) -> Adapter:
        return cast(Adapter, self.adapters[kind])

    @property
    def text(self) -> TextAdapter:
        """The adapter that holds the words."""
        return cast(TextAdapter, self.adapters["text"])

    @property
    def pool(self) -> PoolAdapter | None:
        """The adapter that makes embeddings; None if the model was not trained to."""
        return cast(PoolAdapter, self.adapters[POOL]) if POOL in self.adapters else None

    @property
    def device(self) -> torch.device:
        return self.text.embedding.weight.device

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token meets at most: the backbone's active ones and all adapters."""
        adapters = sum(parameter.numel() for parameter in self.adapters.parameters())
        adapters += sum(one.numel() for name, one in self.backbone.named_parameters() if ".lora." in name)
        met = [modality_parameters(self.config, one).active for one in self.config.modality_experts]
        backbone = count_parameters(self.config)
        return backbone.total + adapters, backbone.active + adapters + self.config.num_layers * max(met, default=0)

    def delink(self, refill: Refill | None = None) -> dict[str, str]:
        """Goes from the pseudo stage to the real one; see `Backbone.delink`. New parameter name -> old one."""
        names = self.backbone.delink(refill)
        self.config = self.backbone.config
        return {f"backbone.{new}": f"backbone.{old}" for new, old in names.items()}

    def unwrapped(self) -> "Omni":
        """The same parts in a new root, which nobody has wrapped."""
        fresh = Omni.__new__(Omni)
        nn.Module.__init__(fresh)
        fresh.config, fresh.backbone, fresh.adapters = self.config, self.backbone, self.adapters
        fresh.training = self.training
        return fresh

    def embed(self, groups: dict[str, TokenGroup], rows: int, length: int) -> Tensor:
        """All tokens of a batch at their positions; padding is zero.  # -> R S D"""
        if not groups:
            weight = self.text.embedding.weight
            return weight.new_zeros(rows, length, self.config.hidden_size, dtype=autocast_dtype(weight))
        vectors = []
        for name, group in groups.items():
            vector = self.adapter(name).embed(group.arrays)  # n D
            if "name_ids" in group.arrays:  # a token that has a name carries the mean of its words
                vector = vector + self.text.name_vectors(group.arrays["name_ids"])
            vectors.append(vector.to(autocast_dtype(vector)))
        index, joined = torch.cat([group.index for group in groups.values()]), torch.cat(vectors)
        empty = joined.new_zeros(rows * length, self.config.hidden_size)
        return empty.index_copy(0, index, joined).view(rows, length, -1)

    def forward(
        self, groups: dict[str, TokenGroup], meta: SequenceMeta, cache: TokenCache | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """Hidden states after the final norm, and what each sparse layer routed.  # -> R S D"""
        found: list[list[Tensor]] = [[] for _ in self.config.modality_experts]
        for kind, group in groups.items():
            for number in self.modality_experts_of(kind):
                found[number].append(group.index)
        others = [torch.cat(indices) if indices else None for indices in found] if any(found) else []
        return self.backbone(self.embed(groups, meta.batch, meta.length), meta, cache, others)

    def modality_experts_of(self, kind: str) -> list[int]:
        """The modality experts that tokens of a kind pass, by number: one or none."""
        names = {kind, modality_of(kind)}
        return [number for number, one in enumerate(self.config.modality_experts) if names & {*one.modalities}]

    def compute_loss(self, batch: Batch, as_trained: bool = False) -> tuple[dict[str, TokenLosses], list[RouterStats]]:
        """Losses of learned tokens by kind (of training, also `as_trained`, else the nll), and what layers routed."""
        hidden, loads = self(batch.groups, batch.meta)
        flat = hidden.flatten(0, 1)  # R S D -> N D
        losses = {}
        for name, group in batch.groups.items():
            chosen = group.learned  # m
            if len(chosen):
                arrays = {key: array[chosen] for key, array in group.arrays.items()}
                adapter = self.adapter(name)
                rows, weight = flat[group.index[chosen]], group.weight[chosen]  # m D, m
                if self.training or as_trained:
                    total, nll = adapter.weighted_loss(rows, arrays, weight)
                else:
                    nll = adapter.nll(rows, arrays).float()
                    total = (nll * weight).sum()
                losses[name] = TokenLosses(total, nll, group.example[chosen], weight)
        return losses, loads
