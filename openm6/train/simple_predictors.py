"""Fitting the simple predictors of a source, see modalities/simple_predictors.py, before a training."""

# Letters: R rows, C number columns, F features, K folds, M predictions, L penalties, S side of an image

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from openm6.modalities.interface import Arrays
from openm6.modalities.series import fit_scale
from openm6.modalities.simple_predictors import (
    EXPERTS,
    FARTHEST,
    FOLDS,
    IMAGE,
    LEAST,
    PREDICTIONS,
    RAW,
    TEXT,
    TEXT_WORDS,
    Given,
    Label,
    Network,
    TablePredictors,
    Trees,
    fit_weights,
    words_in,
)
from openm6.tasks.slots import states
from openm6.train.image_network import NO_NETWORKS, NetworkPlan, fit_network

Labels = Sequence[Mapping[str, str]]  # of each row, by column
MAX_ROWS, MIN_ROWS = 8_000, 20  # of a table, and those with a value of the column
MAX_COLUMNS = 64
FEW_VALUES = 12  # of a column that only words and images predict
# Words of a category and of all categories that are features, and the rows each of them is in.
MAX_WORDS, MAX_ALL_WORDS, MIN_REPEATED = 16, 128, 2
MIN_POSITIVE = 0.99  # of the values of a column whose logarithm is a feature
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The typical error is at least this fraction of the scale of the column, and of the mean error.
MIN_CHANGE, TAIL = 1e-3, 0.3
REWEIGHTED = 8  # times, so that the blend has the least absolute error
LEAVES, DEPTH, LEARNING_RATE, STEPS, MIN_STEPS, MAX_TREE_ROWS = 16, 6, 0.1, 100, 40, 5_000
PRIOR_ROWS = 10  # of the mean of a word
# Measured on one core: seconds of a step of boosting, and of each of its inputs and rows.
STEP_SECONDS, CELL_SECONDS = 1.5e-3, 2e-8
KEPT_COLUMNS = (0.2, 1.0)  # in the copies of rows that trees are fitted to as well
MAX_VOCABULARY, IMAGE_COMPONENTS = 2048, 32  # words for labels
COUNTED_LETTERS = 2**22  # of texts in which words are counted, in a second and some 100 MB
# Labels: most classes, rows of each, rows that a column equals it in, and inverse penalties of the linear models.
MAX_CLASSES, MIN_CLASS_ROWS, SAME = 50, 2, 0.98
INVERSE_PENALTY = {"columns": 1.0, "text": 10.0, "image": 20.0}
PARTS = 3  # of the rows of a label, each predicted by models of the others, whose weights follow
# Of the time of a label, for each linear model, and measured on one core: seconds of an iteration per input and class.
LINEAR_FRACTION, LINEAR_SECONDS, ITERATIONS = 0.15, 4e-9, (30, 300)


def fit_table(
    rows: Sequence[Given], fold: np.ndarray, seconds: float, labels: Labels = (), inputs_only: Collection[str] = (),
    networks: NetworkPlan = NO_NETWORKS,
) -> TablePredictors | None:  # fmt: skip
    """Predictors of each number column, but `inputs_only`, and label from all else of a row, None if nothing has any.

    `fold` and `labels` are of each row. All take `seconds`, but networks of images those of their plan, by an estimate
    that the same rows always have.
    """
    table = _empty(rows, MAX_VOCABULARY if any(labels) else TEXT_WORDS)
    columns = sorted({column for row in labels for column in row}, key=lambda name: (name in table.categories, name))
    inputs = len(table.numbers) + len(table.categories) + bool(table.vocabulary) + ("image" in table.arrays)
    if inputs < 2 - bool(columns):
        return None
    values, codes = table.read(rows)
    # Columns of words and images, in units of their own.
    more = values[:, len(table.numbers) :]
    table.arrays["scale"][len(table.numbers) :, :2] = np.stack([np.nanmean(more, 0), np.nanstd(more, 0) + 1e-9], 1)
    targets = [index for index, name in enumerate(table.numbers) if name not in inputs_only]
    per_target = seconds / max(1, len(columns) + len(targets))
    network = networks._replace(seconds=networks.seconds / max(1, len(columns)))
    for column in columns:
        if not any(column in label.hidden for label in table.labels.values()):  # equal ones have the same
            _fit_label(table, column, rows, fold, labels, per_target, network)
    seconds = per_target * len(targets)
    seen = np.isfinite(values[:, : len(table.numbers)])
    # A number that is alone beside labels has no inputs. One of few values, beside words and images only, is
    # recognised as classes are: a histogram around a prediction would be wider than one at these values.
    alone = len(table.numbers) + len(table.categories) == 1
    fitted = [index for index in (targets if inputs > 1 else ())
              if seen[:, index].sum() >= MIN_ROWS and len(np.unique(fold[seen[:, index]])) > 1
              and not (alone and len(np.unique(values[seen[:, index], index])) <= FEW_VALUES)]  # fmt: skip
    features = table.features(values, codes)
    table.arrays |= _moments(features, fold) if fitted else {}
    found = {index: _fit_ridge(table, index, values[:, index], features, fold) for index in fitted}
    blended = {index: _blend(table, index, *found[index]) for index in fitted}
    cells = 2 * min(len(values), MAX_TREE_ROWS) * (values.shape[1] + codes.shape[1])
    step = FOLDS * (STEP_SECONDS + CELL_SECONDS * cells)
    steps = int(np.clip(seconds / (step * max(1, len(fitted))), MIN_STEPS, STEPS))
    # If there is no time for all columns, those that linear models predict worst have trees.
    worst = sorted(fitted, key=lambda index: -blended[index])[: int(seconds / (step * steps))]
    for index in sorted(worst):
        truth, predicted = found[index]
        own = _fit_trees(table, index, (values, codes), fold, truth, steps)
        _blend(table, index, truth, np.concatenate([predicted, own[:, None]], 1))
    return table if fitted or table.labels else None


def covers(table: TablePredictors, rows: Sequence[Given], labels: Labels) -> bool:
    """Whether a table has all inputs and classes of these rows, in which images are files."""
    found = _empty([{name: value for name, value in row.items() if name != IMAGE} for row in rows], TEXT_WORDS).inputs
    inputs = found | {IMAGE} if sum(IMAGE in row for row in rows) >= MIN_ROWS else found
    known = {name: label.classes for label in table.labels.values() for name in label.hidden}
    columns = {column for row in labels for column in row}
    return inputs <= table.inputs and all({*_classes(labels, name)} <= {*known.get(name, ())} for name in columns)


def _classes(labels: Labels, column: str) -> list[str]:
    """The classes of a label, none if they are too few or too many, or too rare."""
    counts = Counter(row[column] for row in labels if row.get(column))
    classes = sorted(word for word, count in counts.items() if count >= MIN_CLASS_ROWS)
    enough = sum(map(counts.__getitem__, classes)) >= max(MIN_ROWS, SAME * counts.total())
    return classes if enough and 2 <= len(classes) <= MAX_CLASSES else []


def _fit_label(
    table: TablePredictors, column: str, rows: Sequence[Given], fold: np.ndarray, labels: Labels, seconds: float,
    network: NetworkPlan,
) -> None:  # fmt: skip
    """Fit linear models, trees and a network of a label, unless it has too few or too many classes.

    Weights of all but the network follow from predictions for rows of other folds than those that were fitted.
    """
    if not (classes := _classes(labels, column)):
        return
    chosen = [index for index, named in enumerate(labels) if named.get(column) in classes]
    own = [(rows[index], labels[index]) for index in chosen]
    equal = Counter(name for row, named in own for name, word in {**row, **named}.items()
                    if isinstance(word, str) and word == named[column])  # fmt: skip
    label = Label(classes, sorted(name for name, count in equal.items() if count >= SAME * len(own) and name != TEXT))
    table.labels[column] = label
    # A text that states a category is not shown when it is asked for.
    shown = [{name: value for name, value in row.items()
              if name != TEXT or column not in row or not states(value, named[column])}
             for row, named in own]  # fmt: skip
    truth, rng = np.asarray([classes.index(named[column]) for _, named in own]), np.random.default_rng(0)
    part_of, found = fold[chosen] % PARTS, np.zeros((len(EXPERTS) - 1, len(truth), len(classes)))
    for number, (expert, x) in enumerate(table.label_inputs(label, shown).items()):
        key, seen = f"label {column} {expert}", np.flatnonzero(np.isfinite(x).any(1))
        if len(seen) < MIN_ROWS or len(np.unique(truth[seen])) < len(classes):
            continue
        if expert == "trees" and not (table.numbers or table.categories or table.vocabulary):
            continue
        usable = seen
        if expert == "trees":
            seen = np.sort(rng.choice(seen, min(len(seen), MAX_TREE_ROWS), replace=False))
        fit = _label_fit(expert, x[seen], len(classes), seconds / PARTS, rng)
        if fit is None:
            continue
        model = fit(x[seen], truth[seen])
        if expert == "trees":
            arrays = {**tree_arrays([model]), "words": np.zeros((1, 0))}
            table.trees[key] = Trees(arrays)
            table.arrays |= {f"{key}/{name}": array for name, array in arrays.items()}
        else:
            table.arrays[key] = np.ascontiguousarray(np.concatenate([model.coef_, model.intercept_[:, None]], 1))
        for part in range(PARTS):
            rest, others = usable[part_of[usable] == part], seen[part_of[seen] != part]
            if len(rest) and len(np.unique(truth[others])) == len(classes):
                inputs = x[rest] if expert == "trees" else np.nan_to_num(x[rest])
                scores = np.log(fit(x[others], truth[others]).predict_proba(inputs) + 1e-12)
                found[number, rest] = np.maximum(scores, LEAST)
    table.arrays[f"label {column} weights"] = fit_weights(found, truth) * found.any((1, 2))
    seen = np.flatnonzero([RAW in row for row in shown])
    if len(seen) >= MIN_ROWS and len(np.unique(truth[seen])) == len(classes):
        arrays = fit_network([shown[row][RAW] for row in seen], truth[seen], network)
        table.arrays |= {f"label {column} pixels/{name}": array for name, array in arrays.items()}
        table.networks |= {column: Network(arrays)} if arrays else {}


def _label_fit(
    expert: str, x: np.ndarray, classes: int, seconds: float, rng: np.random.Generator
) -> Callable[[np.ndarray, np.ndarray], Any] | None:
    """How a linear model or trees of a label are fitted to inputs and classes in this time; None if it is too short."""
    # scikit-learn and scipy take a second to import: only a training with labels needs them.
    from scipy.sparse import csr_array  # noqa: PLC0415
    from sklearn.ensemble import HistGradientBoostingClassifier  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    outputs = classes if classes > 2 else 1
    if expert == "trees":
        step = outputs * (STEP_SECONDS + CELL_SECONDS * 2 * len(x) * x.shape[1])
        steps = min(STEPS, int(seconds * (1 - 3 * LINEAR_FRACTION) / step))
        if steps < MIN_STEPS:
            return None
        return lambda inputs, truth: _boosted(HistGradientBoostingClassifier, inputs, truth, steps, rng)
    step = LINEAR_SECONDS * (1 + np.count_nonzero(np.nan_to_num(x))) * outputs / LINEAR_FRACTION
    model = partial(LogisticRegression, C=INVERSE_PENALTY[expert], max_iter=int(np.clip(seconds / step, *ITERATIONS)))

    def fit(inputs: np.ndarray, truth: np.ndarray) -> Any:
        inputs = np.nan_to_num(inputs)
        with warnings.catch_warnings(action="ignore"):  # that it has not converged when the time is over
            return model().fit(csr_array(inputs) if expert == "text" else inputs, truth)

    return fit


def _empty(rows: Sequence[Given], most_words: int) -> TablePredictors:
    """Number columns that are not constant, with their scales, categories and words of texts that occur again."""
    numbers: dict[str, list[float]] = {}
    words: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            if name in (TEXT, IMAGE, RAW):
                continue
            if isinstance(value, str):
                words.setdefault(name, Counter()).update([value] if value else [])
            elif value is not None and math.isfinite(value):
                numbers.setdefault(name, []).append(float(value))
    kept = [name for name, found in sorted(numbers.items()) if len(set(found)) > 1][:MAX_COLUMNS]
    scale = []
    for name in kept:
        seen = np.asarray(numbers[name])
        logs = np.log(seen[seen > 0])
        has_log = len(logs) >= MIN_POSITIVE * len(seen) and np.ptp(logs) > 0
        scale.append([*fit_scale(seen), *(fit_scale(logs) if has_log else (math.nan, math.nan))])
    several: dict[str, list[str]] = {}
    for name, found in sorted(words.items()):
        repeated = sorted(word for word, count in found.most_common(MAX_WORDS) if count >= MIN_REPEATED)
        if 1 < len(repeated) <= MAX_ALL_WORDS - sum(map(len, several.values())):
            several[name] = repeated
    count = len(kept)
    counted = rows[:: 1 + sum(len(row.get(TEXT, "")) for row in rows) // COUNTED_LETTERS]
    documents = Counter(word for row in counted for word in words_in(row.get(TEXT, "")))
    common = documents.most_common(2 * most_words)
    vocabulary = [word for word, number in common if 1 < number < len(counted)][:most_words]
    arrays: Arrays = {
        "idf": np.asarray([1 + math.log(len(counted) / documents[word]) for word in vocabulary]),
        "log": np.zeros(count, bool),
        "penalty": np.ones((count, 2)),
        "weight": np.zeros((count, PREDICTIONS - 1)),
        "change": np.zeros(count),
        "range": np.zeros((count, 2)),
    }
    if len(images := [row[IMAGE] for row in rows if IMAGE in row]) >= MIN_ROWS:
        mean = np.mean(images, 0)
        _, basis = np.linalg.eigh(np.cov(np.stack(images), rowvar=False))
        arrays["image"] = np.concatenate([basis.T[: -IMAGE_COMPONENTS - 1 : -1], mean[None]])
    size = min(len(vocabulary), TEXT_WORDS) + len(arrays.get("image", ["mean"])) - 1
    arrays["scale"] = np.asarray([*scale, *np.full((size, 4), np.nan)]).reshape(-1, 4)
    return TablePredictors(kept, several, arrays, vocabulary)


def _moments(features: np.ndarray, fold: np.ndarray) -> Arrays:
    """Means and covariances of the features without each fold, and of all rows; what is missing counts as the mean."""
    means, covariances = [], []
    for index in range(FOLDS + 1):
        rows = features[fold != index]
        seen = np.isfinite(rows)
        means.append(np.where(seen, rows, 0).sum(0) / np.maximum(1, seen.sum(0)))
        x = np.where(seen, rows - means[-1], 0)
        covariances.append(x.T @ x / max(1, len(x)))
    return {"mean": np.stack(means), "covariance": np.stack(covariances)}


def _fit_ridge(
    table: TablePredictors, index: int, values: np.ndarray, features: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Choose units and penalties of a column; return it in its units, and what ridge predicts out of fold.  # R, R 2"""
    arrays, has_log = table.arrays, index in table.logs
    targets = np.asarray([table.target(index, log) for log in ((False, True) if has_log else (False,))])
    truth = features[:, targets]  # R 1 or R 2
    predicted = np.empty((2, len(PENALTIES), *truth.shape))
    usable = (table.owners != index).all(1)
    for degree in range(2):
        chosen = np.flatnonzero(usable[: len(usable) if degree else table.num_single])
        for held in range(FOLDS):
            rows = np.flatnonzero(fold == held)
            mean, covariance = arrays["mean"][held], arrays["covariance"][held]
            deviation = np.sqrt(covariance.diagonal()[chosen] + 1e-12)
            energy, basis = np.linalg.eigh(covariance[np.ix_(chosen, chosen)] / np.outer(deviation, deviation))
            right = basis.T @ (covariance[np.ix_(chosen, targets)] / deviation[:, None])
            x = np.nan_to_num((features[np.ix_(rows, chosen)] - mean[chosen]) / deviation) @ basis
            for number, penalty in enumerate(PENALTIES):
                solution = right / (np.maximum(energy, 0) + penalty)[:, None]
                predicted[degree, number, rows] = mean[targets] + x @ solution
    error = np.maximum(np.nanmean(np.abs(predicted - truth), 2), 1e-12)  # 2 L 1 or 2 L 2
    log = False
    if has_log:
        # The likelihood of errors of a Laplace distribution, of the value and of its logarithm.
        slope = np.log(values[values > 0]).mean() + math.log(arrays["scale"][index, 3] / arrays["scale"][index, 1])
        log = bool(math.log(error[..., 1].min()) + slope < math.log(error[..., 0].min()))
    best = error[..., int(log)].argmin(1)
    arrays["log"][index], arrays["penalty"][index] = log, np.asarray(PENALTIES)[best]
    own = truth[:, int(log)]
    margin = 0.5 * np.ptp(own[np.isfinite(own)])
    arrays["range"][index] = np.nanmin(own) - margin, np.nanmax(own) + margin
    return own, predicted[np.arange(2), best, :, int(log)].T


def _blend(table: TablePredictors, index: int, truth: np.ndarray, predicted: np.ndarray) -> float:
    """Set positive weights of least absolute error, and the typical error; return the error against the median's."""
    # scipy takes a second to import: only a training with a table needs it.
    from scipy.optimize import nnls  # noqa: PLC0415

    rows = np.isfinite(truth)
    y, x = truth[rows], np.clip(predicted[rows], *table.arrays["range"][index])
    importance, weight = np.ones(len(y)), np.ones(x.shape[1])
    total = np.full(x.shape[1], 1e3 * math.sqrt(len(y)))
    for _ in range(REWEIGHTED):
        root = np.sqrt(importance)
        weight, _ = nnls(np.vstack([x * root[:, None], total]), np.append(y * root, total[0]))
        error = np.abs(x @ weight - y)
        importance = 1 / np.maximum(error, 0.3 * np.median(error) + 1e-9)
        importance /= importance.mean()
    weight /= weight.sum()
    error = np.abs(x @ weight - y)
    table.arrays["weight"][index, : len(weight)] = weight
    table.arrays["change"][index] = max(1.4826 * float(np.median(error)), TAIL * float(error.mean()), MIN_CHANGE)
    return float(error.mean() / max(np.abs(y - np.median(y)).mean(), 1e-12))


def _fit_trees(
    table: TablePredictors, index: int, shown: tuple[np.ndarray, ...], fold: np.ndarray, truth: np.ndarray, steps: int
) -> np.ndarray:
    """Fit trees of a column without each fold; return what they predict of its rows.  # -> R"""
    # scikit-learn takes a second to import: only a training with a table needs it.
    from sklearn.ensemble import HistGradientBoostingRegressor  # noqa: PLC0415

    (values, codes), rng = shown, np.random.default_rng(index)
    predicted, models, means = np.full(len(truth), np.nan), [], []
    for held in range(FOLDS):
        rows = np.flatnonzero((fold != held) & np.isfinite(truth))
        if len(rows) > MAX_TREE_ROWS:
            rows = np.sort(rng.choice(rows, MAX_TREE_ROWS, replace=False))
        # The mean of each word is moved to that of all rows if its own are few.
        own = [truth[rows][codes[rows, position] == code]
               for position, words in enumerate(table.categories.values()) for code in range(len(words))]  # fmt: skip
        prior = PRIOR_ROWS * truth[rows].mean()
        means.append(np.asarray([(one.sum() + prior) / (len(one) + PRIOR_ROWS) for one in own]))
        inputs = table.tree_inputs(index, means[-1], values, codes)
        clipped = np.clip(truth[rows], -FARTHEST, FARTHEST)
        models.append(_boosted(HistGradientBoostingRegressor, inputs[rows], clipped, steps, rng))
        if (fold == held).any():
            predicted[fold == held] = models[-1].predict(inputs[fold == held])
    arrays = {**tree_arrays(models), "words": np.stack(means)}
    table.trees[index] = Trees(arrays)
    table.arrays |= {f"{index}/{name}": array for name, array in arrays.items()}
    return predicted


def _boosted(kind: type, inputs: np.ndarray, truth: np.ndarray, steps: int, rng: np.random.Generator) -> Any:
    """Trees that are fitted to rows, and to copies of them that lack some columns.  # R F, R"""
    kept = rng.random(inputs.shape) < rng.uniform(*KEPT_COLUMNS, (len(inputs), 1))
    model = kind(
        learning_rate=LEARNING_RATE * STEPS / steps, max_iter=steps, max_leaf_nodes=LEAVES, max_depth=DEPTH,
        min_samples_leaf=int(np.clip(len(inputs) // 15, 3, 20)), early_stopping=False, random_state=0,
    )  # fmt: skip
    x = np.concatenate([inputs, np.where(kept, inputs, np.nan)])
    x[:, np.isnan(x).all(0)] = 0  # scikit-learn needs a value; no tree splits by a constant
    return model.fit(x, np.tile(truth, 2))


def tree_arrays(models: Sequence[Any]) -> Arrays:
    """The trees of models of HistGradientBoosting with equally many steps, see `Trees`."""
    nodes = [[one.nodes for predictors in model._predictors for one in predictors] for model in models]
    shape = (len(models), len(nodes[0]), max(len(tree) for trees in nodes for tree in trees))
    itself = np.broadcast_to(np.arange(shape[2], dtype=np.min_scalar_type(shape[2])), shape)
    arrays: Arrays = {
        "feature": np.zeros(shape, np.min_scalar_type(max(model.n_features_in_ for model in models))),
        "number": np.zeros(shape),
        "left": itself.copy(),
        "right": itself.copy(),
        "missing_left": np.zeros(shape, bool),
        "baseline": np.concatenate([model._baseline_prediction for model in models]).astype(float),
    }
    fields = {"feature": "feature_idx", "number": "num_threshold", "left": "left", "right": "right",
              "missing_left": "missing_go_to_left"}  # fmt: skip
    for fold, trees in enumerate(nodes):
        for number, tree in enumerate(trees):
            inner = np.flatnonzero(tree["is_leaf"] == 0)
            arrays["number"][fold, number, : len(tree)] = tree["value"].astype(np.float32)
            for name, field in fields.items():
                arrays[name][fold, number, inner] = tree[field][inner]
    return arrays
