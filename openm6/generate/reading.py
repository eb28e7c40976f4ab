"""Prompts into slots: one at a time, so that what a prompt becomes never depends on others, and remembered whole."""

# Letters: L layers, T tokens, G key-value heads, d size of a head

from __future__ import annotations

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from openm6.generate.prompt import Prompt
from openm6.modalities.sequence import collate, lay_out
from openm6.models.omni import Omni
from openm6.nn.slots import SlotCache


class PromptMemory:
    """Keys and values of the prompts read last, up to a number of bytes, for those who ask the same thing again.

    All tokens of a prompt see one another, so nothing less than the whole prompt can be used again.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def get(self, key: bytes) -> tuple[Tensor, Tensor] | None:
        """Keys and values under `key`, or None."""
        if key in self.kept:
            self.kept.move_to_end(key)
        return self.kept.get(key)

    def put(self, key: bytes, found: tuple[Tensor, Tensor]) -> None:
        """Keeps them, and forgets what was not used for longest."""
        size = sum(part.nbytes for part in found)
        if key in self.kept or size > self.max_bytes:
            return
        self.kept[key] = found
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self.kept.popitem(last=False)
            self.bytes -= sum(part.nbytes for part in old)


def prompt_key(prompt: Prompt) -> bytes:
    """A digest of everything that a prompt's tokens hold: kinds, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for piece in prompt:
        digest.update(f"{piece.kind} {piece.span} {piece.placement} {piece.moves} {len(piece)}".encode())
        for name, array in sorted([*piece.arrays.items(), ("grid", piece.grid)]):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.digest()


@torch.inference_mode()
def read_into(
    omni: Omni, prompt: Prompt, cache: SlotCache, slot: int, memory: PromptMemory | None = None
) -> tuple[int, bool]:
    """Reads a prompt (not empty) into a slot; gives the next position, and whether the memory spared the reading."""
    span = sum(piece.span for piece in prompt)
    key = prompt_key(prompt) if memory is not None and memory.max_bytes else None
    known = memory.get(key) if memory is not None and key is not None else None
    if known is not None:
        cache.put(slot, known)
        return span, True
    sequence = lay_out(prompt)
    batch = collate([[sequence]], len(sequence)).to(omni.device)
    omni(batch.kinds, batch.layout, cache.writer(slot))
    if memory is not None and key is not None:
        memory.put(key, cache.take(slot))
    return span, False
