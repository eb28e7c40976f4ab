"""What several ranks cannot do: the same one sentence on every rank, before any of them waits for another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from openm6.core.errors import ConfigError, OpenM6Error
from openm6.core.run_folder import RunFolder
from openm6.distributed.config import MeshShape
from openm6.distributed.processes import DistributedContext
from openm6.models.presets import build_backbone
from openm6.train import run as running
from openm6.train.loop import train
from openm6.train.multimodal import MultimodalTraining
from openm6.train.recipe import check_mesh
from openm6.train.run import read_recipe
from tests.checkpoint.test_sharded import wait_for
from tests.distributed.fleet import Fleet
from tests.distributed.recording_training import run_steps
from tests.distributed.test_process_group import CPU
from tests.train.tiny_recipe import tiny_recipe, write_recipe


def recipe_file(folder: Path) -> str:
    recipe = tiny_recipe(steps=4, save_every=2, num_processes=1)
    recipe["packing"] = {"batch_size": 3, "seq_len": 160}
    return write_recipe(folder, recipe)


def reported(recipe: str, folder: str, settings: list[str], odd: str) -> str:
    """The sentence with which this rank stops; `odd` is what sets rank 1 apart."""
    ranks = DistributedContext(CPU, 60)
    version = running.__version__
    if odd == "version" and ranks.rank == 1:
        running.__version__ = "0.0.1"
    own = [*settings, "loop.seed=7"] if odd == "recipe" and ranks.rank == 1 else settings
    try:
        checked, values = read_recipe(Path(recipe), own)
        running._check_alike(ranks, values)
        training = MultimodalTraining(checked, RunFolder.open(folder), CPU, ranks)
        train(training, checked.loop, RunFolder.open(folder), resume=True)
    except OpenM6Error as error:
        return str(error)
    finally:
        running.__version__ = version
    return "nothing"


@pytest.mark.parametrize(
    ("settings", "odd", "sentence"),
    [
        (["parallel.dp_replicate=3"], "", "dp_replicate=3 × dp_shard=1 × ep=1 is 3 ranks, but 2 run"),
        (["parallel.ep=2", "model.overrides.experts.num_experts=5"], "", "cannot distribute 5 experts evenly"),
        (["parallel.ep=2", "parallel.ep_overlap_chunks=3"], "", "chunks=3 cannot divide the 2 experts of a rank"),
        (["packing.batch_size=1"], "", "packing.batch_size=1 leaves some of 2 ranks without a row"),
        (["parallel.dp_shard=2", "loop.compile=true"], "", "cannot be compiled: leave compile at auto"),
        (["parallel.ep=2", "model.overrides.experts.capacity_factor=2.0"], "", "packing.batch_size to a multiple of 2"),
        (["loop.offload={num_gpu_layers: 0, gradient_accumulation_steps: 2}"], "", "more than the rows of a rank"),
        ([], "recipe", "rank 1 was started with another recipe than rank 0"),
        ([], "version", "rank 1 runs OpenM6 0.0.1"),
    ],
)  # fmt: skip
def test_every_rank_stops_with_the_same_sentence(
    settings: list[str], odd: str, sentence: str, tmp_path: Path, two: Fleet
) -> None:
    first, second = two.run(reported, recipe_file(tmp_path), str(tmp_path / "run"), settings, odd)
    assert first == second and sentence in first and "\n" not in first
    two.run(dist.barrier)  # nobody hangs in what came before


def test_experts_whose_rows_cannot_be_sharded_evenly_are_refused(tmp_path: Path) -> None:
    checked, _ = read_recipe(Path(recipe_file(tmp_path)), [])
    with pytest.raises(ConfigError, match="dp_shard=3 cannot shard the experts' matrices of 64 and 64 rows evenly"):
        check_mesh(checked, MeshShape(1, 3, 1), build_backbone(checked.model))


def test_a_checkpoint_that_lacks_a_part_stops_every_rank(tmp_path: Path, two: Fleet) -> None:
    recipe, run = recipe_file(tmp_path), tmp_path / "run"
    axes: dict[str, Any] = {"dp_replicate": 1, "dp_shard": 1, "ep": 2}
    two.run(run_steps, recipe, str(run), tuple(axes.values()), 1, 4)
    damaged = wait_for(run, 2)
    for other in damaged.parent.glob("step-[!2]"):
        shutil.rmtree(other)
    next(damaged.glob("shard-00002-*")).unlink()
    settings = [f"parallel.{name}={size}" for name, size in axes.items()]
    first, second = two.run(reported, recipe, str(run), settings, "")
    assert first == second and "shard-00002" in first and "is missing or cut short" in first
