"""`openm6 evaluate`: a checkpoint on the test records of the sources it was trained on, or on a file or folder."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from openm6.core.config import Config, apply_overrides, build
from openm6.core.errors import ConfigError, DataError, nearest
from openm6.core.files import check_writable, replace_text, to_json
from openm6.core.log import get_log
from openm6.data.chat import ChatConfig
from openm6.data.media import FolderConfig, data_config
from openm6.data.source import Source, SourceConfig
from openm6.data.sources import AnySourceConfig, open_sources
from openm6.data.table import TableConfig
from openm6.data.windows import WindowsConfig
from openm6.evaluate.evaluator import EvalConfig, evaluate_tasks
from openm6.evaluate.results import EvalReport, TaskResult
from openm6.inference.load import LoadedModel, load, precision_of
from openm6.models.description import CheckpointConfig, TrainedTask


class _Sources(Config):
    sources: dict[str, AnySourceConfig]


def source_configs(values: dict[str, Any], where: str) -> dict[str, SourceConfig]:
    """Source settings from plain values; ConfigError for a kind or key that does not exist."""
    return dict(build(_Sources, {"sources": values}, where).sources)


def chosen_tasks(description: CheckpointConfig, tasks: list[str] | None, of_start: bool = False) -> list[TrainedTask]:
    """The tasks whose task (or task/source) is named; by default those trained after a start, and with `of_start` all.

    ConfigError: a name is unknown.
    """
    if tasks is None:
        return [one for one in description.trained_tasks if of_start or not one.of_start]
    names = [{one.task, f"{one.task}/{one.source}"} for one in description.trained_tasks]
    known = sorted(set().union(*names))
    for name in tasks:
        if name not in known:
            raise ConfigError(f"this model was not trained on task {name!r}; {nearest(name, known)}")
    return [one for one, own in zip(description.trained_tasks, names, strict=True) if own & set(tasks)]


def evaluate(
    path: Path,
    tasks: list[str] | None = None,
    data: Path | str | None = None,
    json_path: Path | None = None,
    settings: list[str] | None = None,
    on_result: Callable[[TaskResult], None] = lambda result: None,
    loaded: LoadedModel | None = None,
    device: str = "auto",
    num_gpu_layers: int | None = None,
    dtype: str = "auto",
) -> EvalReport:
    """Evaluate a run or checkpoint; `settings` such as `eval.answers=300` override those of its recipe.

    `loaded` is its model if that is in memory already; else it is read from `path`, see `load` for `device`,
    `num_gpu_layers` and `dtype` (auto is fp32). `data` names a table or folder whose records replace every test split
    (`open_own_data`); baselines are then fitted to it, too, which only makes them harder to beat.

    Raises:
        CheckpointError, ConfigError, DataError: the checkpoint, a setting or name, or the sources cannot be used.
    """
    if json_path is not None:
        check_writable(json_path, "--json")
    loaded = loaded or load(path, device, num_gpu_layers, precision=precision_of(dtype))
    description = loaded.description
    values = apply_overrides({"eval": description.eval}, settings or [])
    if set(values) != {"eval"}:
        raise ConfigError(f"evaluate takes settings of the section eval only, as eval.answers=300, not {settings}")
    config = build(EvalConfig, values["eval"], "eval")
    trained_tasks = chosen_tasks(description, tasks, config.of_start)
    configs = source_configs(description.sources, str(loaded.checkpoint))
    used = dict.fromkeys(one.source for one in trained_tasks)
    if data is not None:
        train = test = open_own_data(str(data), {name: configs[name] for name in configs if name in used})
        trained_tasks = [one for one in trained_tasks if one.source in test]
    else:
        train, test = open_sources(configs, "train", used), open_sources(configs, "test", used)
    report = evaluate_tasks(loaded, trained_tasks, train, test, config, on_result)
    if data is not None and not report.results:
        raise DataError(
            f"no record of --data {data} can be evaluated in {', '.join(sorted({x.task for x in trained_tasks}))}: "
            "name its columns as docs/own-data.md names the keys, or choose other --tasks"
        )
    if json_path is not None:
        scores = {result.name: result.to_json() for result in report.results}
        content = {"checkpoint": report.checkpoint, "seconds": round(report.seconds, 2), "tasks": scores}
        replace_text(json_path, to_json(content, indent=1) + "\n")
    return report


def open_own_data(path: str, trained: Mapping[str, SourceConfig]) -> dict[str, Source]:
    """The data of `--data` as a replacement of each source that the model was trained on.

    The test rows if a column (or folder) marks them, else all rows. The settings of the trained source, such as
    `fields`, are used if the columns fit, else canonical column names. A source that cannot be replaced is left out;
    DataError if all are, or nothing at the path can be read.
    """
    plain = data_config(path)
    opened: dict[str, Source] = {}
    failures: list[DataError] = []
    for name, config in trained.items():
        errors = []
        for candidate in _candidates(plain, config):
            try:
                opened[name] = candidate.open_held_out(name)
                break
            except DataError as error:
                errors.append(error)
        else:
            # The error of the first is the closest to the training; a folder cannot be read as windows at all.
            failures.append(errors[0] if errors else DataError(f"{name} takes windows of a table, not a folder"))
    if not opened:
        raise DataError(f"--data {path} can stand in for no source of this model: {failures[0]}")
    for failure in failures:
        get_log().info(f"--data {path}: {failure}")
    return opened


def _candidates(
    plain: TableConfig | FolderConfig, trained: SourceConfig
) -> Iterator[TableConfig | FolderConfig | WindowsConfig]:
    """Ways to read the data, closest to the training first."""
    here = {"path": plain.path}
    if isinstance(trained, WindowsConfig):
        if isinstance(plain, TableConfig):
            yield trained.model_copy(update=here)
        return
    if isinstance(trained, FolderConfig) and isinstance(plain, FolderConfig):
        yield trained.model_copy(update=here)
        return
    if isinstance(trained, TableConfig) and isinstance(plain, TableConfig):
        if trained.kind == plain.kind or isinstance(trained, ChatConfig):
            # As its test table, it is read with the decimal marks of the training table.
            yield trained.model_copy(update={"test_path": plain.path})
        kept = {name: getattr(trained, name) for name in ("task_fields", "target", "split")}
        plain = plain.model_copy(update=kept)
        yield plain.model_copy(update={"fields": trained.fields})
    yield plain
