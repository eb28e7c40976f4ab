"""`openm6 evaluate`: a checkpoint judged on the test records of the sources it was trained on, or of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openm6.base.config import Config, apply_overrides, build, nearest
from openm6.base.errors import ConfigError, DataError
from openm6.base.files import check_place, replace_text
from openm6.base.plain_json import to_json
from openm6.data.source import SourceConfig
from openm6.data.sources import AnySourceConfig, open_sources
from openm6.evaluate.config import JudgeConfig
from openm6.evaluate.judge import judge
from openm6.evaluate.own_data import open_own_data
from openm6.evaluate.results import Judgement, TaskResult
from openm6.inference.load import Loaded, load
from openm6.models.description import Lesson, ModelDescription


class _Sources(Config):
    """The sources of a recipe, as a checkpoint keeps them."""

    sources: dict[str, AnySourceConfig]


def source_configs(values: dict[str, Any], where: str) -> dict[str, SourceConfig]:
    """Source settings from plain values.

    Raises:
        ConfigError: a kind or key that does not exist.
    """
    return dict(build(_Sources, {"sources": values}, where).sources)


def chosen_lessons(description: ModelDescription, tasks: list[str] | None) -> list[Lesson]:
    """The lessons of a model, or those whose task (or task/source) is named.

    Raises:
        ConfigError: a name that the model was not trained on.
    """
    lessons = list(description.lessons)
    if tasks is None:
        return lessons
    known = {name for lesson in lessons for name in (lesson.task, f"{lesson.task}/{lesson.source}")}
    for name in tasks:
        if name not in known:
            raise ConfigError(f"this model was not trained on task {name!r}; {nearest(name, sorted(known))}")
    return [x for x in lessons if x.task in tasks or f"{x.task}/{x.source}" in tasks]


def evaluate(
    path: Path,
    tasks: list[str] | None = None,
    data: Path | str | None = None,
    json_path: Path | None = None,
    settings: list[str] | None = None,
    tell: Callable[[TaskResult], None] = lambda result: None,
    loaded: Loaded | None = None,
) -> Judgement:
    """Judges a run or checkpoint; `settings` such as `judge.answers=300` override those of its recipe.

    `loaded` is its model where that is in memory already; else it is read from `path`.

    `data` names a table or folder whose records stand in for every test split, as `open_own_data` says; baselines
    are then fitted to it, too, which only makes them harder to beat.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConfigError: an unknown task, or `json_path` lies nowhere.
        DataError: the sources are not where they were.
    """
    if json_path is not None:
        check_place(json_path, "--json")
    loaded = loaded or load(path)
    description = loaded.description
    lessons = chosen_lessons(description, tasks)
    config = _judge_config(description, settings or [])
    configs = source_configs(description.sources, str(loaded.checkpoint))
    if data is not None:
        named = {lesson.source for lesson in lessons}
        train = test = open_own_data(str(data), {name: configs[name] for name in configs if name in named})
        lessons = [lesson for lesson in lessons if lesson.source in test]
    else:
        train, test = open_sources(configs, "train"), open_sources(configs, "test")
    judgement = judge(loaded, lessons, train, test, config, tell)
    if data is not None and not judgement.results:
        raise DataError(
            f"no record of --data {data} can be judged in {', '.join(sorted({x.task for x in lessons}))}: name its "
            "columns as docs/own-data.md names the keys, or choose other --tasks"
        )
    if json_path is not None:
        replace_text(json_path, scores_json(judgement))
    return judgement


def _judge_config(description: ModelDescription, settings: list[str]) -> JudgeConfig:
    values = apply_overrides({"judge": description.judge}, settings)
    if set(values) != {"judge"}:
        raise ConfigError(
            f"evaluate takes settings of the section judge only, as judge.answers=300, not {settings}"
        )
    return build(JudgeConfig, values["judge"], "judge")


def scores_json(judgement: Judgement) -> str:
    """The JSON of `openm6 evaluate --json`: `seconds`, `checkpoint` and `tasks` by name."""
    tasks = {result.name: result.to_json() for result in judgement.results}
    content = {"checkpoint": judgement.checkpoint, "seconds": round(judgement.seconds, 2), "tasks": tasks}
    return to_json(content, indent=1) + "\n"
