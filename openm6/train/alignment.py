"""First values of the projections of encoders, so that a trained decoder reads their features from the first step.

Least squares from the features of an input to the mean embedding of the words of its answer. A decoder repeats words
that it reads, so it begins to name what is in an image before it is trained to.
"""

# Letters: n tokens of one kind, m learned tokens of text, E examples, H features of a projection, D width

import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from openm6.core.log import get_log
from openm6.modalities.batch import Batch
from openm6.modalities.codes import PatchAdapter
from openm6.modalities.text import Text
from openm6.models.omni import Omni

EXAMPLES = 4096  # more take longer to read than they are worth
RIDGE = 0.01  # of the mean variance of a feature


class LeastSquares:
    """Sums of a regression with an intercept, in double precision."""

    def __init__(self, features: int, outputs: int) -> None:
        self.count = 0
        self.x, self.y = torch.zeros(features, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
        self.xx = torch.zeros(features, features, dtype=torch.float64)
        self.xy = torch.zeros(features, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows of features n H and of outputs n D."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y

    def solve(self, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
        """Return weight D H and bias D."""
        mean_x, mean_y = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - mean_x.outer(mean_x)
        covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(covariance, self.xy / self.count - mean_x.outer(mean_y)).T
        return weight, mean_y - weight @ mean_x


@torch.no_grad()
def align(omni: Omni, text: Text, kinds: Sequence[str], batches: Iterable[Batch]) -> None:
    """Set the last layers of the projections `kinds` by `EXAMPLES` examples of `batches`, all on the CPU.

    One whose inputs no text answers in these, or fewer than it has features, keeps its values.
    """
    began, examples = time.monotonic(), 0
    adapters = {kind: one for kind in kinds if isinstance(one := omni.adapter(kind), PatchAdapter)}
    fits = {kind: LeastSquares(one.outer.in_features, one.outer.out_features) for kind, one in adapters.items()}
    for batch in batches:
        answers, has_words = _answers(omni, text, batch)
        for kind, adapter in adapters.items():
            if kind in batch.groups:
                group = batch.groups[kind]
                known = has_words[group.example]
                fits[kind].add(adapter.hidden(group.arrays)[known], answers[group.example[known]])
        examples += int(batch.num_examples)
        if examples >= EXAMPLES:
            break
    aligned = [kind for kind, fit in fits.items() if fit.count > len(fit.x)]
    for kind in aligned:
        for parameter, values in zip(adapters[kind].outer.parameters(), fits[kind].solve(), strict=True):
            parameter.copy_(values)
    if aligned:
        names, seconds = " and ".join(kind.removesuffix("_in") for kind in aligned), time.monotonic() - began
        get_log().info(f"projections of {names} fitted to words of answers by {examples:,} examples in {seconds:.0f} s")


def _answers(omni: Omni, text: Text, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean embedding of the words of each answer, and which examples are answered by words.  # E D, E"""
    embedding = omni.text.embedding.weight.float()
    sums, counts = embedding.new_zeros(len(batch.tasks), embedding.shape[1]), embedding.new_zeros(len(batch.tasks))
    if "text" in batch.groups:
        group = batch.groups["text"]
        labels, example = group.arrays["labels"][group.learned], group.example[group.learned]  # m, m
        words = ~torch.isin(labels, torch.tensor(sorted({text.end, *text.ends})))
        sums.index_add_(0, example[words], embedding[labels[words]])
        counts.index_add_(0, example[words], torch.ones(int(words.sum())))
    return sums / counts.clamp(min=1)[:, None], counts > 0
