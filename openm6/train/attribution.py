"""Which modality and which task a step's work was for, so that its joules can be charged to them."""

# Letters: n tokens of one kind, E examples

from __future__ import annotations

import numpy as np
from torch import nn

from openm6.base.energy.ledger import Share
from openm6.modalities.batch import Batch
from openm6.modalities.text import TextAdapter
from openm6.models.config import count_parameters
from openm6.models.omni import Omni

PASSES = 6  # operations for each weight a token meets: multiply and add, forward once and backward twice


class Attribution:
    """Operations of each kind of token: active weights of the backbone, and those of its adapter where they work.

    A text token that is only read costs its adapter nothing, since an embedding is looked up, not multiplied.
    Attention between tokens is left out: it is shared by all kinds alike.
    """

    def __init__(self, model: Omni) -> None:
        self._backbone = PASSES * count_parameters(model.config).active
        self._read = {name: PASSES * _multiplied(adapter) for name, adapter in model.adapters.items()}
        self._learned = dict(self._read)
        for name, adapter in model.adapters.items():
            if isinstance(adapter, TextAdapter):  # the embedding is the output layer as well
                self._learned[name] += PASSES * adapter.embedding.weight.numel()

    def shares(self, batch: Batch) -> dict[str, dict[str, Share]]:
        """The batch's work by modality and by task; call it while the batch is still on the processor."""
        modalities: dict[str, Share] = {}
        tokens, operations = np.zeros(batch.num_examples), np.zeros(batch.num_examples)  # E
        for name, kind in batch.kinds.items():
            learned = kind.weight.numpy() > 0  # n
            cost = self._backbone + np.where(learned, self._learned[name], self._read[name])
            example = kind.example.numpy()
            tokens += np.bincount(example, minlength=batch.num_examples)
            operations += np.bincount(example, weights=cost, minlength=batch.num_examples)
            modalities[name] = Share(len(learned), float(cost.sum()))
        tasks: dict[str, Share] = {}
        for task, count, spent in zip(batch.tasks, tokens, operations, strict=True):
            before = tasks.get(task, Share(0, 0.0))
            tasks[task] = Share(before.tokens + int(count), before.operations + float(spent))
        return {"modality": modalities, "task": tasks}


def _multiplied(adapter: nn.Module) -> int:
    """Weights of an adapter that are multiplied, not looked up."""
    looked_up = {id(module.weight) for module in adapter.modules() if isinstance(module, nn.Embedding)}
    return sum(weight.numel() for weight in adapter.parameters() if id(weight) not in looked_up)
