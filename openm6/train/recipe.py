"""A recipe of multimodal training: model, tasks, sources, evaluation; and the checks for several ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from openm6.core.config import Config
from openm6.core.errors import ConfigError, nearest
from openm6.data.packing import DEFAULT_ROWS, PackingConfig
from openm6.data.quarantine import MAX_BROKEN
from openm6.data.sources import AnySourceConfig
from openm6.distributed.config import MeshShape, ParallelConfig
from openm6.evaluate.evaluator import EvalConfig
from openm6.modalities.pool import PoolConfig
from openm6.modalities.registry import MODALITIES, ModalitiesConfig
from openm6.models.config import BackboneConfig, count_parameters
from openm6.models.presets import ModelConfig, build_backbone, preset
from openm6.plan.memory import BY_OPTIMIZER, FULL, HALF, TIERS, tokens_that_fit
from openm6.tasks.registry import TASKS, unknown_task
from openm6.train.config import LoopConfig

MAX_TOKENS = 2**16  # of a step whose size is chosen: a larger one hardly trains faster per token


class MixtureComponent(Config):
    """One component of the mixture: a task over a source, drawn with a weight."""

    source: str
    task: str
    weight: float = Field(default=1.0, gt=0)

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        if task not in TASKS:
            raise ValueError(unknown_task(task))
        return task


class MultimodalRecipe(Config):
    """What `openm6 train` reads when `kind` is `multimodal`."""

    kind: Literal["multimodal"] = "multimodal"
    model: ModelConfig = ModelConfig()
    modalities: ModalitiesConfig = ModalitiesConfig()
    sources: dict[str, AnySourceConfig]
    mixture: list[MixtureComponent] = Field(min_length=1)
    embedding: PoolConfig | None = None  # None: the default one if a task is contrastive, else none
    packing: PackingConfig = PackingConfig()
    loss_weights: dict[str, float] = {}
    max_broken: float = Field(default=MAX_BROKEN, ge=0, le=1)  # fraction of records that may be quarantined
    loop: LoopConfig = LoopConfig()
    parallel: ParallelConfig = ParallelConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> MultimodalRecipe:
        for component in self.mixture:
            if component.source not in self.sources:
                hint = nearest(component.source, sorted(self.sources))
                raise ValueError(f"the mixture names source {component.source!r}, which sources does not hold; {hint}")
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
        """Return the size of the tokenizer's vocabulary."""
        return self.modalities.text.vocab_size or preset(self.model.preset).vocab_size

    @property
    def pooling(self) -> PoolConfig | None:
        """Return how the model pools embeddings, if any task of the mixture trains it."""
        contrastive = any(TASKS[component.task].contrastive for component in self.mixture)
        return self.embedding or (PoolConfig() if contrastive else None)


def fit_batch_size(recipe: MultimodalRecipe, free: float, ranks: int) -> int:
    """Return how many rows a step of `ranks` equal GPUs with `free` bytes each has if `packing.batch_size` is auto.

    The largest power of two per rank that fits by the memory model without activation checkpointing, each rank with
    all weights; up to MAX_TOKENS of a step, and at least the rows of a CPU. An offloaded run has these.
    """
    least = DEFAULT_ROWS if ranks == 1 else max(DEFAULT_ROWS, ranks)
    if recipe.loop.offloaded:
        return least
    config, seq_len = build_backbone(recipe.model), recipe.packing.seq_len
    parameters = count_parameters(config).total + recipe.vocabulary * config.hidden_size
    tier = TIERS[BY_OPTIMIZER[recipe.loop.optimizer.name]]
    element = FULL if recipe.loop.precision == "fp32" else HALF
    rows = min(tokens_that_fit(config, parameters, tier, element, free) // seq_len, MAX_TOKENS // ranks // seq_len)
    return max(least, ranks * 2 ** max(0, rows.bit_length() - 1))


def check_mesh(recipe: MultimodalRecipe, shape: MeshShape, config: BackboneConfig) -> None:
    """Raise ConfigError if a recipe with a backbone of this config asks for what such a mesh cannot do."""
    rows, loop, chunks = recipe.packing.rows, recipe.loop, recipe.parallel.ep_overlap_chunks
    experts = config.experts
    if rows < shape.size:
        raise ConfigError(f"packing.batch_size={rows} leaves some of {shape.size} ranks without a row: raise it")
    steps, rows_per_rank = loop.offload.gradient_accumulation_steps if loop.offload else 1, rows // shape.size
    if steps > rows_per_rank:
        raise ConfigError(
            f"loop.offload.gradient_accumulation_steps={steps} are more than "
            f"the rows of a rank, of which some have {rows_per_rank}: lower it, or raise packing.batch_size"
        )
    if shape.copies_only:
        return
    if experts is not None and experts.capacity_factor is not None and rows % shape.size:
        raise ConfigError(
            f"experts with a capacity_factor need as many rows on each rank: set packing.batch_size to a multiple "
            f"of {shape.size}"
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
