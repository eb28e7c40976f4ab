"""Scenarios: uses of a model with inputs, prompt, decoding settings, tasks and an example that runs.

Here are their schema, the library of those in the package, and what a model can do of them by its trained tasks and by
the report of its run.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from openm6.core.config import Config, build, read_yaml
from openm6.core.errors import ConfigError
from openm6.evaluate.metrics import metric_title
from openm6.evaluate.metrics import score as score_text
from openm6.inference.sampling import Decoding
from openm6.models.description import CheckpointConfig
from openm6.tasks.own import SomeNumbers
from openm6.tasks.registry import all_tasks, unknown_task
from openm6.tasks.slots import MAX_TOKENS
from openm6.tasks.task import Task

FOLDER = Path(__file__).parent / "library"

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
InputKind = Literal["text", "image", "audio", "numbers", "series", "candidates", "box", "span"]
Output = Literal["text", "image", "audio", "numbers", "ranking", "embedding"]
# The others steer the answer.
PROMPTED: tuple[InputKind, ...] = ("text", "image", "audio", "numbers", "series")
SLOT = re.compile(r"\{(\w+)\}")


class Bilingual(Config):
    """The same in both languages."""

    en: str = Field(min_length=1)
    zh: str = Field(min_length=1)

    def text(self, language: Language) -> str:
        return self.en if language == "en" else self.zh


KINDS: dict[InputKind, Bilingual] = {
    "text": Bilingual(en="Text", zh="文本"),
    "image": Bilingual(en="Image", zh="图片"),
    "audio": Bilingual(en="Audio", zh="声音"),
    "numbers": Bilingual(en="Numbers", zh="数值"),
    "series": Bilingual(en="Series", zh="序列"),
    "candidates": Bilingual(en="Candidates", zh="候选"),
    "box": Bilingual(en="Box", zh="区域"),
    "span": Bilingual(en="Span", zh="区间"),
}


class Input(Config):
    """One input; without a title it is called after its kind."""

    kind: InputKind
    title: Bilingual | None = None

    @property
    def label(self) -> Bilingual:
        return self.title or KINDS[self.kind]


class Scenario(Config):
    """One use.

    prompt: the words of a trained task; `{name}` is the slot of an input, `{column}` the column that is predicted
    ahead: steps of a series that are forecast; column: the column that is predicted
    tasks: what a model must have been trained on; recipe: the shipped one that trains it
    examples: inputs to try, for each language, or none; images and audio are named as `data#id` (see run.py)
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
    recipe: str
    examples: dict[Language, dict[str, Any]]

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
        return self

    def kind_of(self, kind: InputKind) -> str | None:
        """Return the name of the first input of a kind."""
        return next((name for name, declared in self.inputs.items() if declared.kind == kind), None)


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


def library_of(description: CheckpointConfig) -> ScenarioLibrary:
    """Return the scenarios of the package and, as one more domain, one for each own task of a model."""
    library = read_library()
    known = all_tasks(description.tasks)
    own = [_own_scenario(known[name], known) for name in description.tasks]
    if not own:
        return library
    domain = Domain(title=Bilingual(en="Own tasks", zh="自定义任务"), scenarios=own)
    return ScenarioLibrary({**library.domains, "own": domain})


def _own_scenario(task: Task, known: Mapping[str, Task]) -> Scenario:
    """The scenario of an own task: its inputs, its first prompts, its target; without examples."""
    prompts = {language: found[0] for language, found in task.prompts.items()}
    first = next(iter(prompts.values()))
    values = {
        "name": task.name,
        "title": {"en": task.summary, "zh": task.summary},
        "summary": {"en": task.summary, "zh": task.summary},
        "inputs": {
            name: {"kind": slot.modality, "title": {"en": name, "zh": name}} for name, slot in task.inputs.items()
        },
        "output": task.output_modality,
        "prompt": {language: prompts.get(language, first) for language in LANGUAGES},
        "column": task.target.columns[0] if isinstance(task.target, SomeNumbers) else None,
        "decoding": {"text": {"max_tokens": getattr(task.target, "max_tokens", MAX_TOKENS)}},
        "tasks": [task.name],
        "recipe": "config.yaml",
        "examples": {},
    }
    return Scenario.model_validate(values, context={"tasks": known})


@dataclass(frozen=True)
class Score:
    """The first metric of a task over one source, and that of its baseline."""

    metric: str
    value: float
    baseline: float
    better: bool


Scores = dict[str, list[Score]]  # by task; none for a task that was not evaluated


def read_scores(checkpoint: Path) -> Scores:
    """Return the scores in the report of the run of a checkpoint; empty if there is no such report."""
    path = checkpoint.parent.parent / "report.json"
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
                score = Score(entry["metric"], value, baseline, bool(entry["beats_baseline"]))
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
        """Whether the scenario may be used at all."""
        return not self.missing

    @property
    def ready(self) -> bool:
        """Whether it is trained and better than its baseline."""
        return self.trained and self.weak is None

    def text(self, language: Language = "en") -> str:
        """Return `ready`, what is needed, or the scores."""
        en, zh, weak = "ready", "可用", self.weak
        if self.missing:
            en = f"needs training on {', '.join(self.missing)} (openm6 train {self.recipe})"
            zh = f"需要训练：{'、'.join(self.missing)}（openm6 train {self.recipe}）"
        elif weak is not None:
            value = f"{score_text(weak.metric, weak.value)} {metric_title(weak.metric)}"
            baseline = score_text(weak.metric, weak.baseline)
            en = f"trained, but not better than its baseline: {value} against {baseline}"
            zh = f"已训练，但不优于基线：{value}，基线 {baseline}"
        return en if language == "en" else zh


def readiness(scenario: Scenario, description: CheckpointConfig, scores: Scores | None = None) -> Readiness:
    """Return what a model lacks for a scenario, by its checkpoint and report; one good source of a task is enough."""
    trained = {trained_task.task for trained_task in description.trained_tasks}
    missing = [task for task in scenario.tasks if task not in trained]
    if not missing and scenario.column is not None and scenario.column not in description.scales:
        missing = [f"the column {scenario.column}"]
    found = [(scores or {}).get(task, []) for task in scenario.tasks]
    weak = [own[0] for own in found if own and not any(score.better for score in own)]
    return Readiness(tuple(missing), scenario.recipe, weak[0] if weak else None)
