"""What a recipe may not ask of several ranks, found before anything is laid out; one sentence each."""

from __future__ import annotations

from openm6.base.errors import ConfigError
from openm6.models.config import BackboneConfig
from openm6.parallel.config import MeshShape
from openm6.train.config import LoopConfig
from openm6.train.recipe import MultimodalRecipe


def check_cut(recipe: MultimodalRecipe, shape: MeshShape, config: BackboneConfig) -> None:
    """Raises ConfigError where a recipe for a backbone of this config asks for what cannot be done on such a mesh."""
    _check_rows(recipe, shape, config)
    if shape.copies_only:
        return
    _check_compiling(recipe.loop)
    _check_parts(recipe.parallel.parts, shape, config)


def _check_rows(recipe: MultimodalRecipe, shape: MeshShape, config: BackboneConfig) -> None:
    rows, streaming = recipe.packing.rows, recipe.loop.streaming
    if rows < shape.size:
        raise ConfigError(f"packing.rows={rows} leaves some of {shape.size} ranks without a row: raise it")
    least = rows // shape.size
    if streaming is not None and streaming.micro_batches > least:
        raise ConfigError(
            f"loop.streaming.micro_batches={streaming.micro_batches} are more than the rows of a rank, of which "
            f"some have {least}: lower it, or raise packing.rows"
        )
    capacity = None if config.experts is None else config.experts.capacity
    if capacity is not None and rows % shape.size and not shape.copies_only:
        raise ConfigError(
            f"experts with a capacity need as many rows on each rank: set packing.rows to a multiple of {shape.size}"
        )


def _check_compiling(loop: LoopConfig) -> None:
    if loop.compile is True or (loop.streaming is not None and loop.streaming.compile is True):
        raise ConfigError(
            "blocks that are cut over ranks cannot be compiled: leave compile at auto, or set parallel.shard and "
            "parallel.experts to 1"
        )


def _check_parts(parts: int, shape: MeshShape, config: BackboneConfig) -> None:
    if shape.experts == 1 or config.experts is None:
        return
    here = config.experts.num_experts // shape.experts
    if here % parts:
        raise ConfigError(
            f"parallel.parts={parts} cannot cut the {here} experts of a rank evenly: choose a divisor"
        )
