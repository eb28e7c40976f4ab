"""Simple predictors of the columns of a source from what a record holds: linear models, trees, convolutions.

train/simple_predictors.py fits those of numbers to all rows and without each fold, so that a training example sees
models that have not seen its row, and those of labels, which have no part in training. Here they are read and applied.
"""

# Letters: R rows, C number columns, E columns of words and images, Q categories, F features, K folds, M predictions,
# T trees, N nodes, V vocabulary, L labels, B images, S side of an image

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from openm6.core.errors import CheckpointError, DataError
from openm6.core.lru_cache import LRUCache
from openm6.core.seeds import content_key, text_hash
from openm6.modalities.histogram import MOST
from openm6.modalities.image import LEVELS as VALUES
from openm6.modalities.image import read_image, to_square
from openm6.modalities.interface import Arrays, Part
from openm6.modalities.text import cuttable_in

FOLDS = 5
PREDICTIONS = 4  # M: a blend of the others; ridge on features, and on their products, too; trees
FARTHEST = 10.0  # in scales of its column: a value beyond counts as this far
MAX_PRODUCTS = 16  # columns of a table whose products are features
CACHE_BYTES = 2**25
_TABLES = "tables"
TEXT, IMAGE = "\0text", "\0image"  # in what is given: all texts but categories, and an image
RAW = "\0raw"  # the image itself, in rows of which IMAGE is its features
MAX_LETTERS, TEXT_WORDS = 8_000, 128  # of the texts of a row that are read; words of the vocabulary that are columns
SIDE, CELLS, TURNS, LEVELS = 32, 4, 8, 4  # of images: pixels and cells of a side, directions, levels of a colour
IMAGE_FEATURES = CELLS**2 * TURNS + LEVELS**3
# What labels are predicted from; trees take all of it but pixels, which a convolutional network reads if there is one.
EXPERTS = ("columns", "text", "image", "trees", "pixels")
# Of the weights of labels: the most, and how strongly they are drawn to likely ones.
MAX_WEIGHT, PRIOR_ROWS = 3.0, 10.0
LEAST = math.log(1e-4)  # of the logarithm of a probability
_WORD = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")
_CELL = np.add.outer(np.arange(SIDE) * CELLS // SIDE * CELLS, np.arange(SIDE) * CELLS // SIDE) * TURNS

Words = Mapping[str, Sequence[str]]  # of each category
Given = Mapping[str, Any]  # by column: numbers and categories; besides TEXT, and IMAGE or its features


class Prediction(NamedTuple):
    """What the predictors make of a column: values u that stand for loc + scale · u or, with `log`, exp of it.

    `most` bounds a predicted distribution of logarithms, as exp has no bound: that of ten times the largest value seen.
    `change` is the typical error of the first value, `uncertainty` the logarithm of how much larger it is than with
    all columns given, and `fraction` how many of them are given.
    """

    values: np.ndarray  # M
    change: float
    units: tuple[float, float, bool, float]  # loc, scale, log, most
    uncertainty: float = 0.0
    fraction: float = 0.0


def fold_of(record: Mapping[str, Any]) -> int:
    """Return the fold of a record by its values, texts and images alone: equal records are in the same fold."""
    columns = [sorted((record.get(key) or {}).items()) for key in ("numbers", "categories")]
    texts = (record.get("text_en"), record.get("text_zh"), *(record.get("extra") or {}).values())
    image = content_key(record["image"]) if record.get("image") else None
    return text_hash(repr([*columns, *(x for x in (*texts, image) if isinstance(x, str | bytes))])) % FOLDS


def given_columns(parts: Iterable[Part]) -> dict[str, Any]:
    """Return what parts of a prompt show: mappings of numbers, texts with `columns`, other texts, and an image.

    Words of the prompt itself, which are never cut, are none of it.
    """
    found: dict[str, Any] = {}
    for part in parts:
        shown = part.raw if part.modality == "numbers" else part.options.get("columns")
        if isinstance(shown, Mapping):
            found.update(shown)
        elif part.modality == "text":
            for span in cuttable_in(part.raw, part.options):
                found[TEXT] = f"{found.get(TEXT, '')} {part.raw[span.start : span.stop]}"[:MAX_LETTERS]
        elif part.modality == "image":
            found[IMAGE] = part.raw
    return found


def words_in(text: str) -> list[str]:
    """Return each word, single Chinese character and pair of both once."""
    words = _WORD.findall(text.lower())
    return list(dict.fromkeys([*words, *map(" ".join, pairwise(words))]))


def image_features(raw: Any) -> np.ndarray:
    """Directions of slopes in each cell and frequencies of colours, as square roots of fractions.  # -> F"""
    image = read_image(raw, target_pixels=SIDE**2).resize((SIDE, SIDE), PIL.Image.Resampling.BOX)
    pixels = np.asarray(image)
    down, across = np.gradient(pixels.mean(-1) / 255)
    turn = np.arctan2(down, across) % np.pi / np.pi * TURNS
    first = np.floor(turn).astype(int)
    slopes = np.zeros(CELLS**2 * TURNS)
    for shift, part in ((0, 1 + first - turn), (1, turn - first)):
        index = _CELL + (first + shift) % TURNS
        slopes += np.bincount(index.ravel(), (np.hypot(down, across) * part).ravel(), len(slopes))
    colours = pixels.astype(int) * LEVELS // 256 @ [LEVELS**2, LEVELS, 1]
    counts = np.bincount(colours.ravel(), minlength=LEVELS**3)
    return np.sqrt(np.concatenate([slopes / (slopes.sum() + 1e-3), counts / counts.sum()]))


def image_pixels(raw: Any, side: int) -> np.ndarray:
    """The image in a white square, as a convolutional network reads it.  # -> S S 3"""
    return np.asarray(to_square(read_image(raw, target_pixels=side**2), side))


def convolve(images: np.ndarray, layers: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """Means over images of what convolutions find in them, whose results are halved each time.  # B S S 3 -> B C"""
    x = torch.from_numpy(VALUES.take(images)).permute(0, 3, 1, 2)
    for layer in layers:
        x = F.relu(F.max_pool2d(layer(x), 2))
    return x.mean((2, 3))


class Network:
    """A convolutional network of one label: matrices of 3 x 3 convolutions and of a linear layer, biases last.

    arrays: by number of the layer, and `side` of the images.  # outputs, 9 · inputs + 1; L C+1; 1
    """

    def __init__(self, arrays: Arrays) -> None:
        self.side = int(arrays["side"].item())
        *matrices, self.head = (torch.tensor(arrays[str(number)]).float() for number in range(len(arrays) - 1))
        self.layers = [
            partial(F.conv2d, weight=one[:, :-1].reshape(len(one), -1, 3, 3), bias=one[:, -1], stride=2 - (number > 0),
                    padding=1) for number, one in enumerate(matrices)
        ]  # fmt: skip

    @torch.inference_mode()
    def predict(self, raw: Any) -> np.ndarray:
        """Logarithms of probabilities of an image.  # -> L"""
        found = convolve(image_pixels(raw, self.side)[None], self.layers)[0]
        return F.linear(found, self.head[:, :-1], self.head[:, -1]).log_softmax(0).numpy()


class Trees:
    """Boosted trees of one column, K times T of N nodes each; the outputs of a label take turns.

    A node sends a row to the `left` if its `feature` is at most `number`, or missing and `missing_left`. A leaf sends
    it to itself, and `number` is its value. `words` are the inputs that stand for the words of categories.
    # K T N, of baseline K outputs
    """

    def __init__(self, arrays: Arrays) -> None:
        folds, self.count, self.size = arrays["feature"].shape
        offset = np.arange(folds * self.count).reshape(folds, self.count, 1) * self.size
        self.left, self.right = ((arrays[name] + offset).ravel() for name in ("left", "right"))
        self.feature, self.number, self.missing_left = (
            arrays[name].ravel() for name in ("feature", "number", "missing_left")
        )
        self.baseline, self.words, self.depth = arrays["baseline"].reshape(folds, -1), arrays["words"], 0
        nodes = offset.ravel()
        while len(inner := nodes[self.left[nodes] != nodes]):
            nodes = np.concatenate([self.left[inner], self.right[inner]])
            self.depth += 1

    def predict(self, fold: int, inputs: np.ndarray) -> np.ndarray:
        """Sums over the trees of a fold, as scikit-learn's raw predictions.  # R F -> R outputs"""
        first = (fold * self.count + np.arange(self.count)) * self.size
        node, row = np.tile(first, (len(inputs), 1)), np.arange(len(inputs))[:, None]
        for _ in range(self.depth):
            seen = inputs[row, self.feature.take(node)]
            goes_left = (seen <= self.number.take(node)) | (np.isnan(seen) & self.missing_left.take(node))
            node = np.where(goes_left, self.left.take(node), self.right.take(node))
        own = self.number.take(node).astype(np.float32).reshape(len(inputs), -1, self.baseline.shape[1])
        return own.swapaxes(1, 2).sum(2) + self.baseline[fold]


class LabelPrediction(NamedTuple):
    """Log-probabilities of classes by each expert, zeros if nothing is given of it; `key` is that of its weights.

    `prior`: likely weights of the model and of the experts.
    """

    key: str
    classes: list[str]
    experts: np.ndarray  # M L
    prior: np.ndarray  # M+1

    def with_model(self, own: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Log-probabilities of some classes, those of the model before those of the experts.  # L -> M+1 L

        A class that is too rare for the experts is improbable to each of them that says anything.
        """
        index = {name: number for number, name in enumerate(self.classes)}
        experts = np.pad(self.experts, ((0, 0), (0, 1)))
        experts[self.experts.any(1), -1] = LEAST
        return np.stack([np.maximum(own, LEAST), *experts[:, [index.get(name, -1) for name in classes]]])


class Label(NamedTuple):
    """A category or a label that is predicted: its classes, and the columns that equal it and that it stands for."""

    classes: list[str]
    hidden: list[str]


class TablePredictors:
    """The predictors of the number columns and the labels of one source: one of `sources`, any if none are named.

    Features of linear models are numbers, logarithms of those that are positive, words of categories, and products of
    two numbers. The most frequent words of texts, and components of images, are E more columns that are never missing
    one by one. arrays: `scale` (C+E 4), location and scale of each number and of its logarithm, NaN if it has none;
    `mean` (K+1 F) and `covariance` (K+1 F F) of the features without each fold, last with all rows; by column:
    `log`, whether its logarithm is predicted, `penalty` (C 2) of ridge, `weight` (C M-1) in the blend, `change` (0:
    no predictors) and the `range` (C 2) of predictions; `C/name` of its `Trees`; `idf` (V); `image`, the components of
    image features and, last, their mean; `label COLUMN EXPERT` (L F+1), a linear model, `label COLUMN trees/name`, and
    `label COLUMN pixels/name` of its `Network`, and `label COLUMN weights` of the experts without it.
    """

    def __init__(
        self, numbers: Sequence[str], categories: Words, arrays: Arrays, vocabulary: Sequence[str], labels: Any = None,
        sources: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.numbers, self.categories, self.arrays = list(numbers), categories, arrays
        self.codes = [{word: code for code, word in enumerate(words)} for words in categories.values()]
        self.vocabulary = {word: index for index, word in enumerate(vocabulary)}
        self.inputs = {*self.numbers, *categories, *[TEXT] * bool(vocabulary), *[IMAGE] * ("image" in arrays)}
        self.labels = {name: Label(*label) for name, label in (labels or {}).items()}
        self.sources = list(sources)
        predicted = (*range(len(self.numbers)), *(f"label {name} trees" for name in self.labels))
        self.trees: dict[int | str, Trees] = {x: Trees(own) for x in predicted if (own := _part(arrays, x))}
        self.networks = {name: Network(own) for name in self.labels if (own := _part(arrays, f"label {name} pixels"))}
        self._ridges = LRUCache[tuple[np.ndarray, ...]](CACHE_BYTES)
        self._images = LRUCache[np.ndarray](CACHE_BYTES)
        count, first = len(arrays["scale"]), len(self.numbers)
        self.logs = np.flatnonzero(np.isfinite(arrays["scale"][:, 2]))
        self.pairs = np.triu_indices(first if first <= MAX_PRODUCTS else 0)
        words = [count + index for index, words in enumerate(categories.values()) for _ in words]
        single = np.concatenate([np.arange(count), self.logs, np.asarray(words, int)]).astype(int)
        self.num_single = len(single)
        # The columns that each feature depends on, categories after numbers.  # F 2
        self.owners = np.concatenate([np.stack([single, single], 1), np.stack(self.pairs, 1)])

    def read(self, rows: Sequence[Given]) -> tuple[np.ndarray, np.ndarray]:
        """Numbers, NaN if missing, and codes of categories: -1 missing, -2 not among the words.  # R C, R Q"""
        values = [[_finite(row.get(name)) for name in self.numbers] for row in rows]
        named = list(zip(self.categories, self.codes, strict=True))
        codes = [[code.get(str(row[name]), -2) if row.get(name) else -1 for name, code in named] for row in rows]
        columns = [np.asarray(values, float).reshape(len(rows), -1)]
        if self.vocabulary:
            columns.append(np.stack([self.words(row)[:TEXT_WORDS] for row in rows]))
        if "image" in self.arrays:
            *basis, mean = self.arrays["image"]
            columns.append((np.stack([self.image(row) for row in rows]) - mean) @ np.stack(basis, 1))
        return np.concatenate(columns, 1), np.asarray(codes, int).reshape(len(rows), len(named))

    def words(self, row: Given) -> np.ndarray:
        """1 for each word of the vocabulary in the text that is given, else 0; NaN without a text."""
        found = np.full(len(self.vocabulary), 0.0 if TEXT in row else np.nan)
        found[[self.vocabulary[word] for word in words_in(row.get(TEXT, "")) if word in self.vocabulary]] = 1
        return found

    def image(self, row: Given) -> np.ndarray:
        """Features of the image that is given, NaN without one that can be read.  # -> F"""
        raw = row.get(IMAGE)
        if isinstance(raw, np.ndarray) and raw.ndim == 1:
            return raw
        key = content_key(raw) if isinstance(raw, bytes) else None
        with suppress(DataError):
            # Rows come back in every epoch, and decoding takes longest.
            return self._images.get_or_compute(key, lambda: image_features(raw))
        return np.full(IMAGE_FEATURES, np.nan)

    def features(self, values: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """NaN where a column is missing.  # R C, R Q -> R F"""
        known, (loc, scale, log_loc, log_scale) = values.copy(), self.arrays["scale"].T
        # Of a column of positive numbers, 0 mostly stands for none.
        known[:, self.logs] = np.where(values[:, self.logs] > 0, values[:, self.logs], np.nan)
        z = np.clip((known - loc) / scale, -FARTHEST, FARTHEST)
        logs = (np.log(known[:, self.logs]) - log_loc[self.logs]) / log_scale[self.logs]
        main = z.copy()
        main[:, self.logs] = logs = np.clip(logs, -FARTHEST, FARTHEST)
        words = [np.where(codes[:, [index]] == -1, np.nan, codes[:, [index]] == np.arange(len(words)))
                 for index, words in enumerate(self.categories.values())]  # fmt: skip
        first, second = self.pairs
        return np.concatenate([z, logs, *words, main[:, first] * main[:, second]], 1)

    def tree_inputs(self, index: int, means: np.ndarray, values: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Numbers but for the column, and for each category the mean of the column in rows of its word.  # -> R F"""
        inputs, start = [np.delete(values, index, 1)], 0
        for own, words in zip(codes.T, self.categories.values(), strict=True):
            inputs.append(np.where(own < 0, np.nan, means[start + np.maximum(own, 0)])[:, None])
            start += len(words)
        return np.concatenate(inputs, 1)

    def num_usable(self, column: str, given: Given) -> int:
        """How many of the columns given predict another one: none without predictors of it."""
        if column not in self.numbers or self.arrays["change"][self.numbers.index(column)] <= 0:
            return 0
        return len((self.inputs & given.keys()) - {column})

    def predict(self, column: str, given: Given, fold: int | None = None) -> Prediction:
        """The predictions of a column from others, by models that have not seen the rows of `fold`, if there is one."""
        index, weight = self.numbers.index(column), self.arrays["weight"][self.numbers.index(column)]
        values, codes = self.read([{name: value for name, value in given.items() if name != column}])
        features = self.features(values, codes)[0]
        # A published model has the moments of all rows alone.
        moments = -1 if fold is None or len(self.arrays["mean"]) == 1 else fold
        found, error = self.ridge(index, features, moments)
        found.append(float(np.mean(found)))
        if index in self.trees:
            trees = self.trees[index]
            inputs = {one: self.tree_inputs(index, trees.words[one], values, codes)
                      for one in (range(FOLDS) if fold is None else (fold,))}  # fmt: skip
            found[-1] = float(np.mean([trees.predict(one, x)[:, 0] for one, x in inputs.items()]))
        clipped = np.clip(found, *self.arrays["range"][index])
        with_all = self.ridge(index, np.zeros(len(features)), moments)[1]
        ratio = max(1.0, error / max(with_all, 1e-9))
        log = bool(self.arrays["log"][index])
        loc, scale = self.arrays["scale"][index, 2 * log : 2 * log + 2].tolist()
        low, high = self.arrays["range"][index].tolist()  # a margin of half the values' span on both sides
        most = loc + scale * (high - (high - low) / 4) + math.log(10) if log else MOST
        shown = np.isfinite(values).sum() + (codes != -1).sum()
        return Prediction(
            np.concatenate([[weight @ clipped], clipped]),
            float(self.arrays["change"][index] * ratio),
            (loc, scale, log, most),
            math.log(ratio),
            float(shown / max(1, values.size + codes.size - 1)),
        )

    def target(self, index: int, log: bool) -> int:
        """The feature that is a number, or its logarithm."""
        return len(self.arrays["scale"]) + int(np.searchsorted(self.logs, index)) if log else index

    def ridge(self, index: int, features: np.ndarray, fold: int) -> tuple[list[float], float]:
        """A column by both degrees, and the smaller of the errors that they expect.  # F ->"""
        usable = np.isfinite(features) & (self.owners != index).all(1)
        key = (index, fold, usable.tobytes())
        solved = self._ridges.get_or_compute(key, lambda: self._solve(index, fold, usable))
        mean, target = self.arrays["mean"][fold], self.target(index, bool(self.arrays["log"][index]))
        pairs = zip(solved[:2], solved[2:4], strict=True)
        found = [float(mean[target] + (features[chosen] - mean[chosen]) @ solution) for chosen, solution in pairs]
        return found, float(solved[4])

    def _solve(self, index: int, fold: int, usable: np.ndarray) -> tuple[np.ndarray, ...]:
        """The features of both degrees, their coefficients, and the smaller standard deviation of the error."""
        covariance, target = self.arrays["covariance"][fold], self.target(index, bool(self.arrays["log"][index]))
        features, solutions, left = [], [], []
        for degree in range(2):
            chosen = np.flatnonzero(usable[: len(usable) if degree else self.num_single])
            own, right = covariance[np.ix_(chosen, chosen)], covariance[chosen, target]
            penalty = np.diag(self.arrays["penalty"][index, degree] * own.diagonal() + 1e-12)
            features.append(chosen)
            solutions.append(np.linalg.solve(own + penalty, right))
            left.append(max(covariance[target, target] - right @ solutions[-1], 0.0))
        return (*features, *solutions, np.sqrt(min(left)))

    def label_inputs(self, label: Label, rows: Sequence[Given]) -> dict[str, np.ndarray]:
        """What each expert predicts a label from, NaN where nothing is given.  # -> R F"""
        shown = [{name: value for name, value in row.items() if name not in label.hidden} for row in rows]
        values, codes = self.read(shown)
        features = self.features(values, codes)[:, : self.num_single]
        owner, first = self.owners[: self.num_single, 0], len(self.numbers)
        text = np.stack([self.words(row) for row in shown]) * self.arrays["idf"]
        return {
            "columns": features[:, (owner < first) | (owner >= values.shape[1])],
            "text": text / np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-9),
            "image": np.stack([self.image(row) for row in shown]),
            "trees": np.concatenate([values, np.where(codes < 0, np.nan, codes)], 1),
        }

    def is_of(self, source: str | None) -> bool:
        """Whether the table may be that of a source: it is, or one of the two names none."""
        return not source or not self.sources or source in self.sources

    def labels_of(self, source: str | None) -> dict[str, Label]:
        """The labels by their columns if the table may be that of a source."""
        return self.labels if self.is_of(source) else {}

    def predict_label(self, column: str, given: Given, number: int = 1) -> LabelPrediction:
        """What each expert makes of a label; `number` is that of this source in the key of the weights."""
        label = self.labels[column]
        # Without a network, weights are those of four experts.
        found = np.zeros((len(EXPERTS) - (column not in self.networks), len(label.classes)))
        for expert, (name, x) in enumerate(self.label_inputs(label, [given]).items()):
            key = f"label {column} {name}"
            if np.isfinite(x).any() and (key in self.trees or key in self.arrays):
                linear = self.arrays.get(key)
                logits = self.trees[key].predict(0, x)[0] if linear is None else linear @ [*np.nan_to_num(x[0]), 1]
                logits = np.append(-logits, logits) / 2 if len(logits) == 1 else logits
                found[expert] = np.maximum(log_softmax(logits), LEAST)
        if column in self.networks and IMAGE in given:
            raw, network = given[IMAGE], self.networks[column]
            file = (column, content_key(raw)) if isinstance(raw, bytes) else None
            with suppress(DataError):
                scores = self._images.get_or_compute(file, lambda: network.predict(raw))
                found[-1] = np.maximum(scores, LEAST)
        known = "".join("1" if row.any() else "0" for row in found)
        prior = likely_weights(found, self.arrays.get(f"label {column} weights"))
        return LabelPrediction(f"label {number} {column} {known}", label.classes, found, prior)


def _part(arrays: Arrays, prefix: int | str) -> Arrays:
    """Arrays under `prefix/`, by the rest of their names."""
    start = f"{prefix}/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def _finite(cell: Any) -> float:
    """A number, also one that is written as text; NaN for all else."""
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of the last axis.  # … L -> … L"""
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def likely_weights(experts: np.ndarray, fitted: np.ndarray | None = None) -> np.ndarray:
    """Likely weights of the model and of experts, whose rows are zero where nothing is given.  # M L, -> M+1

    Equal parts, but of the experts that were `fitted` together, the network apart, in the proportion and with the sum
    of their weights: a sum below 1 makes up for too sure predictions. Of an image and nothing else, the network alone.
    """
    known = np.asarray(experts.any(1))
    if [name for name, row in zip(EXPERTS, known, strict=False) if row] == ["image", "pixels"]:
        return np.eye(len(known) + 1)[-1]
    weights = np.full(len(known) + 1, 1 / (1 + known.sum()))
    if fitted is not None and (total := fitted[known[: len(fitted)]].sum()) > 0:
        own = np.flatnonzero(known[: len(fitted)])
        weights[1 + own] = fitted[own] * fitted.sum() / total * len(own) / (1 + known.sum())
        # The model makes up for experts that turned out to be worth little.
        weights[0] = max(weights[0], 1 - weights[1:][known].sum())
    return weights


def fit_weights(experts: np.ndarray, truth: np.ndarray, likely: np.ndarray | None = None) -> np.ndarray:
    """Weights of log-probabilities with the lowest log loss, drawn to `likely` or equal ones.  # M R L, R -> M"""
    # scipy takes a second to import: only a training with labels needs it.
    from scipy.optimize import minimize  # noqa: PLC0415

    target = np.full(len(experts), 1 / max(1, experts.any((1, 2)).sum())) if likely is None else likely

    def loss(weights: np.ndarray) -> float:
        scores = log_softmax(np.einsum("m,mrl->rl", weights, experts))
        far = ((weights - target) ** 2).sum() * PRIOR_ROWS / len(truth)
        return float(far - scores[np.arange(len(truth)), truth].mean())

    return np.asarray(minimize(loss, target, bounds=[(0, MAX_WEIGHT)] * len(experts)).x)


def to_bytes(tables: Sequence[TablePredictors]) -> bytes:
    listed = [{"numbers": x.numbers, "categories": x.categories, "vocabulary": list(x.vocabulary), "labels": x.labels,
               "sources": x.sources} for x in tables]  # fmt: skip
    arrays = {f"{number}/{name}": np.ascontiguousarray(array)
              for number, one in enumerate(tables) for name, array in one.arrays.items()}  # fmt: skip
    return save(arrays, {_TABLES: json.dumps(listed, ensure_ascii=False)})


def from_bytes(content: bytes, where: str) -> list[TablePredictors]:
    """Tables of a safetensors file; CheckpointError if it is damaged."""
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        listed, arrays = json.loads(header["__metadata__"][_TABLES]), load(content)
        return [TablePredictors(**one, arrays=_part(arrays, number)) for number, one in enumerate(listed)]
    except (SafetensorError, ValueError, KeyError):
        raise CheckpointError(f"{where} is damaged, or from another version: use another checkpoint") from None
