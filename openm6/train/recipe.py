"""A recipe of multimodal training: model, tasks, sources, evaluation; and the checks for several ranks."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from openm6.core.config import Config
from openm6.core.errors import ConfigError, nearest
from openm6.data.packing import DEFAULT_ROWS, PackingConfig
from openm6.data.quarantine import MAX_BROKEN
from openm6.data.records import Fields
from openm6.data.source import SourceConfig
from openm6.data.sources import AnySourceConfig, PairsConfig
from openm6.data.table import TableConfig
from openm6.distributed.config import MeshShape, ParallelConfig
from openm6.evaluate.evaluator import EvalConfig
from openm6.evaluate.metrics import metrics_for
from openm6.modalities.pool import PoolConfig
from openm6.modalities.registry import MODALITIES, ModalitiesConfig
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import ModelConfig, build_backbone, preset
from openm6.plan.memory import BY_OPTIMIZER, FULL, HALF, TIERS, tokens_that_fit
from openm6.tasks.own import TaskConfig
from openm6.tasks.registry import all_tasks, unknown_task
from openm6.tasks.task import Task
from openm6.train.config import LoopConfig

RATE_TIMES_WIDTH = 0.46  # of models of which the default learning rate would be too high
MAX_TOKENS = 2**16  # of a step whose size is chosen: a larger one hardly trains faster per token


class MixtureComponent(Config):
    """One component of the mixture: a task over a source, drawn with a weight."""

    source: str
    task: str
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class MultimodalRecipe(Config):
    """What `openm6 train` reads when `kind` is `multimodal`."""

    kind: Literal["multimodal"] = "multimodal"
    model: ModelConfig = ModelConfig()
    modalities: ModalitiesConfig = ModalitiesConfig()
    tasks: dict[str, TaskConfig] = {}  # own ones, besides those that `openm6 tasks` lists
    sources: dict[str, AnySourceConfig]
    mixture: list[MixtureComponent] = Field(min_length=1)
    # Fraction of the examples that are from the mixture of the model that training starts from.
    replay: float = Field(default=0.0, ge=0, lt=1)
    embedding: PoolConfig | None = None  # None: the default one if a task is contrastive, else none
    packing: PackingConfig = PackingConfig()
    loss_weights: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    max_broken: float = Field(default=MAX_BROKEN, ge=0, le=1)  # fraction of records that may be quarantined
    loop: LoopConfig = LoopConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()

    @field_validator("tasks")
    @classmethod
    def _are_new(cls, tasks: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        for name, config in tasks.items():
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise _error_at((name,), f"a task cannot be called {name!r}: use a-z, 0-9 and _", name)
            if name in all_tasks():
                raise _error_at((name,), f"there is a task {name!r} already: choose another name", name)
            known = metrics_for(config.task(name).output_modality)
            for index, metric in enumerate(config.metrics):
                if metric not in known:
                    message = f"no metric of this target is called {metric!r}; {nearest(metric, known)}"
                    raise _error_at((name, "metrics", index), message, metric)
        return tasks

    @field_validator("mixture")
    @classmethod
    def _are_known(cls, mixture: list[MixtureComponent], info: ValidationInfo) -> list[MixtureComponent]:
        known = all_tasks(info.data.get("tasks", {}))
        for index, component in enumerate(mixture):
            if component.task not in known and "tasks" in info.data:
                raise _error_at((index, "task"), unknown_task(component.task, known), component.task)
        return mixture

    @model_validator(mode="after")
    def _read_columns(self) -> Self:
        """Let each table read the columns that own tasks name; a checkpoint keeps them in its sources."""
        sources = dict(self.sources)
        for component in self.mixture:
            if component.task in self.tasks:
                columns = self.tasks[component.task].columns()
                for name in _tables_of(component.source, self.sources):
                    sources[name] = _with_columns(sources[name], columns)
        self.__dict__["sources"] = sources  # the config is frozen for its users
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if self.loop.evaluate_every is not None:
            raise ValueError("loop.evaluate_every is for codecs: set loop.held_out, e.g. held_out: {every: 50}")
        for component in self.mixture:
            if component.source not in self.sources:
                hint = nearest(component.source, sorted(self.sources))
                raise ValueError(f"the mixture names source {component.source!r}, which sources does not hold; {hint}")
        if self.replay and self.model.start is None:
            raise ValueError(f"replay={self.replay} is for the mixture of a start: add model: {{start: RUN}}")
        for name in self.loss_weights:
            if name not in MODALITIES:
                raise ValueError(f"loss_weights names {name!r}; {nearest(name, sorted(MODALITIES))}")
        pairs = [(component.source, component.task) for component in self.mixture]
        twice = next((pair for pair in pairs if pairs.count(pair) > 1), None)
        if twice:
            raise ValueError(f"the mixture names task {twice[1]} over {twice[0]} twice: add up the weights")
        return self

    @property
    def vocabulary(self) -> int:
        text = self.modalities.text
        return text.vocab_size or (text.imported or preset(self.model.preset)).vocab_size

    @property
    def contrastive(self) -> bool:
        """Whether a task of the mixture compares the examples of a batch."""
        return any(self.task(component.task).contrastive for component in self.mixture)

    @property
    def pooling(self) -> PoolConfig | None:
        """Return how the model pools embeddings, if any task of the mixture trains it."""
        return self.embedding or (PoolConfig() if self.contrastive else None)

    @property
    def known_tasks(self) -> Mapping[str, Task]:
        return all_tasks(self.tasks)

    def task(self, name: str) -> Task:
        return self.known_tasks[name]


def _error_at(path: tuple[str | int, ...], message: str, given: str) -> ValidationError:
    """Return an error of a validator at a place within its field."""
    details = InitErrorDetails(type=PydanticCustomError("value", "{said}", {"said": message}), loc=path, input=given)
    return ValidationError.from_exception_data("recipe", [details])


def _tables_of(source: str, sources: Mapping[str, SourceConfig]) -> list[str]:
    """The tables whose records a source of this name reads, both sides of pairs."""
    config = sources.get(source)
    if isinstance(config, PairsConfig):
        # Without itself, as sources may refer to one another in a circle, which opening them reports.
        others = {name: one for name, one in sources.items() if name != source}
        return [name for side in (config.left, config.right) for name in _tables_of(side, others)]
    return [source] if isinstance(config, TableConfig) else []


def _with_columns(config: AnySourceConfig, columns: Mapping[str, Any]) -> AnySourceConfig:
    assert isinstance(config, TableConfig)
    known = config.task_fields.model_dump(exclude_none=True) if config.task_fields is not None else {}
    merged = {
        key: list(dict.fromkeys([*known.get(key, ()), *found])) if isinstance(found, list) else known.get(key, found)
        for key, found in columns.items()
    }
    return config.model_copy(update={"task_fields": Fields(**{**known, **merged})})


def fit_learning_rate(recipe: MultimodalRecipe) -> float:
    """Return the learning rate of AdamW for a model of this width, if the recipe sets none.

    Up to width 460 it is the default; above, it falls with the width, as rates that transfer between widths do (Yang
    et al. 2022, arXiv 2203.03466): at 768 it is that of GPT-3's smallest model (arXiv 2005.14165, table 2.1).
    """
    optimizer = recipe.loop.optimizer
    if "learning_rate" in optimizer.model_fields_set or optimizer.name != "adamw":
        return optimizer.learning_rate
    return min(optimizer.learning_rate, RATE_TIMES_WIDTH / build_backbone(recipe.model).hidden_size)


def fit_batch_size(recipe: MultimodalRecipe, free: float, ranks: int) -> int:
    """Return how many rows a step of `ranks` equal GPUs with `free` bytes each has if `packing.batch_size` is auto.

    The largest power of two per rank that fits by the memory model without activation checkpointing, each rank with
    all weights; up to MAX_TOKENS of a step, and at least the rows of a CPU. An offloaded run has these.
    """
    least = DEFAULT_ROWS if ranks == 1 else max(DEFAULT_ROWS, ranks)
    if recipe.loop.offloaded:
        return least
    config, seq_len = build_backbone(recipe.model), recipe.packing.seq_len
    if recipe.loop.stages is not None:  # layers get weights of their own later
        config = config.model_copy(update={"sharing": None})
    parameters = count_parameters(config).total + recipe.vocabulary * config.hidden_size
    tier = TIERS[BY_OPTIMIZER[recipe.loop.optimizer.name]]
    element = FULL if recipe.loop.precision == "fp32" else HALF
    tokens = tokens_that_fit(config, parameters, tier, element, free, recipe.modalities.image.stem_elements)
    rows = min(tokens, MAX_TOKENS // ranks) // seq_len
    return max(least, ranks * 2 ** max(0, rows.bit_length() - 1))


def check_mesh(recipe: MultimodalRecipe, shape: MeshShape, config: BackboneConfig) -> None:
    """Raise ConfigError if a recipe with a backbone of this config asks for what such a mesh cannot do."""
    rows, loop, chunks = recipe.packing.rows, recipe.loop, recipe.parallel.ep_overlap_chunks
    experts = config.experts
    if config.lora is not None or config.modality_experts:
        raise ConfigError("low-rank adapters and modality experts are trained by one process: leave --nproc out")
    if rows < shape.size:
        raise ConfigError(f"packing.batch_size={rows} leaves some of {shape.size} ranks without a row: raise it")
    steps = loop.offload.gradient_accumulation_steps if loop.offload else 1
    shards = recipe.packing.shards_for(shape.size)
    rows_per_rank = rows // shards * (shards // shape.size)
    if steps > rows_per_rank:
        raise ConfigError(
            f"loop.offload.gradient_accumulation_steps={steps} are more than "
            f"the rows of a rank, of which some have {rows_per_rank}: lower it, or raise packing.batch_size"
        )
    if shape.copies_only:
        return
    if experts is not None and experts.capacity_factor is not None and shards % shape.size:
        raise ConfigError(
            f"experts with a capacity_factor need as many rows on each rank: set packing.batch_size to a multiple of "
            f"{shape.size}, and packing.num_shards too if it is set"
        )
    if loop.compile is True or (loop.offload is not None and loop.offload.compile is True):
        raise ConfigError(
            "blocks that are sharded over ranks cannot be compiled: leave compile at auto, or set "
            "parallel.dp_shard and parallel.ep to 1"
        )
    if experts is not None and shape.ep > 1 and (experts.num_experts // shape.ep) % chunks:
        raise ConfigError(
            f"parallel.ep_overlap_chunks={chunks} cannot divide the {experts.num_experts // shape.ep} experts of a "
            "rank evenly: choose a divisor"
        )
    matrix_rows = (config.hidden_size, experts.intermediate_size) if experts is not None else ()
    if any(number % shape.dp_shard for number in matrix_rows):
        raise ConfigError(
            f"parallel.dp_shard={shape.dp_shard} cannot shard the experts' matrices of "
            f"{' and '.join(map(str, matrix_rows))} rows evenly: choose a divisor"
        )
