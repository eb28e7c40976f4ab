"""Benchmark `rank`: one rank of a large run on this machine, by fraction of offloaded layers.

Experts, attention, norms and updates of the rank are real. The other ranks are emulated by copies: each row is copied
as often as an all-to-all would receive rows from other ranks, and the outputs are gathered. The network and the router
over all experts (below one percent of the operations) are left out.
"""

# Shapes: T tokens of a rank, E' experts of a rank, D width

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Json, Report, Seconds, Steps, device_name
from benchmarks.ranks import NumRanks, Of
from openm6.core.config import build
from openm6.core.device import resolve_device
from openm6.core.errors import ConfigError
from openm6.core.run_folder import RunFolder
from openm6.energy.meter import Meter, open_meter
from openm6.models.config import BackboneConfig
from openm6.models.presets import preset
from openm6.nn.moe import ChunkOfExperts, Meanwhile, TokenDispatcher
from openm6.train.multimodal import MultimodalTraining
from openm6.train.offloaded import OffloadedTrainStep
from openm6.train.recipe import MultimodalRecipe

GIB = 2**30
OFFLOADED = (0.0, 0.25, 0.5, 0.75, 1.0)


class PlayedDispatcher(TokenDispatcher):
    """Give each local expert as many rows as all ranks together would send, by copies of the rank's own rows."""

    is_local = False

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def exchange(
        self, rows: Tensor, counts: Tensor, capacity: int | None, experts: ChunkOfExperts, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        result = meanwhile()
        groups = rows.view(len(counts), -1, rows.shape[-1])  # E' T D: each token goes to every expert here
        arrived = groups.repeat(1, self.copies, 1).flatten(0, 1)
        outputs = experts(0, arrived, counts * self.copies)
        return outputs.view(len(counts), self.copies, -1, outputs.shape[-1]).mean(1).flatten(0, 1), result


@dataclass(frozen=True)
class RankSize:
    """The part of a backbone on one rank, and its rows per step."""

    whole: BackboneConfig
    ranks: int
    rows: int
    length: int
    gradient_accumulation_steps: int

    @property
    def experts_per_rank(self) -> int:
        return self._experts // self.ranks

    @property
    def _experts(self) -> int:
        if self.whole.experts is None or self.whole.experts.num_experts % self.ranks:
            raise ConfigError(
                f"--ranks {self.ranks} cannot hold equal numbers of experts: choose a divisor of their number"
            )
        return self.whole.experts.num_experts

    @property
    def copies(self) -> int:
        """Rows per expert and token of a rank: experts per token · ranks / experts · capacity factor."""
        experts = self.whole.experts
        assert experts is not None
        return max(
            1,
            round(experts.experts_per_token * self.ranks / self._experts * (experts.capacity_factor or 1.0)),
        )

    def recipe(self, num_gpu_layers: int) -> MultimodalRecipe:
        """Return a recipe on texts of the package, with `num_gpu_layers` layers on the device, the others offloaded."""
        own = self.experts_per_rank
        experts = {"num_experts": own, "top_k": own, "num_prototypes": None, "capacity_factor": None}
        kept = self.whole.experts.model_dump() if self.whole.experts is not None else {}
        backbone = {**self.whole.model_dump(exclude_defaults=True), "experts": {**kept, **experts}}
        values = {
            "model": {"preset": "nano", "overrides": backbone},
            "modalities": {"text": {"vocab_size": 2048}},
            "sources": {"words": {"kind": "embedded", "name": "wordnet_en"}},
            "mixture": [{"source": "words", "task": "reverse_dictionary"}],
            "packing": {"batch_size": self.rows, "seq_len": self.length},
            "loop": {
                "optimizer": {"learning_rate": 1e-4, "precision": "bf16-adafactor"},
                "offload": {
                    "num_gpu_layers": num_gpu_layers,
                    "gradient_accumulation_steps": self.gradient_accumulation_steps,
                },
            },
        }
        return build(MultimodalRecipe, values, "bench rank")


def rank_size(name: str, ranks: int, on_gpu: bool) -> RankSize:
    """Return the part of one of `ranks` ranks; without a GPU, of a model of the same form some 1,000 times smaller."""
    whole = preset(name).backbone
    if on_gpu:
        return RankSize(whole, ranks, rows=4, length=1024, gradient_accumulation_steps=4)
    if whole.experts is None:
        raise ConfigError(f"preset {name} has no experts to share among ranks: choose a sparse one, as m6-10t")
    narrow = {"intermediate_size": 64, "num_experts": 4 * ranks}
    if whole.experts.num_prototypes is not None:
        narrow["num_prototypes"] = 4
    small = whole.model_copy(
        update={
            "hidden_size": 64, "num_layers": 4, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "dense": None,
            "experts": whole.experts.model_copy(update=narrow), "moe_layer_freq": 1,
        }
    )  # fmt: skip
    return RankSize(small, ranks, rows=2, length=128, gradient_accumulation_steps=2)


def bench_rank(
    of: Of = "m6-10t",
    ranks: NumRanks = 512,
    steps: Steps = 3,
    seconds: Seconds = 420.0,
    json_path: Json = None,
) -> None:
    """Train the part of one rank of a large model, by fraction of offloaded layers; a small model without a GPU.

    \b
    Example: python -m benchmarks rank --of m6-10t --ranks 512 --json rank.json
    """
    device = resolve_device()
    size = rank_size(of, ranks, device.type == "cuda")
    experts = size.whole.experts
    curve: list[dict[str, Any]] = []
    with Report(json_path, seconds) as report, open_meter() as meter:
        report.update(
            {
                "of": of,
                "ranks": ranks,
                "reduced": device.type != "cuda",
                "layers": size.whole.num_layers,
                "experts_per_rank": size.experts_per_rank,
                "experts": experts.num_experts if experts else 0,
                "tokens_per_step": size.rows * size.length,
                "rows_per_expert": size.copies * size.rows * size.length,
                "curve": curve,
                "device": device_name(device),
            }
        )
        for fraction in OFFLOADED:
            point, report["parameters_per_rank"] = measure_offloaded(size, fraction, steps, device, meter)
            curve.append(point)
            if report.deadline.passed:
                break


def measure_offloaded(
    size: RankSize, offloaded: float, steps: int, device: torch.device, meter: Meter
) -> tuple[dict[str, Any], int]:
    """Return one point of the curve and the parameters of the rank; the first step is a warm-up."""
    layers = size.whole.num_layers
    with tempfile.TemporaryDirectory() as folder:
        recipe = size.recipe(layers - round(layers * offloaded))
        training = MultimodalTraining(recipe, RunFolder.open(folder), device)
        training.omni.backbone.executor.dispatcher = PlayedDispatcher(size.copies)
        train_step = OffloadedTrainStep(training, recipe.loop)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batches = training.batches()
        train_step.update(next(batches), 1, None)
        train_step.store.synchronize()
        times = []
        with meter.span() as span:
            for step in range(2, steps + 2):
                began = time.perf_counter()
                train_step.update(next(batches), step, None)
                train_step.store.synchronize()
                times.append(time.perf_counter() - began)
        parameters = sum(layout.num_parameters for layout in train_step.store.layouts)
        train_step.close()
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return {
        "offloaded": offloaded,
        "seconds_per_step": statistics.median(times),
        "peak_gpu_gib": peak,
        "joules_per_step": span.joules / steps,
        "joules_source": span.source,
    }, parameters
