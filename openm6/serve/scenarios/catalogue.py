"""Reading the scenarios that come with the package (or a folder of one's own), and what a model can do of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openm6.base.config import build, nearest, read_yaml
from openm6.base.errors import ConfigError
from openm6.models.description import ModelDescription
from openm6.serve.scenarios.scenario import Domain, Language, Scenario
from openm6.serve.scenarios.scores import Score, Scores

LIBRARY = Path(__file__).parent / "library"


@dataclass(frozen=True)
class Catalogue:
    """All scenarios by name, and the domains they stand in."""

    domains: dict[str, Domain]

    @property
    def scenarios(self) -> dict[str, Scenario]:
        """Every scenario by its name, in the order of the files."""
        return {scenario.name: scenario for domain in self.domains.values() for scenario in domain.scenarios}

    def named(self, name: str) -> Scenario:
        """The scenario of this name.

        Raises:
            ConfigError: there is none; the sentence names the nearest.
        """
        found = self.scenarios
        if name not in found:
            raise ConfigError(f"no scenario is called {name!r}; {nearest(name, sorted(found))}")
        return found[name]

    def domain_of(self, name: str) -> str:
        """The domain that holds a scenario."""
        return next(key for key, domain in self.domains.items() if name in {s.name for s in domain.scenarios})


def read_catalogue(folder: Path = LIBRARY) -> Catalogue:
    """The scenarios in the YAML files of a folder, one domain a file.

    Raises:
        ConfigError: a file is not as `Domain` says, or two scenarios share a name.
    """
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise ConfigError(f"{folder} holds no scenarios: put YAML files there")
    domains = {path.stem: build(Domain, read_yaml(path), str(path)) for path in paths}
    names = [scenario.name for domain in domains.values() for scenario in domain.scenarios]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two scenarios in {folder} are called {twice!r}: rename one")
    return Catalogue(domains)


@dataclass(frozen=True)
class Standing:
    """Whether a model can do a scenario.

    missing: what it lacks, tasks or the column to be predicted; weak: the score of a task that was trained, but is
    not better than its baseline.
    """

    missing: tuple[str, ...]
    recipe: str
    weak: Score | None = None

    @property
    def trained(self) -> bool:
        """Whether it can be asked at all."""
        return not self.missing

    @property
    def ready(self) -> bool:
        """Whether its answers are worth asking for."""
        return self.trained and self.weak is None

    def said(self, language: Language = "en") -> str:
        """`ready`, what is needed, or what it scores."""
        if self.missing and language == "en":
            return f"needs training on {', '.join(self.missing)} (openm6 train {self.recipe})"
        if self.missing:
            return f"需要训练：{'、'.join(self.missing)}（openm6 train {self.recipe}）"
        if self.weak is not None:
            value, baseline = self.weak.said()
            if language == "en":
                return f"trained, but not better than its baseline: {value} against {baseline}"
            return f"已训练，但不优于基线：{value}，基线 {baseline}"
        return "ready" if language == "en" else "可用"


def standing(scenario: Scenario, description: ModelDescription, scores: Scores | None = None) -> Standing:
    """What a model lacks for a scenario, by the tasks and columns that its checkpoint records and by its report.

    A task over several sources is good enough if it is on one of them; one that was not evaluated is not doubted.
    """
    learned = {lesson.task for lesson in description.lessons}
    missing = [task for task in scenario.tasks if task not in learned]
    if not missing and scenario.column is not None and scenario.column not in description.scales:
        missing = [f"the column {scenario.column}"]
    found = [(scores or {}).get(task, []) for task in scenario.tasks]
    weak = [own[0] for own in found if own and not any(score.better for score in own)]
    return Standing(tuple(missing), scenario.recipe, weak[0] if weak else None)


def require(scenario: Scenario, description: ModelDescription) -> None:
    """Raises ConfigError, saying what is needed, where a model was not trained for a scenario."""
    found = standing(scenario, description)
    if not found.trained:
        raise ConfigError(f"scenario {scenario.name} {found.said()}: train it, or choose another scenario")
