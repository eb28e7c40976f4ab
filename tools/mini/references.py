"""Reference models: characters by an n-gram model, series by their last season, prices by boosted trees."""

# Letters: H steps ahead, Q quantiles, N records

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from openm6.data.records import Record

ORDER = 5
START = "\n"


class CharacterModel:
    """An n-gram model of characters with interpolated Kneser-Ney smoothing, one discount per order."""

    def __init__(self, texts: Iterable[str], order: int = ORDER) -> None:
        self.order = order
        # By order, of contexts of that many characters: how often a text and a context occur, and in how many kinds.
        self.counts: list[Counter[str]] = [Counter() for _ in range(order)]
        for text in texts:
            padded = START * (order - 1) + text
            self.counts[-1].update(padded[at : at + order] for at in range(len(text)))
        # Below the highest order counts the number of characters before a text, not how often it occurs.
        for size in range(order - 1, 0, -1):
            self.counts[size - 1] = Counter(text[1:] for text in self.counts[size])
        self.totals: list[Counter[str]] = [Counter() for _ in range(order)]
        self.kinds: list[Counter[str]] = [Counter() for _ in range(order)]
        for counts, totals, kinds in zip(self.counts, self.totals, self.kinds, strict=True):
            for text, count in counts.items():
                totals[text[:-1]] += count
                kinds[text[:-1]] += 1
        self.discounts = [_discount(counts) for counts in self.counts]
        self.characters = len(self.counts[0]) + 1  # and one for all others

    def probability(self, character: str, before: str) -> float:
        """Return the probability of a character after a text."""
        before = START * (self.order - 1) + before
        found = 1 / self.characters
        for size in range(self.order):
            context = before[len(before) - size :]
            total = self.totals[size][context]
            if not total:
                break
            discount = self.discounts[size]
            own = max(self.counts[size][context + character] - discount, 0.0)
            found = (own + discount * self.kinds[size][context] * found) / total
        return found

    def bits(self, text: str, before: str) -> float:
        """Return -log2 of the probability of a text after another one."""
        return -sum(math.log2(self.probability(one, before + text[:at])) for at, one in enumerate(text))


def _discount(counts: Counter[str]) -> float:
    """The discount of Ney, Essen and Kneser (1994) by the numbers of texts that occur once and twice."""
    once, twice = (sum(count == times for count in counts.values()) for times in (1, 2))
    return once / (once + 2 * twice) if once else 0.5


def seasonal_naive(past: np.ndarray, steps: int, season: int, levels: Sequence[float]) -> np.ndarray:
    """Return quantiles of the next steps: the last season again, and the errors that this has made so far.  # H Q

    A series shorter than a season repeats its last value.
    """
    season = season if len(past) > season * (1 + (steps - 1) // season) else 1
    found = np.empty((steps, len(levels)))
    for step in range(steps):
        lag = min(season * (step // season + 1), len(past))
        errors = past[lag:] - past[: len(past) - lag] if len(past) > lag else np.zeros(1)
        found[step] = past[min(len(past) + step - lag, len(past) - 1)] + np.quantile(errors, levels)
    return found


def boosted_values(train: Sequence[Record], test: Sequence[Record], column: str) -> np.ndarray:
    """Return a number column of the test records by boosted trees over all other numbers and categories.  # N"""
    numbers = sorted({name for record in train for name in record["numbers"]} - {column})
    words = {
        name: {word: code for code, word in enumerate(sorted({record["categories"][name] for record in train}))}
        for name in sorted(train[0].get("categories") or {})
    }

    def rows(records: Sequence[Record]) -> np.ndarray:
        cells = [[record["numbers"].get(name) for name in numbers] for record in records]
        codes = [[words[name].get(record["categories"][name], -1) for name in words] for record in records]
        return np.concatenate([np.array(cells, float), np.array(codes, float).reshape(len(records), -1)], axis=1)

    model = HistGradientBoostingRegressor(
        categorical_features=list(range(len(numbers), len(numbers) + len(words))), random_state=0
    )
    return model.fit(rows(train), [record["numbers"][column] for record in train]).predict(rows(test))
