"""Scenarios: uses of a model with inputs, prompt, decoding settings, tasks and an example that runs.

Here are their schema, the library of those in the package, and what a model can do of them by its trained tasks and by
the report of its run.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from openm6.core.config import Config, build, read_yaml
from openm6.core.errors import ConfigError
from openm6.evaluate.metrics import metric_title
from openm6.evaluate.metrics import score as score_text
from openm6.inference.question import CHINESE
from openm6.inference.sampling import Decoding
from openm6.models.description import CheckpointConfig
from openm6.tasks.registry import all_tasks, unknown_task
from openm6.tasks.slots import MAX_TOKENS
from openm6.tasks.task import Task

FOLDER = Path(__file__).parent / "library"
EXAMPLES_FILE = "examples.yaml"  # beside the weights of a model

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
InputKind = Literal["text", "image", "audio", "numbers", "series", "candidates", "box", "span"]
Output = Literal["text", "image", "audio", "numbers", "ranking", "embedding"]
# The others steer the answer.
PROMPTED: tuple[InputKind, ...] = ("text", "image", "audio", "numbers", "series")
KINDS_ZH = {**CHINESE, "series": "序列", "candidates": "候选", "box": "区域", "span": "区间"}
SLOT = re.compile(r"\{(\w+)\}")


class Bilingual(Config):
    en: str = Field(min_length=1)
    zh: str = Field(min_length=1)

    def text(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


class Input(Config):
    """One input; without a title it is called after its kind. One that is `optional` may be left out."""

    kind: InputKind
    title: Bilingual | None = None
    optional: bool = False

    @property
    def label(self) -> Bilingual:
        return self.title or Bilingual(en=self.kind.capitalize(), zh=KINDS_ZH[self.kind])


class Scenario(Config):
    """One use.

    prompt: the words of a trained task; `{name}` is the slot of an input, `{column}` the column that is predicted
    ahead: steps of a series that are forecast; column: the column that is predicted
    tasks: what a model must have been trained on; recipe: the shipped one that trains it
    data: the end of the path of a source that one of the tasks must have been trained on, if not any will do
    examples: inputs to try, for each language, or none; images and audio are named as `data#id` (see run.py)
    variants: fields in place of these, for models that were trained on other tasks that answer it
    own_examples: those that a model brings, with their images and audio in `folder`
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    title: Bilingual
    summary: Bilingual
    inputs: dict[str, Input] = Field(min_length=1)
    output: Output
    prompt: Bilingual
    column: str | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    decoding: Decoding = Decoding()
    tasks: list[str] = Field(min_length=1)
    data: str = ""
    recipe: str
    examples: dict[Language, dict[str, Any]]
    variants: list[dict[str, Any]] = Field(default=[], exclude=True)
    own_examples: list[dict[Language, dict[str, Any]]] = Field(default=[], exclude=True)
    folder: str = Field(default="", exclude=True)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str], info: ValidationInfo) -> list[str]:
        known = (info.context or {}).get("tasks") or all_tasks()
        for task in tasks:
            if task not in known:
                raise ValueError(unknown_task(task, known))
        return tasks

    @model_validator(mode="after")
    def _complete(self) -> Scenario:
        prompted = {name for name, declared in self.inputs.items() if declared.kind in PROMPTED}
        for language in LANGUAGES:
            named = set(SLOT.findall(self.prompt.text(language))) - {"column"}
            if named != prompted:
                raise ValueError(f"the {language} prompt must name {sorted(prompted)}, not {sorted(named)}")
            if self.examples and set(self.examples.get(language, {})) != set(self.inputs):
                raise ValueError(f"the {language} example must give {sorted(self.inputs)}")
        kinds = {declared.kind for declared in self.inputs.values()}
        if (self.output == "numbers" and "series" not in kinds) != (self.column is not None):
            raise ValueError("name the column that is predicted, if a number is, and only then")
        if ("candidates" in kinds) != (self.output == "ranking"):
            raise ValueError("a ranking needs candidates, and nothing else does")
        self.forms()  # raises if one is broken
        return self

    def forms(self) -> list[Scenario]:
        """Return the scenario, and one for each variant."""
        # What a scenario does not set is left to the model.
        own = {**self.model_dump(), "decoding": self.decoding.model_dump(exclude_unset=True), "examples": {}}
        return [self, *(Scenario.model_validate({**own, **variant}) for variant in self.variants)]

    @property
    def input_modality(self) -> str:
        """That of the first input that is no text."""
        found = {"image": "image", "audio": "audio", "numbers": "numbers", "series": "numbers"}
        return next((found[given.kind] for given in self.inputs.values() if given.kind in found), "text")

    def kind_of(self, kind: InputKind) -> str | None:
        return next((name for name, declared in self.inputs.items() if declared.kind == kind), None)


class OwnExamples(Config):
    examples: dict[str, list[dict[Language, dict[str, Any]]]]


class Domain(Config):
    """A file of scenarios that belong together."""

    title: Bilingual
    scenarios: list[Scenario] = Field(min_length=1)


class ScenarioLibrary:
    """All scenarios by name, in the order of the files, and their domains."""

    def __init__(self, domains: dict[str, Domain]) -> None:
        self.domains = domains
        self.scenarios = {one.name: one for domain in domains.values() for one in domain.scenarios}
        self.domain_of = {one.name: name for name, domain in domains.items() for one in domain.scenarios}


def read_library(folder: Path = FOLDER) -> ScenarioLibrary:
    """Return the scenarios in the YAML files of a folder, one domain per file; raise ConfigError if one is broken."""
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{folder} holds no scenarios: put YAML files there")
    domains = {path.stem: build(Domain, read_yaml(path), str(path)) for path in paths}
    counts = Counter(scenario.name for domain in domains.values() for scenario in domain.scenarios)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ConfigError(f"two scenarios in {folder} are called {name!r}: rename one")
    return ScenarioLibrary(domains)


def library_of(description: CheckpointConfig, folder: Path | None = None) -> ScenarioLibrary:
    """Return the scenarios of the package in the forms that a model was trained for, with the examples that it brings.

    One more domain has a scenario for each other task that it was trained on. `folder` is that of its checkpoint, where
    examples.yaml has lists of examples by scenario, and images and audio are files beside it or `data#id`; ConfigError
    if it is broken.
    """
    path, known = (folder or Path()) / EXAMPLES_FILE, all_tasks(description.tasks)
    read = read_yaml(path) if folder is not None and path.is_file() else {}
    brought = build(OwnExamples, {"examples": read}, str(path)).examples
    domains = dict(read_library().domains)
    covered: set[str] = set()
    for name, domain in domains.items():
        found = []
        for scenario in domain.scenarios:
            # The first form that it was trained for, or the first of all.
            forms = [form for form in scenario.forms() if not _missing(form, description)]
            covered |= {task for form in forms for task in form.tasks}
            changes = {"own_examples": brought.get(scenario.name, []), "folder": str(folder)}
            found.append((forms or [scenario])[0].model_copy(update=changes))
        domains[name] = domain.model_copy(update={"scenarios": found})
    own: list[Scenario] = []
    names = dict.fromkeys([*description.tasks, *(one.task for one in description.trained_tasks)])
    for task in (known[name] for name in names if name in known and name not in covered):
        # Some have no form, such as a regression of which no column is recorded.
        with suppress(ValueError):
            prompts = [prompt for found in task.prompts.values() for prompt in found]
            # Which categories were asked for is not recorded.
            unnamed = task.output_modality != "numbers" and any("{column}" in prompt for prompt in prompts)
            if not (task.contrastive or task.chat or unnamed):
                own.append(_own_scenario(task, description, brought.get(task.name, []), str(folder)))
    if own:
        domains["own"] = Domain(title=Bilingual(en="Tasks of this model", zh="该模型的任务"), scenarios=own)
    return ScenarioLibrary(domains)


def _own_scenario(task: Task, description: CheckpointConfig, examples: list[Any], folder: str) -> Scenario:
    """The scenario of a task that the library lacks: its inputs, its first prompts, its target; with own examples."""
    prompts = {language: found[0] for language, found in task.prompts.items()}
    first = next(iter(prompts.values()))
    predicted = [name for one in description.trained_tasks if one.task == task.name for name in one.columns]
    column = next(iter([*getattr(task.target, "columns", ()), *predicted]), None)
    values = {
        "name": task.name,
        "title": {"en": task.summary, "zh": task.summary},
        "summary": {"en": task.summary, "zh": task.summary},
        "inputs": {
            name: {"kind": slot.modality, "title": {"en": name, "zh": name}, "optional": task.optional}
            for name, slot in task.inputs.items()
        },
        "output": task.output_modality,
        "prompt": {language: prompts.get(language, first) for language in LANGUAGES},
        "column": column if task.output_modality == "numbers" else None,
        "decoding": {"text": {"max_tokens": getattr(task.target, "max_tokens", MAX_TOKENS)}},
        "tasks": [task.name],
        "recipe": "config.yaml",
        "examples": {},
        "own_examples": examples,
        "folder": folder,
    }
    return Scenario.model_validate(values, context={"tasks": {task.name: task}})


@dataclass(frozen=True)
class Score:
    """The first metric of a task over one source, and that of its baseline.

    better: metric and information gain are both above those of the baseline; ahead: the metric is.
    """

    metric: str
    value: float
    baseline: float
    better: bool
    ahead: bool = False


Scores = dict[str, list[Score]]  # by task; none for a task that was not evaluated


def read_scores(checkpoint: Path) -> Scores:
    """Return the scores in the report beside a checkpoint or of its run; empty if there is no such report."""
    own = checkpoint / "report.json"
    path = own if own.is_file() else checkpoint.parent.parent / "report.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tasks"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    found: Scores = defaultdict(list)
    for name, entry in entries:
        # An entry without finite numbers does not decide.
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            value, baseline = float(entry["value"]), float(entry["baseline"])
            if math.isfinite(value):
                ahead = float(entry.get("advantage_ci", [0])[0]) > 0
                score = Score(entry["metric"], value, baseline, bool(entry["beats_baseline"]), ahead)
                found[name.partition("/")[0]].append(score)
    return dict(found)


@dataclass(frozen=True)
class Readiness:
    """Whether a model can do a scenario.

    missing: what it lacks, tasks or the column to be predicted; weak: the score of a task that was trained, but is
    not better than its baseline.
    """

    missing: tuple[str, ...]
    recipe: str
    weak: Score | None = None

    @property
    def trained(self) -> bool:
        return not self.missing

    @property
    def ready(self) -> bool:
        return self.trained and self.weak is None

    def text(self, language: Language = "en") -> str:
        en, zh, weak = "ready", "可用", self.weak
        if self.missing:
            en = f"needs training on {', '.join(self.missing)} (openm6 train {self.recipe})"
            zh = f"需要训练：{'、'.join(self.missing)}（openm6 train {self.recipe}）"
        elif weak is not None:
            value = f"{score_text(weak.metric, weak.value)} {metric_title(weak.metric)}"
            baseline = score_text(weak.metric, weak.baseline)
            en = f"trained, but not better than its baseline: {value} against {baseline}"
            zh = f"已训练，但不优于基线：{value}，基线 {baseline}"
            if weak.ahead:
                en = f"trained, but its inputs do not improve its probabilities: {value} against {baseline}"
                zh = f"已训练，但有输入时概率并不更准：{value}，基线 {baseline}"
        return en if language == "en" else zh


def readiness(scenario: Scenario, description: CheckpointConfig, scores: Scores | None = None) -> Readiness:
    """Return what a model lacks for a scenario, by its checkpoint and report; one good source of a task is enough."""
    found = [(scores or {}).get(task, []) for task in scenario.tasks]
    weak = [own[0] for own in found if own and not any(score.better for score in own)]
    return Readiness(_missing(scenario, description), scenario.recipe, weak[0] if weak else None)


def _missing(scenario: Scenario, description: CheckpointConfig) -> tuple[str, ...]:
    """What a model lacks: tasks, data, or the column to be predicted."""
    found = [one for one in description.trained_tasks if one.task in scenario.tasks]
    trained = {one.task for one in found}
    if lacking := tuple(task for task in scenario.tasks if task not in trained):
        return lacking
    read = [str(value) for one in found for value in description.sources.get(one.source, {}).values()]
    if not any(value.endswith(scenario.data) for value in ["", *read]):
        return (f"the data {scenario.data}",)
    # Checkpoints of earlier versions do not list the columns of each task.
    columns = {name for one in found for name in one.columns} or set(description.scales)
    return (f"the column {scenario.column}",) if scenario.column not in (None, *columns) else ()
