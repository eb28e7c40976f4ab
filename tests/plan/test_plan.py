"""Whole plans: the claim about M6-10T, the bottleneck, budgets, sweeps, and the errors."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from openm6.core.errors import ConfigError
from openm6.energy.meter import EnergyConfig
from openm6.modalities.text import train_tokenizer
from openm6.plan.hardware import ClusterOptions, gpu, gpu_cluster, gpus
from openm6.plan.plan import Plan, draw_sweep, make_plan, matrix_parameters, plan_json, sweep_plans
from openm6.plan.request import PlanRequest, read_model

M6 = ClusterOptions(devices=512)


V100 = gpu("v100-32gb")


def request_of(model: str, *overrides: str, **options: float) -> PlanRequest:
    return PlanRequest(read_model(model, list(overrides)), energy=EnergyConfig(pue=1.1), **options)


def the_plan(
    model: str = "m6-10t", card: str = "v100-32gb", options: ClusterOptions = M6, **options_of_run: float
) -> Plan:
    return make_plan(request_of(model, **options_of_run), gpu_cluster(gpu(card), options))


def test_the_rated_bound_of_the_claim_by_hand() -> None:
    plan = the_plan(days=10)
    assert plan.energy.mwh_rated == pytest.approx(512 * 240 * 300 * 1.1 / 1e6)  # 40.6 MWh
    assert plan.energy.mwh_rated / 1287 == pytest.approx(0.0315, abs=1e-4)
    assert plan.energy.mwh < 1.15 * plan.energy.mwh_rated


def test_ten_trillion_fit_only_with_the_host_at_two_bytes() -> None:
    plan = the_plan(days=10)
    assert plan.fits and plan.real.tier.bytes == 2 and plan.real.budget.host > 0
    gpu, host = plan.bytes["gpu"], plan.bytes["host"]
    # The routers of 10,240 experts are most of what stays in fp32 on every GPU.
    resting = plan.total - matrix_parameters(plan.model.backbone)
    assert resting == pytest.approx(48 * 10_240 * 1024, rel=0.05)
    assert gpu + host == pytest.approx(2 * (plan.total - resting) + 512 * 20 * resting)
    alone = the_plan(days=10, options=replace(M6, host_memory=0.0), bytes_per_parameter=2)
    assert not alone.fits


def test_the_pseudo_stage_holds_a_48th_of_the_experts() -> None:
    plan = the_plan(days=10)
    experts = 10_240 * 2 * 1024 * 9984
    assert plan.stages["pseudo"].parameters - experts < 0.01 * experts
    assert plan.stages["pseudo"].budget.host == 0


def test_tokens_days_and_energy_agree() -> None:
    by_days = the_plan(days=10)
    by_tokens = the_plan(tokens=by_days.tokens)
    assert by_tokens.days == pytest.approx(10)
    assert by_days.energy.joules_per_token * by_days.tokens / 3.6e9 == pytest.approx(by_days.energy.mwh)
    assert by_days.energy.kg_co2e == pytest.approx(by_days.energy.mwh * 481)


def test_a_faster_network_moves_the_bottleneck() -> None:
    assert the_plan().real.time.bottleneck == "network"
    assert the_plan(options=replace(M6, network=200.0)).real.time.bottleneck == "compute"


def test_a_slow_link_is_the_bottleneck_of_an_offloaded_model() -> None:
    options = ClusterOptions(devices=1, host_memory=512.0, host_link=0.5)
    plan = the_plan("m6-100b", "h100-80gb", options, bytes_per_parameter=2)
    assert plan.real.budget.host > 0 and plan.real.time.bottleneck == "link"


def test_cards_without_a_link_of_their_own_exchange_over_that_of_the_host() -> None:
    card = gpu("rtx-4090")
    table, given = (gpu_cluster(card, ClusterOptions(devices=8, host_link=link)) for link in (None, 12.0))
    assert not card.p2p_link and given.p2p_link / table.p2p_link == pytest.approx(12e9 / card.host_link)


def test_fewer_kept_inputs_save_memory_and_cost_a_pass() -> None:
    options = ClusterOptions(devices=1, host_memory=256.0)
    kept, again = (
        the_plan(
            "m6-100b",
            "h100-80gb",
            options,
            bytes_per_parameter=2,
            batch=65_536,
            activation_checkpointing_every=every,
        ).real
        for every in (1, 4)
    )
    assert again.budget.activations < 0.5 * kept.budget.activations and again.budget.host < kept.budget.host
    assert again.time.compute / kept.time.compute == pytest.approx(4.75 / 4)
    assert again.time.link / again.budget.host == pytest.approx(1.5 * kept.time.link / kept.budget.host)


def test_one_gpu_needs_no_network() -> None:
    plan = the_plan("base", "h100-80gb", ClusterOptions())
    assert plan.real.time.network == 0 and plan.fits and plan.real.tier.bytes == 16


def test_the_schema_and_the_smallest_machine() -> None:
    request = request_of("m6-10t", days=10)
    content = plan_json(request, V100, M6)[1]
    assert set(content["parameters"]) == {"total", "active"} and content["fits"] is True
    assert {"joules_per_token", "mwh", "kg_co2e"} <= set(content["energy"])
    smallest = content["smallest"]["gpus"]
    assert make_plan(request, gpu_cluster(V100, replace(M6, devices=smallest))).fits
    assert not make_plan(request, gpu_cluster(V100, replace(M6, devices=smallest - 8))).fits


def test_changes_that_would_make_it_fit() -> None:
    request = request_of("m6-10t", bytes_per_parameter=2)
    plan, content = plan_json(request, V100, replace(M6, host_memory=64.0), gpus().values())
    changes = content["smallest"]["changes"]
    assert not plan.fits and changes[0].startswith("1 bytes per parameter (")
    assert any("GiB of host memory per node" in change for change in changes)
    assert changes[-1].startswith("512 × ")


def test_a_recipe_and_its_overrides_are_planned() -> None:
    plan = the_plan("demo", "t4", ClusterOptions())
    assert plan.real.tokens == 16_384 and plan.real.tier.bytes == 16 and plan.total > 4_000_000
    request = request_of("recipes/demo.yaml", "packing.batch_size=8", "loop.optimizer.name=adafactor")
    changed = make_plan(request, gpu_cluster(gpu("t4"), ClusterOptions()))
    assert changed.real.tokens == 4096 and changed.real.tier.bytes == 8
    offloaded = make_plan(request_of("demo", "loop.offload={}"), gpu_cluster(gpu("t4"), ClusterOptions()))
    assert offloaded.real.tokens == 2048
    fp32 = make_plan(request_of("demo", "model.preset=base", "loop.offload={}"), gpu_cluster(gpu("rtx-4090"), M6))
    assert fp32.fits and fp32.real.tier.bytes == 16 and fp32.real.tier.layerwise


def test_a_recipe_of_two_stages_is_planned_with_the_weights_of_the_last() -> None:
    plan, alike = the_plan("recipes/m6-10t.yaml"), the_plan("m6-10t")
    assert plan.total == pytest.approx(alike.total, rel=1e-4) and set(plan.stages) == {"real", "pseudo"}


def test_the_rows_of_a_recipe_are_those_of_all_gpus() -> None:
    request = request_of("demo", "packing.batch_size=8")
    steps = [make_plan(request, gpu_cluster(gpu("t4"), ClusterOptions(devices=n))).real for n in (1, 4, 16)]
    assert [step.tokens for step in steps] == [8 * 512, 8 * 512, 16 * 512], "a GPU has a row at least"
    assert steps[1].budget.activations < 0.5 * steps[0].budget.activations
    assert sweep_plans(request, gpu("t4"), ClusterOptions(devices=4), "batch")[2][0] == 2 * 512


def test_an_invalid_request_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no GPU 'v100-23gb' in the table; did you mean 'v100-32gb'.*--gpu-table"):
        gpu("v100-23gb")
    with pytest.raises(ConfigError, match="demo: loop.optimizer: precision: .*int8-adafactor.* \\(given: 'fp8'\\)"):
        request_of("demo", "loop.optimizer.precision=fp8")
    for override in ("packing.batch_size=many", "packing.seq_len=1k", "packing.batch_size=null", "packing=5"):
        with pytest.raises(ConfigError, match="demo: packing: "):
            request_of("demo", override)
    for override, section in (("loop=5", "loop"), ("modalities=x", "modalities"), ("modalities.text=[1]", "text")):
        with pytest.raises(ConfigError, match=f"demo: {section} is .*, not a mapping of settings: indent them below"):
            request_of("demo", override)
    with pytest.raises(ConfigError, match="only multimodal recipes and presets are planned"):
        request_of("codec-image-64")
    with pytest.raises(ConfigError, match="no preset and no recipe 'm6-10x'; did you mean 'm6-10"):
        request_of("m6-10x")
    with pytest.raises(ConfigError, match="no tier of 3 bytes per parameter: choose 1, 2, 4"):
        request_of("base", bytes_per_parameter=3)
    with pytest.raises(ConfigError, match=r"pseudo fraction 1.5 must lie between 0 and 1"):
        request_of("base", pseudo_fraction=1.5)
    for length in ({"tokens": math.nan}, {"days": math.inf}, {"batch": -1}):
        with pytest.raises(ConfigError, match="=.* must be a finite number above 0"):
            request_of("base", **length)
    with pytest.raises(ConfigError, match="tokens and days both set the length of the run"):
        request_of("base", tokens=1e12, days=1)
    for option in ({"network": -5}, {"host_link": math.nan}, {"price": -3}, {"host_memory": math.inf}):
        with pytest.raises(ConfigError, match="must be a finite number that is not negative"):
            ClusterOptions(**option)


def test_a_tokenizer_of_one_s_own_counts(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(train_tokenizer(["some words"], 300).to_str())
    size = Tokenizer.from_file(str(file)).get_vocab_size()
    assert request_of("demo", f"modalities.text.tokenizer={file}").model.vocabulary == size
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"demo: modalities.text.tokenizer='.*' cannot be read"):
        request_of("demo", f"modalities.text.tokenizer={file}")


def test_a_gpu_of_one_s_own(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    text = "id,name,memory_gib,memory_gb_s,half_tflops,host_link_gb_s,watts\nX1,X 1,10,500,50,16,200\n"
    table.write_text(text, encoding="utf-8-sig")  # as Excel writes it
    cluster = gpu_cluster(gpu("X1", table), ClusterOptions())
    assert cluster.memory == 10 * 2**30 and cluster.watts == 200
    for cell in ("ten", "0", "", "nan"):
        table.write_text(f"id,memory_gib\nx1,{cell}\n")
        with pytest.raises(ConfigError, match=f"GPU 'x1': memory_gib must be a number above 0, not '{cell}'"):
            gpu("x1", table)


def test_sweeps(tmp_path: Path) -> None:
    sweep = partial(sweep_plans, request_of("base"), gpu("h100-80gb"), ClusterOptions(devices=8))
    rows = sweep("gpus")
    assert [count for count, _ in rows] == [2, 4, 8, 16, 32]
    speeds = [plan.tokens / plan.days for _, plan in rows]
    # A second node costs more than it brings: its network.
    assert speeds[0] < speeds[1] < speeds[2] < speeds[4]
    assert [size for size, _ in sweep("bytes")] == [16, 12, 8, 4, 2, 1]
    assert sweep("batch")[2][0] == 16_384
    draw_sweep(rows, "gpus", tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").read_text().startswith("<?xml")
    with pytest.raises(ConfigError, match="--sweep 'gpu' is not known; did you mean 'gpus'"):
        sweep("gpu")


def test_a_plan_needs_no_torch() -> None:
    code = (
        "import sys; from openm6.plan.hardware import *; from openm6.plan.request import *; "
        "from openm6.plan.plan import *; "
        "plan_json(PlanRequest(read_model('m6-10t'), days=10), gpu('h100-80gb'), ClusterOptions(512)); "
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
