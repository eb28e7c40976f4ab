"""Short runs that tie the sums of measured parts to whole steps: what a step, a process and the watts really are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openm6.base.errors import TrainingError
from openm6.base.log import get_log
from openm6.bench.fitting import Point, fit
from openm6.bench.measure import Deadline
from openm6.bench.probe import TEXT_ONLY, WARMING, Probe, run_probe
from openm6.plan.ceilings import Ceilings, Way
from openm6.plan.examples import Load
from openm6.plan.machine import machine_cluster
from openm6.plan.measured import expert_processes, load_of
from openm6.plan.plan import StagePlan, make_plan
from openm6.plan.question import Model, Question, model_of_recipe
from openm6.train.run import read_recipe, recipe_path

LENGTH, FEWEST, MOST = 5.0, 8, 16  # seconds of the steps that are measured, and how many these may be
LAST_RUN = 25.0  # seconds that one more run may take
ALONE = "loop.workers=1"


def sizes(width: int, layers: int) -> list[str]:
    """Settings of a model with heads of 64."""
    return [
        f"model.overrides.width={width}",
        f"model.overrides.num_heads={width // 64}",
        f"model.overrides.num_layers={layers}",
    ]


def dense(hidden: int, ffn: str = "swiglu") -> list[str]:
    """Settings of a model without experts."""
    return ["model.overrides.experts=null", f"model.overrides.dense={{hidden: {hidden}, ffn: {ffn}}}"]


def streamed(bytes_: int, micro_batches: int = 1, recompute_every: int = 1) -> list[str]:
    """Settings of a run whose blocks are all streamed, at so many bytes a parameter."""
    words = f"resident: 0, micro_batches: {micro_batches}, recompute_every: {recompute_every}"
    return [f"loop.streaming={{{words}}}", f"loop.optimizer.bytes_per_parameter={bytes_}"]


# Few and many tokens, small and larger models, all modalities and text alone, in both ways of sharing the cores.
ANCHORS: tuple[list[str], ...] = (
    ["packing.rows=2"],
    [*TEXT_ONLY, "packing.rows=4", *streamed(16)],
    ["packing.rows=8"],
    [*TEXT_ONLY, "packing.rows=6"],
    ["packing.rows=4", *sizes(320, 6), *streamed(2, micro_batches=2)],
    ["packing.rows=4", *sizes(384, 6)],
    ["packing.rows=4", ALONE],
    [*TEXT_ONLY, "packing.rows=4", *sizes(320, 4), *dense(1024)],
    [*TEXT_ONLY, "packing.rows=8", *sizes(256, 6), *dense(1024), *streamed(4, recompute_every=2)],
    ["packing.rows=5", *sizes(192, 6), *dense(512)],
    [*TEXT_ONLY, "packing.rows=3", *sizes(256, 4)],
)


@dataclass(frozen=True)
class Anchor:
    """The settings of a short run and what it took."""

    words: list[str]
    probe: Probe


def run_anchor(words: list[str], ceilings: Ceilings) -> Anchor:
    """Runs it, for as many steps as a few seconds hold."""
    return Anchor(words, run_probe(words, steps_for(planned(words, ceilings))))


def run_anchors(ceilings: Ceilings, deadline: Deadline) -> list[Anchor]:
    """All anchors for which there is time; one that fails, or that others disturb, is told of."""
    found: list[Anchor] = []
    for number, words in enumerate(ANCHORS, 1):
        if deadline.left < LAST_RUN:
            get_log().warning(
                f"out of time: {len(ANCHORS) - number + 1} of {len(ANCHORS)} anchors are missing"
            )
            break
        try:
            found.append(run_anchor(words, ceilings))
        except TrainingError as error:
            get_log().warning(f"anchor {number}: {error}")
            continue
        if found[-1].probe.disturbed:
            get_log().warning(
                f"anchor {number} was disturbed by other work: measure again on a quiet machine"
            )
    return found


def steps_for(stage: StagePlan) -> int:
    """Steps of a probe, those that warm it up included."""
    return WARMING + 1 + max(FEWEST, min(MOST, round(LENGTH / stage.time.seconds)))


def model_of(words: list[str]) -> Model:
    """The model of a probe's run."""
    _, values = read_recipe(recipe_path("demo"), words)
    return model_of_recipe("probe", values)


def planned(words: list[str], ceilings: Ceilings) -> StagePlan:
    """The plan of a probe's run on the processor of the ceilings' machine.

    It takes few steps, and remembers what they need before it is measured: nothing comes on top.
    """
    return make_plan(Question(model_of(words), steps=0), machine_cluster(ceilings, processor=True)).real


def way_name(words: list[str]) -> str:
    """How a probe's run shares the cores."""
    model = model_of(words)
    return "alone" if model.streamed or model.workers == 1 else "team"


def anchor(ceilings: Ceilings, anchors: Sequence[Anchor]) -> Ceilings:
    """The ceilings with the numbers of each way under which its anchors are planned as they ran; a way with fewer than
    two anchors keeps its own.
    """
    plain, training = _without_anchors(ceilings), ceilings.training
    fitted: dict[str, Way] = {}
    for name in ("team", "alone"):
        own = [one for one in anchors if way_name(one.words) == name]
        if len(own) >= 2:
            fitted[name] = _fitted(getattr(training, name), plain, own, fitted.get("team"))
    return ceilings.model_copy(update={"training": training.model_copy(update=fitted)})


def _fitted(way: Way, plain: Ceilings, anchors: Sequence[Anchor], known: Way | None) -> Way:
    """The way with what its anchors took; what a learned token keeps is taken from another way where one is `known`."""
    stages = [planned(one.words, plain) for one in anchors]
    loads = [_load(one.words, plain) for one in anchors]
    time, memory = [], []
    for stage, load, one in zip(stages, loads, anchors, strict=True):
        parts = {"stretch": stage.time.seconds, "step": 1.0, "code": load.codes}
        time.append(Point("step", parts, one.probe.seconds))
        causes, bytes_ = {"process": 1.0, "gap": stage.budget.device}, one.probe.memory
        causes["expert_bytes"] = expert_processes(model_of(one.words).backbone, way.processes)
        if known is None:
            causes |= {"word_bytes": load.words, "code_bytes": load.codes}
        else:
            bytes_ -= known.word_bytes * load.words + known.code_bytes * load.codes
        memory.append(Point("bytes", causes, bytes_))
    watts = sum(one.probe.joules for one in anchors) / sum(one.probe.seconds for one in anchors)
    kept = {} if known is None else {"word_bytes": known.word_bytes, "code_bytes": known.code_bytes}
    return way.model_copy(update={**fit(time, "stretch"), **fit(memory, "gap"), **kept, "watts": watts})


def _load(words: list[str], ceilings: Ceilings) -> Load:
    model = model_of(words)
    return load_of(model, ceilings.training, (model.rows or 1) * model.length)


def _without_anchors(ceilings: Ceilings) -> Ceilings:
    """Parts alone, so that a plan is their plain sum."""
    training = ceilings.training
    team, alone = (Way(processes=way.processes, parts=way.parts) for way in (training.team, training.alone))
    return ceilings.model_copy(
        update={"training": training.model_copy(update={"team": team, "alone": alone})}
    )
