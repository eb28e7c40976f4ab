"""Keys and values of tokens already read, with the layout that says who may see them."""

# Letters: L layers, B rows, C capacity, S new tokens, T tokens so far, G key-value heads, d size of a head

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from openm6.base.errors import ConfigError
from openm6.ops.sequence import SequenceMeta, padding_meta


class TokenCache(Protocol):
    """What a forward pass asks of a cache, whatever its shape."""

    def extend(self, layout: SequenceMeta) -> SequenceMeta:
        """Takes in the layout of the new tokens and gives that of all keys; called once before the layers `write`."""
        ...

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in the new tokens' keys and values of a layer and gives all: B S G d -> B T G d."""
        ...


class KVCache:
    """Room for `capacity` tokens a row in each layer, filled from the left; for inference, gradients stop here.

    Rows with prompts of several lengths are filled up with padding (example_id -1), which no other token sees. Tokens
    that were run only to be judged (a masked-parallel target) are taken back by `truncate`.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, batch, capacity, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        empty = padding_meta(batch, capacity, device)
        self.layout = SequenceMeta(
            empty.example_id,
            empty.attn_order.clone(),
            empty.block_id.clone(),
            torch.zeros(batch, capacity, 3, device=device),
        )
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def extend(self, layout: SequenceMeta) -> SequenceMeta:
        """Takes in the layout of S new tokens and gives that of all T; call it once before the layers `write`.

        Raises:
            ConfigError: more tokens than the cache has room for.
        """
        end = self.length + layout.length
        if end > self.capacity:
            raise ConfigError(f"{end} tokens do not fit a cache of {self.capacity}: make the cache larger")
        for store, new in zip(self.layout.parts(), layout.parts(), strict=True):
            store[:, self.length : end] = new
        self.length = end
        return self.layout.narrow(0, end)

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the newest S tokens of a layer and gives all T: B S G d -> B T G d, as views of the store."""
        start = self.length - key.shape[1]
        self.keys[layer, :, start : self.length] = key.detach()
        self.values[layer, :, start : self.length] = value.detach()
        return self.keys[layer, :, : self.length], self.values[layer, :, : self.length]

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on.

        Raises:
            ValueError: a length that was never reached.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot go back to {length} tokens: the cache holds {self.length}")
        self.length = length
