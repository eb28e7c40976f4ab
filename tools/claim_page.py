"""Write docs/m6-10t.md from the results of the planner, or check that the page equals them.

python tools/claim_page.py
python tools/claim_page.py --check
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from openm6.core.files import replace_text
from openm6.energy.carbon import GPT3_JOULES_PER_TOKEN, GPT3_MWH, GPT3_TOKENS, grid
from openm6.energy.meter import EnergyConfig
from openm6.plan.hardware import GIB, ClusterOptions, gpu, gpu_cluster
from openm6.plan.memory import RESTING
from openm6.plan.plan import Plan, make_plan, matrix_parameters, smallest_count
from openm6.plan.request import PlanRequest, read_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "m6-10t.md"
MODEL, DAYS, PUE = "m6-10t", 10.0, 1.1
CLUSTER = ClusterOptions(devices=512)
NO_NETWORK = 1e9  # GB/s: so fast that it takes no time
CARDS = {
    "v100-32gb": "V100-32GB",
    "h100-80gb": "H100-80GB",
    "h200-141gb": "H200-141GB",
    "b200-180gb": "B200-180GB",
}
GPT3_PARAMETERS = 175e9
TEMPLATE = Path(__file__).with_suffix(".md")  # the text, with a field for each number


@dataclass(frozen=True)
class Plans:
    """The plans of the page: on 512 V100 with three networks, and on 512 H100."""

    assumed: Plan
    faster: Plan
    free: Plan
    hopper: Plan

    @property
    def columns(self) -> tuple[Plan, ...]:
        return self.assumed, self.faster, self.free, self.hopper


def page() -> str:
    """The whole page in Markdown."""
    plans = Plans(
        plan_on("v100-32gb"), plan_on("v100-32gb", network=12.5), plan_on("v100-32gb", network=NO_NETWORK),
        plan_on("h100-80gb"),
    )  # fmt: skip
    values = {**_fit(plans.assumed), **_speeds(plans), **_energy(plans), **_percent(plans)}
    return TEMPLATE.read_text(encoding="utf-8").format(**values, **_smallest())


def plan_on(kind: str, bytes_: int | None = None, network: float | None = None) -> Plan:
    """Ten days of the model on 512 GPUs of a kind."""
    options = replace(CLUSTER, network=network)
    return make_plan(_request(bytes_), gpu_cluster(gpu(kind), options))


def _request(bytes_: int | None = None) -> PlanRequest:
    return PlanRequest(read_model(MODEL), days=DAYS, bytes_per_parameter=bytes_, energy=EnergyConfig(pue=PUE))


def _fit(plan: Plan) -> dict[str, float]:
    total, card = plan.total, gpu("v100-32gb")
    tiers = {bytes_: plan_on("v100-32gb", bytes_) for bytes_ in (4, 2, 1)}
    assert plan.fits and plan.real.tier.bytes == 2 and tiers[1].fits
    resting = total - matrix_parameters(plan.model.backbone)
    return {
        "resting": resting / 1e9,
        "resting_gb": RESTING * resting / 1e9,
        "trillions": total / 1e12,
        "active": plan.active / 1e9,
        "card_gib": card.memory / GIB,
        "cluster_tb": 512 * card.memory / 1e12,
        "a_gpu_16": 16 * total / 512 / 1e9,
        **{f"states_{bytes_}": bytes_ * total / 1e12 for bytes_ in (16, 4, 2, 1)},
        **{f"host_{bytes_}": tier.real.budget.host / GIB for bytes_, tier in tiers.items()},
        "on_gpus": plan.bytes["gpu"] / 1e12,
        "on_hosts": plan.bytes["host"] / 1e12,
        "link": plan.real.time.link,
        "pseudo": plan.stages["pseudo"].parameters / 1e12,
    }


def _smallest() -> dict[str, str | int]:
    options = ClusterOptions()
    rows, found = [], dict[str, int]()
    for kind, name in CARDS.items():
        one, two = (smallest_count(_request(bytes_), gpu(kind), options) for bytes_ in (1, 2))
        assert one is not None and two is not None
        found[kind] = two.cluster.devices
        cells = (
            name,
            one.cluster.devices,
            two.cluster.devices,
            f"{two.tokens / 1e9:.1f} billion",
            f"{two.energy.mwh:.0f}",
        )
        rows.append(" | ".join(str(cell) for cell in cells))
    return {"smallest": "\n".join(f"| {row} |" for row in rows), "hopper_gpus": found["h100-80gb"]}


def _speeds(plans: Plans) -> dict[str, float | str]:
    billions = [plan.tokens / 1e9 for plan in plans.columns]
    rows = {
        f"step of {plans.assumed.real.tokens / 1e6:.1f}M tokens": [
            f"{plan.real.time.seconds:.0f} s" for plan in plans.columns
        ],
        "bottleneck": [plan.real.time.bottleneck for plan in plans.columns],
        "tokens per day": [f"{tokens / DAYS:.2f} billion" for tokens in billions],
        "tokens in ten days": [f"{tokens:.1f} billion" for tokens in billions],
    }
    return {
        "speeds": "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        "flops": plans.assumed.operations / 1e12,
        "flops_again": plans.assumed.operations * 4 / 3 / 1e12,
        "fewest": billions[0],
        "most": billions[2],
        "of_gpt3_few": GPT3_TOKENS / 1e9 / billions[0],
        "of_gpt3_many": GPT3_TOKENS / 1e9 / billions[2],
        "pseudo_step": plans.assumed.stages["pseudo"].time.seconds,
        "real_step": plans.assumed.real.time.seconds,
    }


def _energy(plans: Plans) -> dict[str, float]:
    world, china = grid(EnergyConfig().country), grid("China")
    energy, free, hopper = plans.assumed.energy, plans.free.energy, plans.hopper.energy
    return {
        "rated": energy.mwh_rated,
        "rated_fraction": 100 * energy.mwh_rated / GPT3_MWH,
        "network_bound": energy.mwh,
        "compute_bound": free.mwh,
        "tons_low": energy.kg_co2e / 1000,
        "tons_high": free.kg_co2e / 1000,
        "year": world.year,
        "world": world.grams_per_kwh,
        "china": china.grams_per_kwh,
        "china_more": 100 * (china.grams_per_kwh / world.grams_per_kwh - 1),
        "h100_rated": hopper.mwh_rated,
        "h100_times": plans.hopper.tokens / plans.assumed.tokens,
        "h100_joules": hopper.joules_per_token,
        "v100_joules": energy.joules_per_token,
        "gpt3_joules": GPT3_JOULES_PER_TOKEN,
        "joules_low": free.joules_per_token,
        "joules_high": energy.joules_per_token,
    }


def _percent(plans: Plans) -> dict[str, float]:
    plan, percent = plans.assumed, GPT3_MWH / 100
    gpt3_million = GPT3_MWH * 1000 / (GPT3_PARAMETERS / 1e6)
    own_million = plan.energy.mwh_rated * 1000 / (plan.total / 1e6)
    return {
        "percent": percent,
        "percent_watts": percent * 1e6 / (512 * DAYS * 24),
        "percent_days": DAYS * percent / plan.energy.mwh_rated,
        "gpt3_million": gpt3_million,
        "own_million": own_million,
        "per_parameter": 100 * own_million / gpt3_million,
        "one_in": plan.total / plan.active,
    }


def main(words: list[str] | None = None) -> int:
    """Write the page; with --check only compare, and return 1 if it differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    text = page()
    if not parser.parse_args(words).check:
        replace_text(PAGE, text)
        return 0
    return int(PAGE.read_text(encoding="utf-8") != text)


if __name__ == "__main__":
    sys.exit(main())
