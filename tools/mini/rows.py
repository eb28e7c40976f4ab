"""What a run answers on held-out records of the corpus, and how right that is, for each row of its table."""

# Letters: N records, D features, K candidates, H steps ahead, Q quantiles

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.own_data.scores import SERIES_LEVELS, quantile_losses
from openm6.api.frames import number_answers
from openm6.api.values import Audio
from openm6.core.config import build, read_yaml
from openm6.core.errors import DataError
from openm6.data.prepare import example_sequence
from openm6.data.records import Record
from openm6.data.source import Source, Split
from openm6.data.sources import open_sources
from openm6.data.windows import WindowSource
from openm6.evaluate.answers import answer, evenly_spaced
from openm6.evaluate.evaluator import EvalConfig
from openm6.evaluate.likelihood import sequence_nll
from openm6.evaluate.metrics import same_text
from openm6.evaluate.results import Interval, bootstrap_interval
from openm6.evaluate.run import source_configs
from openm6.inference.engine import generate_texts
from openm6.inference.load import LoadedModel
from openm6.inference.question import Answer
from openm6.modalities.histogram import Histogram
from openm6.modalities.registry import source_segments
from openm6.serve.scenarios.scenario import read_library
from openm6.tasks.task import Example
from openm6.train.run import recipe_path
from tools.mini.corpus import fraction_of
from tools.mini.networks import (
    AvatarEvaluator,
    SyllableEvaluator,
    attribute_rates,
    attributes_by_style,
    compare_attributes,
    split_tone,
)
from tools.mini.pretrained import EfficientNetLite0, Whisper
from tools.mini.references import CharacterModel, boosted_values, seasonal_naive
from tools.mini.speech import TEST_VOICES

GENERATED, SPOKEN, ANSWERED, NUMBERS = 160, 100, 400, 500  # records: images and syllables, words, texts, numbers
CANDIDATES = 100  # concepts among which a drawn icon must be the nearest
SEASONS = {"monthly": 12, "daily": 365}
WINDOWS = 3  # of each series
TREES = 10_000  # training records of the boosted trees
SEMITONE = 1.0
# Attributes of a caption between hair and style, in their order.
STATED = ("shirt", "glasses", "hat", "beard", "earrings", "hairAccessories")
RESAMPLES = 1000


@dataclass(frozen=True)
class Asked:
    """A record, the example that was made of it, and the model's answer."""

    record: Record
    example: Example
    answer: Answer


@dataclass(frozen=True)
class Evaluated:
    """The value of a row with its 95 % interval over n records, and that of real records in place of answers."""

    value: float
    interval: Interval
    n: int
    ceiling: float | None = None  # None: answers are compared exactly
    details: dict[str, float] = field(default_factory=dict)


class Evaluation:
    """A run, the corpus, and what evaluates the run; each is opened, fetched or trained when it is first needed."""

    def __init__(self, loaded: LoadedModel, corpus: Path, cache: Path, limit: int | None = None) -> None:
        self.loaded, self.corpus, self.cache, self.limit = loaded, corpus, cache, limit
        self.decoding = build(EvalConfig, loaded.description.eval, "eval").decoding
        self._sources: dict[tuple[str, Split], Source] = {}

    @cached_property
    def avatars(self) -> AvatarEvaluator:
        """The network that finds attributes."""
        return AvatarEvaluator.of(self.source("avatars", "train"), self.corpus / "avatars.parquet", self.cache)

    @cached_property
    def syllables(self) -> SyllableEvaluator:
        """The network that transcribes syllables."""
        return SyllableEvaluator.of(self.source("syllables", "train"), self.corpus / "syllables.parquet", self.cache)

    @cached_property
    def features(self) -> Callable[[Sequence[Any]], np.ndarray]:
        """The features of images.  # -> N D"""
        return EfficientNetLite0.published(self.cache).features

    @cached_property
    def words(self) -> Callable[[Sequence[Any]], list[str]]:
        """The English words of recordings."""
        return Whisper(self.cache).transcribe

    @cached_property
    def diamonds(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Prices of held-out diamonds: true ones, quantiles 0.1, 0.5 and 0.9 of the run, and boosted trees.

        # N, 3 N, N
        """
        records = self.records("diamonds", NUMBERS)
        found = self.numbers("record_regression", records, "price")
        quantiles = np.array([[one.quantile(level)[0] for one in found] for level in (0.1, 0.5, 0.9)])
        truth = np.array([record["numbers"]["price"] for record in records])
        train = self.source("diamonds", "train")
        known = [train[row] for row in evenly_spaced(len(train), TREES)]
        return truth, quantiles, boosted_values(known, records, "price")

    def source(self, part: str, split: Split = "test") -> Source:
        """Return the records of one split of a part; DataError if the corpus lacks it."""
        if (part, split) not in self._sources:
            path = self.corpus / f"{part}.parquet"
            if not path.is_file():
                raise DataError(f"{self.corpus} has no {path.name}: build it with --only {part}")
            recipe = read_yaml(recipe_path("mini"))["sources"]
            settings = self.loaded.description.sources.get(part) or recipe.get(part, {"kind": "parquet"})
            configs = source_configs({part: {**settings, "path": str(path)}}, part)
            self._sources[part, split] = open_sources(configs, split)[part]
        return self._sources[part, split]

    def records(
        self, part: str, count: int, keep: Callable[[str], bool] = lambda name: True, once: str | None = None
    ) -> list[Record]:
        """Return held-out records whose ids are kept, evenly spaced; of equal values of the key `once`, the first."""
        source = self.source(part)
        rows = [row for row, name in enumerate(source.values("id")) if keep(name)]
        if once is not None:
            values = source.values(once)
            first = {values[row]: row for row in reversed(rows)}
            rows = sorted(first.values())
        if not rows:
            raise DataError(f"{part} has no held-out record for this row")
        return [source[rows[at]] for at in evenly_spaced(len(rows), min(count, self.limit or count))]

    def examples(self, task_name: str, records: Sequence[Record]) -> list[tuple[Record, Example]]:
        """Return the records that have what a task needs as its examples, in each of their languages in turn."""
        trained = {one.task for one in self.loaded.description.trained_tasks}
        # A model of chats has the task in the words of one, as in the recipe `smol`.
        name = next((name for name in (task_name, f"chat_{task_name}") if name in trained), None)
        if name is None:
            raise DataError(f"the run was not trained on {task_name}")
        task, found = self.loaded.task(name), []
        for number, record in enumerate(records):
            if languages := task.languages(record):
                language = languages[number % len(languages)]
                found.append((record, task.example(record, np.random.default_rng(0), language=language)))
        if not found:
            raise DataError(f"no record has what {task_name} needs")
        return found

    def ask(self, task_name: str, records: Sequence[Record]) -> list[Asked]:
        """Return the answers of the run to a task."""
        pairs = self.examples(task_name, records)
        answers = answer(self.loaded, [example for _, example in pairs], self.decoding)
        return [Asked(record, example, own) for (record, example), own in zip(pairs, answers, strict=True)]

    def after_codec(self, modality: str, asked: Sequence[Asked]) -> list[Any]:
        """Return the true images or recordings as the codec leaves them: no model generates better ones."""
        codec = self.loaded.image if modality == "image" else self.loaded.audio
        return [codec.decode(torch.from_numpy(codec.encode(one.record[modality]))) for one in asked]

    def transcribes(self, asked: Sequence[Asked], clips: Sequence[Any]) -> float:
        """Return the fraction of words that the run transcribes from these clips of them."""
        said = [{**one.record, "audio": Audio(clip).to_bytes()} for one, clip in zip(asked, clips, strict=True)]
        return exact(self.ask("speech_recognition", said)).value

    def numbers(self, task_name: str, records: Sequence[Record], column: str) -> list[Histogram]:
        """Return the distributions of a number column."""
        self.examples(task_name, records[:1])
        found = number_answers(self.loaded, self.loaded.task(task_name), records, column)
        if missing := sum(one is None for one in found):
            raise DataError(f"{missing} records lack what {task_name} needs")
        return [one for one in found if one is not None]


def mean_of(
    values: Sequence[float], ceiling: float | None = None, details: dict[str, float] | None = None
) -> Evaluated:
    """Return the mean with its interval by a bootstrap over records."""
    found = np.asarray(values, float)
    return Evaluated(float(found.mean()), bootstrap_interval(found, 0), len(found), ceiling, details or {})


def by_group(values: Sequence[float], groups: Sequence[str]) -> dict[str, float]:
    """Return the mean of each group, such as a language."""
    return {
        name: float(np.mean([value for value, own in zip(values, groups, strict=True) if own == name]))
        for name in sorted(set(groups))
    }


def avatars_drawn(run: Evaluation) -> Evaluated:
    """Attributes of avatars that are drawn from a description, of combinations that were never trained."""
    asked = run.ask("text_to_image", run.records("avatars", GENERATED))
    records = [one.record for one in asked]
    compared = run.avatars.compare([one.answer for one in asked], records)
    real = run.avatars.compare(run.after_codec("image", asked), records)
    details = attribute_rates(compared)
    details |= {f"{name}, real": rate for name, rate in attribute_rates(real).items()}
    return mean_of([float(np.mean([*own.values()])) for own in compared], _mean_rate(real), details)


def _mean_rate(compared: Sequence[dict[str, bool]]) -> float:
    return float(np.mean([np.mean([*own.values()]) for own in compared]))


def avatars_described(run: Evaluation) -> Evaluated:
    """Attributes in the descriptions of avatars; one that is absent must not be mentioned."""
    asked = run.ask("image_captioning", run.records("avatars", ANSWERED))
    train = run.source("avatars", "train")
    categories = train.values("categories")
    captions = {language: train.values(f"text_{language}") for language in ("en", "zh")}
    phrases, attributes, right = caption_phrases(captions, categories), attributes_by_style(categories), []
    for one in asked:
        true = one.record["categories"]
        found = read_caption(str(one.answer), phrases[one.example.language, true["style"]])
        right.append(compare_attributes(found, true, attributes))
    # What an empty text reaches, since most attributes may be absent.
    empty = _mean_rate([compare_attributes({}, one.record["categories"], attributes) for one in asked])
    languages = [one.example.language for one in asked]
    values = [float(np.mean([*one.values()])) for one in right]
    names, each = zip(*(pair for one in right for pair in one.items()), strict=True)
    return mean_of(values, details={"empty text": empty, **by_group(values, languages), **by_group(each, names)})


Phrases = dict[str, dict[str, str]]
"""A phrase of a caption -> the attributes that it states."""


def caption_phrases(
    captions: dict[str, list[str]], categories: Sequence[dict[str, str]]
) -> dict[tuple[str, str], Phrases]:
    """Return the phrases of each language and style, by captions in which attributes follow one another in order."""
    found: dict[tuple[str, str], Phrases] = defaultdict(dict)
    for language, texts in captions.items():
        for text, own in zip(texts, categories, strict=True):
            hair = [["head"]] if "head" in own else [["hair", "hair colour"]]
            rest = [[name] for name in STATED if name in own]
            stated = [["mood"], ["skin"], *hair, *rest, ["style"]]
            for phrase, names in zip(split_caption(text), stated, strict=True):
                found[language, own["style"]][phrase] = {name: own[name] for name in names}
    return found


def split_caption(text: str) -> list[str]:
    """Return the phrases of a caption."""
    return re.split(r" with |, | and |，", text)


def read_caption(text: str, phrases: Phrases) -> dict[str, str]:
    """Return the attributes that a caption states in known phrases."""
    return {name: word for phrase in split_caption(text) for name, word in phrases.get(phrase.strip(), {}).items()}


def icons_named(run: Evaluation) -> Evaluated:
    """Names of icons and emoji in a style in which the concept was never trained: the label or a listed synonym."""
    values, exact, groups = [], [], []
    for one in run.ask("image_classification", run.records("things", ANSWERED, _is_new_image(run))):
        language = one.example.language
        synonyms = one.record.get(f"tags_{language}") or []
        exact.append(float(same_text(str(one.answer), one.example.answer)))
        values.append(max([exact[-1], *(float(same_text(str(one.answer), name)) for name in synonyms)]))
        groups.append(language)
    return mean_of(values, details={"label alone": float(np.mean(exact)), **by_group(values, groups)})


def icons_drawn(run: Evaluation) -> Evaluated:
    """Icons drawn by name and style, of pairs that were never trained: the right one of 100 real ones is nearest.

    All candidates are in the style that was asked for. The ceiling is that of the real icon after the codec.
    """
    asked = run.ask("text_to_image", run.records("things", GENERATED, _is_new_image(run)))
    gallery = _real_icons(run)
    groups = [_candidates(one.record, gallery[one.record["extra"]["style_en"]]) for one in asked]
    images = list(dict.fromkeys(image for group in groups for _, image in group))
    known = dict(zip(images, run.features(images), strict=True))
    values = []
    for drawn in (run.features([one.answer for one in asked]), run.features(run.after_codec("image", asked))):
        values.append([
            float(nearest(own, np.stack([known[image] for _, image in group])) == 0)
            for own, group in zip(drawn, groups, strict=True)
        ])  # fmt: skip
    details = by_group(values[0], [one.record["extra"]["style_en"] for one in asked])
    return mean_of(values[0], float(np.mean(values[1])), {"candidates": min(map(len, groups)), **details})


def _is_new_image(run: Evaluation) -> Callable[[str], bool]:
    """Whether no training record has the image of a held-out one, by its id: IconPark draws some things alike in two
    styles."""
    trained = set(run.source("things", "train").values("image"))
    source = run.source("things")
    copies = {name for name, image in zip(source.values("id"), source.values("image"), strict=True) if image in trained}
    return lambda name: name not in copies


Candidate = tuple[str, bytes]
"""The label and the image of a real icon."""


def _real_icons(run: Evaluation) -> dict[str, list[Candidate]]:
    """A few more real icons of each style than are needed, each of another concept."""
    splits: tuple[Split, ...] = ("train", "test")
    by_style: dict[str, dict[str, tuple[Source, int]]] = defaultdict(dict)
    for source in (run.source(part, split) for part in ("icons", "emoji") for split in splits):
        columns = zip(source.values("label"), source.values("extra"), strict=True)
        for row, (label, extra) in enumerate(columns):
            by_style[extra["style_en"]].setdefault(label, (source, row))
    found = {}
    for style, rows in by_style.items():
        chosen = sorted(rows, key=partial(fraction_of, "candidate", style))[: CANDIDATES + 1]
        found[style] = [(label, rows[label][0][rows[label][1]]["image"]) for label in chosen]
    return found


def _candidates(record: Record, real: Sequence[Candidate]) -> list[Candidate]:
    """The real icon of a record, and others of its style."""
    own = (record["label"], record["image"])
    return [own, *(one for one in real if one[0] != own[0])][:CANDIDATES]


def nearest(features: np.ndarray, candidates: np.ndarray) -> int:
    """Return the candidate of the smallest angle, seen from the mean of all.  # D, K D"""
    middle = candidates.mean(0)
    away, own = candidates - middle, features - middle
    return int(np.argmax(away @ own / np.maximum(np.linalg.norm(away, axis=1), 1e-9)))


def _in_test_voice(name: str, language: str = "") -> bool:
    return any(f"/{voice}/{language}" in name for voice in TEST_VOICES)


def exact(asked: Sequence[Asked], group: Callable[[Asked], str] = lambda one: one.example.language) -> Evaluated:
    """Answers that equal the truth, but for case, white space and full stops at their ends; details by group."""
    values = [float(same_text(str(one.answer), one.example.answer)) for one in asked]
    return mean_of(values, details=by_group(values, list(map(group, asked))))


def syllables_transcribed(run: Evaluation) -> Evaluated:
    """Syllables that are transcribed from a voice that was never trained."""
    asked = run.ask("speech_recognition", run.records("syllables", ANSWERED, _in_test_voice))
    found, parts = exact(asked), [(split_tone(str(one.answer)), split_tone(one.example.answer)) for one in asked]
    network = run.syllables.transcribe([one.record["audio"] for one in asked])
    found.details.update({
        "without tone": float(np.mean([own[0] == true[0] for own, true in parts])),
        "tone": float(np.mean([own[1] == true[1] for own, true in parts])),
        "small network": float(np.mean([own == one.example.answer for own, one in zip(network, asked, strict=True)])),
    })  # fmt: skip
    return found


def syllables_spoken(run: Evaluation) -> Evaluated:
    """Syllables that are generated from pinyin."""
    asked = run.ask("text_to_speech", run.records("syllables", GENERATED, once="label"))
    labels = [one.record["label"] for one in asked]
    found = run.syllables.transcribe([one.answer for one in asked])
    real = run.syllables.transcribe(run.after_codec("audio", asked))
    rates = [np.mean([split_tone(own)[0] == split_tone(true)[0] for own, true in zip(found, labels, strict=True)])]
    values = [[float(own == true) for own, true in zip(group, labels, strict=True)] for group in (found, real)]
    return mean_of(values[0], float(np.mean(values[1])), {"without tone": float(rates[0])})


def words_spoken(run: Evaluation) -> Evaluated:
    """English words that are generated, as Whisper transcribes them; the ceiling is that of the trained voice."""
    records = run.records("said_words", SPOKEN, lambda name: "/en/" in name)
    asked = run.ask("text_to_speech", records)
    values = [
        [float(found == one.record["label"]) for found, one in zip(run.words(clips), asked, strict=True)]
        for clips in ([one.answer for one in asked], run.after_codec("audio", asked))
    ]
    both = [own for own, real in zip(*values, strict=True) if real]
    details = {"of words that the real voice conveys": float(np.mean(both))} if both else {}
    with suppress(DataError):  # a model may speak without transcribing
        details["transcribed by the run"] = run.transcribes(asked, [one.answer for one in asked])
    return mean_of(values[0], float(np.mean(values[1])), details)


def words_transcribed(run: Evaluation) -> Evaluated:
    """English words that are transcribed from voices that were never trained.

    The details have each voice, the same recordings after the codec, and Chinese words.
    """

    def transcribed(language: str) -> Evaluated:
        kept = partial(_in_test_voice, language=f"{language}/")
        asked = run.ask("speech_recognition", run.records("words", ANSWERED, kept))
        found = exact(asked, group=lambda one: one.record["id"].split("/")[1])  # by voice
        found.details["after the codec"] = run.transcribes(asked, run.after_codec("audio", asked))
        return found

    found = transcribed("en")
    with suppress(DataError):  # a model may have learned English alone
        found.details["zh"] = transcribed("zh").value
    return found


def instruments(run: Evaluation) -> Evaluated:
    """Instruments of notes whose pitch was never trained for that instrument."""
    kept = run.records("instruments", ANSWERED, lambda name: name.startswith("instrument/"))
    return exact(run.ask("audio_classification", kept))


def pitches(run: Evaluation) -> Evaluated:
    """Pitches of such notes, within a semitone."""
    records = [
        record
        for record in run.records("instruments", ANSWERED, lambda name: name.startswith("instrument/"))
        if "pitch" in (record.get("numbers") or {})
    ]
    found = run.numbers("audio_regression", records, "pitch")
    pairs = zip(found, records, strict=True)
    errors = [abs(one.quantile(0.5)[0] - record["numbers"]["pitch"]) for one, record in pairs]
    return mean_of([float(error <= SEMITONE) for error in errors], details={"median error": float(np.median(errors))})


def diamond_price(run: Evaluation) -> Evaluated:
    """R² of the prices of held-out diamonds; the ceiling is that of boosted trees."""
    truth, quantiles, boosted = run.diamonds
    low, high = np.quantile(
        [r_squared(truth[rows], quantiles[1][rows]) for rows in _resampled(len(truth))], (0.025, 0.975)
    )
    value = r_squared(truth, quantiles[1])
    details = {"mean absolute error": float(np.abs(truth - quantiles[1]).mean())}
    return Evaluated(value, (float(low), float(high)), len(truth), r_squared(truth, boosted), details)


def diamond_coverage(run: Evaluation) -> Evaluated:
    """The fraction of prices within the interval of 80 %."""
    truth, (low, _, high), _ = run.diamonds
    return mean_of(((truth >= low) & (truth <= high)).astype(float).tolist())


def r_squared(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Return the fraction of the variance that is explained."""
    return float(1 - np.square(truth - predicted).sum() / max(np.square(truth - truth.mean()).sum(), 1e-12))


def _resampled(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def series(run: Evaluation) -> Evaluated:
    """Series whose forecasts of 24 steps have a lower weighted quantile loss than those of the last season."""
    values, groups, ratios = [], [], []
    for part, season in SEASONS.items():
        source = run.source(part)
        assert isinstance(source, WindowSource)
        windows: dict[str, list[int]] = defaultdict(list)
        for index, (_, about) in enumerate(source.windows):
            windows[about["group"]].append(index)
        names = [list(windows)[at] for at in evenly_spaced(len(windows), run.limit or len(windows))]
        chosen = [windows[name][at] for name in names for at in evenly_spaced(len(windows[name]), WINDOWS)]
        history = history_of(run.corpus / f"{part}.parquet", names)
        losses: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for one in run.ask("time_series_forecasting", [source[index] for index in chosen]):
            name = one.record["extra"]["group"]
            losses[name].append(series_losses(one, history[name], season))
        means = [np.mean(losses[name], axis=0) for name in names]
        values += [float(ours < naive) for ours, naive in means]
        ratios += [ours / max(naive, 1e-12) for ours, naive in means]
        groups += [part] * len(names)
    details = {"median loss relative to naive": float(np.median(ratios)), **by_group(values, groups)}
    return mean_of(values, details=details)


def history_of(path: Path, names: Sequence[str]) -> dict[str, tuple[list[str], np.ndarray]]:
    """Return the times and values of series in a file of the corpus, whose column has the name of the file."""
    table = pq.read_table(path, columns=["name", "time", path.stem])
    rows: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for name, time, value in zip(*(table[key].to_pylist() for key in table.column_names), strict=True):
        if name in rows:
            rows[name].append((time, value))
    ordered = {name: sorted(own) for name, own in rows.items()}
    return {name: ([time for time, _ in own], np.array([value for _, value in own])) for name, own in ordered.items()}


def series_losses(asked: Asked, history: tuple[list[str], np.ndarray], season: int) -> tuple[float, float]:
    """Return the quantile losses of one window: of the answer, and of the last season before it."""
    extra, (column,) = asked.record["extra"], asked.record["series"].values()
    truth = np.array([np.nan if value is None else value for value in column[-extra["horizon"] :]], float)
    first = history[0].index(extra["start"]) + extra["context"]
    naive = seasonal_naive(history[1][:first], len(truth), season, SERIES_LEVELS.tolist())
    assert isinstance(asked.answer, Histogram)
    ours = np.stack([asked.answer.quantile(level) for level in SERIES_LEVELS], axis=1)  # H Q
    seen = np.isfinite(truth)
    ours_loss, naive_loss = (
        float(quantile_losses(own[seen], truth[seen], SERIES_LEVELS).mean()) for own in (ours, naive)
    )
    return ours_loss, naive_loss


def _lines_of_poems(run: Evaluation) -> dict[str, None]:
    """The pairs of lines of the training poems, as `upper，lower。`, each once."""
    with suppress(DataError):  # a corpus without poems
        texts = run.source("poems", "train").values("text_zh")
        return dict.fromkeys(line for text in texts for line in text.split("\n")[1:])
    return {}


def _is_new_couplet(run: Evaluation) -> Callable[[str], bool]:
    """Whether a held-out couplet, by its id, is no line of a training poem: both parts are of the same poems."""
    trained, source = _lines_of_poems(run), run.source("couplets")
    pairs = zip(source.values("id"), source.values("question"), source.values("answer"), strict=True)
    known = {name for name, upper, lower in pairs if f"{upper}，{lower}。" in trained}
    return lambda name: name not in known


def couplet_form(run: Evaluation) -> Evaluated:
    """Lower lines of the length of the upper line, without any of its characters, and not one character repeated.

    They are decoded as in the scenario `couplet`, by the settings that a user gets.
    """
    found = run.examples("couplet_completion", run.records("couplets", ANSWERED, _is_new_couplet(run)))
    prompts = [source_segments(example.source, run.loaded.modalities) for _, example in found]
    lines = generate_texts(run.loaded, prompts, read_library().scenarios["couplet"].decoding.text)
    trained = set(run.source("couplets", "train").values("answer"))
    pairs = [(record["question"], line.strip("。 ")) for (record, _), line in zip(found, lines, strict=True)]
    long = [float(len(upper) == len(lower)) for upper, lower in pairs]
    new = [float(len(set(lower)) > 1 and not set(upper) & set(lower)) for upper, lower in pairs]
    details = {"length": float(np.mean(long)), "new characters": float(np.mean(new))}
    details["not a line of the training"] = float(np.mean([lower not in trained for _, lower in pairs]))
    details["different lines"] = len({lower for _, lower in pairs}) / len(pairs)
    return mean_of([own * other for own, other in zip(long, new, strict=True)], details=details)


def couplet_likelihood(run: Evaluation) -> Evaluated:
    """Bits per character of true lower lines that the run saves in comparison with a 5-gram model of the training.

    That model is of all pairs of lines that the run was trained on: couplets and the lines of poems, each pair once.
    """
    pairs = run.examples("couplet_completion", run.records("couplets", ANSWERED, _is_new_couplet(run)))
    train = run.source("couplets", "train")
    lines = zip(train.values("question"), train.values("answer"), strict=True)
    model = CharacterModel(dict.fromkeys(f"{upper}，{lower}。" for upper, lower in lines) | _lines_of_poems(run))
    sizes = np.array([len(record["answer"]) for record, _ in pairs])
    nll = sequence_nll(run.loaded.omni, [example_sequence(one, run.loaded.modalities) for _, one in pairs])
    ours = nll / np.log(2) / sizes
    grams = np.array([model.bits(f"{record['answer']}。", f"{record['question']}，") for record, _ in pairs]) / sizes
    details = {"run, bits per character": float(ours.mean()), "5-gram model": float(grams.mean())}
    return mean_of((grams - ours).tolist(), details=details)


def kinship(run: Evaluation) -> Evaluated:
    """Terms for relatives along chains of three steps that were never trained."""
    return exact(run.ask("kinship_term", run.records("kinship", ANSWERED)))


def countries(run: Evaluation) -> Evaluated:
    """Facts about countries, in a wording or language that was never trained for that fact."""
    return exact(run.ask("fact_recall", run.records("countries", ANSWERED)))


def elements(run: Evaluation) -> Evaluated:
    """Facts about chemical elements, likewise."""
    return exact(run.ask("fact_recall", run.records("elements", ANSWERED)))
