"""Baselines of tables, texts and pixels: gradient boosting, linear models, a forest."""

# Letters: N rows, Q quantiles, K classes

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from benchmarks.harness import Deadline
from benchmarks.own_data.frame import Frame
from benchmarks.own_data.scores import TABLE_LEVELS

FOREST_SIDE, TREES = 24, 300
MIN_DOCUMENTS, MAX_WORDS = 2, 128  # texts in which a word must occur, and words of a column
HELD_OUT = 0.2  # of the training rows, for the quantiles of residuals


class Features:
    """Columns of numbers, categories as codes and words of texts as one matrix; missing values are NaN."""

    def __init__(self, train: Frame, target: str, with_words: bool = False) -> None:
        self.numbers = [name for name in train.names("number") if name != target]
        self.categories = [name for name in train.names("category") if name != target]
        self.codes = {
            name: {word: code for code, word in enumerate(sorted(set(train.columns[name]) - {""}))}
            for name in self.categories
        }
        # As many as OpenM6 makes columns of.
        self.words = {
            name: CountVectorizer(binary=True, min_df=MIN_DOCUMENTS, max_features=MAX_WORDS).fit(train.columns[name])
            for name in (train.names("text") if with_words else ())
        }

    def __call__(self, frame: Frame) -> np.ndarray:
        columns = [frame.numbers(name) for name in self.numbers]
        for name in self.categories:
            columns.append(np.asarray([self.codes[name].get(word, np.nan) for word in frame.columns[name]], float))
        for name, words in self.words.items():
            columns += list(words.transform(frame.columns[name]).toarray().astype(float).T)
        return np.stack(columns, 1)

    @property
    def is_category(self) -> list[bool]:
        """Whether each column holds codes."""
        words = sum(len(one.vocabulary_) for one in self.words.values())
        return [False] * len(self.numbers) + [True] * len(self.categories) + [False] * words


def boosted_quantiles(
    train: Frame, test: Frame, target: str, deadline: Deadline, with_words: bool = False
) -> np.ndarray | None:
    """Return quantiles by HistGradientBoosting, one model per level; None if the time is over.  # N Q"""
    features, values = Features(train, target, with_words), train.numbers(target)
    seen = np.isfinite(values)
    x, y, x_test = features(train)[seen], values[seen], features(test)
    found = []
    for level in TABLE_LEVELS:
        if deadline.passed:
            return None
        model = HistGradientBoostingRegressor(
            loss="quantile", quantile=float(level), categorical_features=features.is_category, random_state=0
        )
        found.append(model.fit(x, y).predict(x_test))
    return np.sort(np.stack(found, 1), 1)


def boosted_classes(
    train: Frame, test: Frame, target: str, classes: Sequence[str], with_words: bool = False
) -> np.ndarray:
    """Return probabilities by HistGradientBoosting.  # N K"""
    features = Features(train, target, with_words)
    model = HistGradientBoostingClassifier(categorical_features=features.is_category, random_state=0)
    model.fit(features(train), list(train.columns[target]))
    return aligned(model.predict_proba(features(test)), model.classes_, classes)


def logistic_classes(train: Frame, test: Frame, target: str, classes: Sequence[str]) -> np.ndarray:
    """Return probabilities by logistic regression on standardized numbers and one-hot categories.  # N K"""
    features = Features(train, target)
    codes = np.asarray(features.is_category)
    numbers = make_pipeline(SimpleImputer(strategy="median"), StandardScaler())
    words = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    columns = ColumnTransformer([("numbers", numbers, np.flatnonzero(~codes)), ("words", words, np.flatnonzero(codes))])
    model = make_pipeline(columns, LogisticRegression(max_iter=2000))
    model.fit(features(train), list(train.columns[target]))
    return aligned(model.predict_proba(features(test)), model.classes_, classes)


def word_classes(train: Frame, test: Frame, text: str, target: str, classes: Sequence[str]) -> np.ndarray:
    """Return probabilities by logistic regression on TF-IDF of words and pairs of words.  # N K"""
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=MIN_DOCUMENTS, sublinear_tf=True)
    model = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=2000))
    model.fit(list(train.columns[text]), list(train.columns[target]))
    return aligned(model.predict_proba(list(test.columns[text])), model.classes_, classes)


def word_quantiles(train: Frame, test: Frame, text: str, target: str) -> np.ndarray:
    """Return ridge regression on TF-IDF with the quantiles of its residuals on held-out training rows.  # N Q"""
    rows = np.flatnonzero(np.isfinite(train.numbers(target)))
    words, values = [train.columns[text][row] for row in rows.tolist()], train.numbers(target)[rows]
    border = round((1 - HELD_OUT) * len(rows))
    part, whole = (
        make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=MIN_DOCUMENTS, sublinear_tf=True),
            RidgeCV(alphas=np.logspace(-2, 2, 9)),
        ).fit(words[:count], values[:count])
        for count in (border, len(rows))
    )
    residuals = values[border:] - part.predict(words[border:])
    return whole.predict(list(test.columns[text]))[:, None] + np.quantile(residuals, TABLE_LEVELS)


def forest_classes(
    images: Sequence[Image.Image], labels: Sequence[str], test: Sequence[Image.Image], classes: Sequence[str]
) -> np.ndarray:
    """Return probabilities by a random forest on the pixels of small images.  # N K"""
    model = RandomForestClassifier(TREES, n_jobs=-1, random_state=0)
    model.fit(_pixels(images), list(labels))
    return aligned(model.predict_proba(_pixels(test)), model.classes_, classes)


def _pixels(images: Sequence[Image.Image]) -> np.ndarray:
    sized = [np.asarray(image.resize((FOREST_SIDE, FOREST_SIDE), Image.Resampling.BOX)) for image in images]
    return np.stack(sized).reshape(len(sized), -1)


def aligned(probability: np.ndarray, own: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return probabilities of a model's own classes in the order of `classes`; others have none.  # N K"""
    found = np.zeros((len(probability), len(classes)))
    index = {name: number for number, name in enumerate(classes)}
    for column, name in enumerate(own):
        found[:, index[str(name)]] = probability[:, column]
    return found
