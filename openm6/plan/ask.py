"""From words of the command line to a question, a machine and an answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openm6.base.config import build
from openm6.base.energy.config import EnergyConfig
from openm6.base.errors import ConfigError
from openm6.plan.cluster import Cluster, ClusterOptions, gpu_cluster
from openm6.plan.hardware import Gpu, gpu, gpus
from openm6.plan.plan import Plan, make_plan
from openm6.plan.question import Question, read_model
from openm6.plan.smallest import answer, check_bytes


@dataclass(frozen=True)
class Asked:
    """The machine asked about: a GPU of the table with the cluster's sizes."""

    gpu: Gpu
    known: tuple[Gpu, ...]
    options: ClusterOptions

    def cluster(self) -> Cluster:
        """What the plan is made for."""
        return gpu_cluster(self.gpu, self.options)


def read_machine(kind: str | None, table: Path | None, options: ClusterOptions) -> Asked:
    """The machine by the words of the command line.

    Raises:
        ConfigError: no GPU was named, no such GPU, or a table that cannot be read.
    """
    if kind is None:
        raise ConfigError("name the kind of GPU, as --gpu h100-80gb")
    return Asked(gpu(kind, table), tuple(gpus(table).values()), options)


def read_question(
    model: str | None,
    overrides: list[str],
    batch: int | None = None,
    tokens: float | None = None,
    days: float | None = None,
    bytes_per_parameter: int | None = None,
    pseudo_share: float = 0.0,
    recompute_every: int | None = None,
    energy: dict[str, Any] | None = None,
) -> Question:
    """The question by the words of the command line.

    Raises:
        ConfigError: no model was named, or a number that cannot be.
    """
    if model is None:
        raise ConfigError("name a preset or a recipe to plan, as openm6 plan small --gpu h100-80gb")
    check_bytes(bytes_per_parameter)
    return Question(
        read_model(model, overrides),
        batch=batch,
        tokens=tokens,
        days=days,
        bytes_per_parameter=bytes_per_parameter,
        pseudo_share=pseudo_share,
        recompute_every=recompute_every,
        energy=build(EnergyConfig, energy or {}, "the options of energy"),
    )


def answer_question(question: Question, asked: Asked) -> tuple[Plan, dict[str, Any]]:
    """The plan and its JSON, with the smallest machine that would do."""
    plan = make_plan(question, asked.cluster())
    content = plan.to_json()
    content["smallest"] = answer(question, plan, asked.gpu, asked.options, list(asked.known))
    return plan, content
