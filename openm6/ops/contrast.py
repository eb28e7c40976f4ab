"""InfoNCE: how surprising it is that a query belongs to its own partner among all of a gallery."""

# Letters: Q queries, G gallery, E size of an embedding

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def contrast_nats(
    query: Tensor, gallery: Tensor, same: Tensor, partner: Tensor, scale: Tensor | float
) -> Tensor:
    """−log softmax of each query's partner among the gallery (arXiv 2103.00020, figure 3).  # Q E, G E -> Q

    query, gallery: unit vectors
    same:    Q G bool, what says the same as the query or is not to be compared with it; left out but for the partner
    partner: Q, the row of the gallery that belongs to the query
    """
    scores = scale * (query @ gallery.t())  # Q G
    alike = same.scatter(1, partner[:, None], False)  # a record's twin is no wrong answer
    return F.cross_entropy(scores.masked_fill(alike, float("-inf")), partner, reduction="none")
