"""The one door through which commands reach the rest: imported when called, so that `--help` stays instant."""

from __future__ import annotations

import importlib
from typing import Any

from openm6.base.errors import ConfigError

DOORS = {
    "train": "openm6.train.run:train_recipe",
    "launch": "openm6.parallel.launch:launch",
    "convert": "openm6.train.convert:convert",
    "giant size": "openm6.bench.giant:GiantSize",
    "bench rank": "openm6.bench.rank:bench_rank",
    "bench cluster": "openm6.bench.cluster:bench_cluster",
    "bench exchange": "openm6.bench.exchange:bench_exchange",
    "bench scaling": "openm6.bench.scaling:bench_scaling",
    "bench reshard": "openm6.bench.reshard:bench_reshard",
    "process counts": "openm6.bench.scaling:parse_counts",
    "bench giant": "openm6.bench.giant:bench_giant",
    "evaluate": "openm6.evaluate.run:evaluate",
    "generate": "openm6.generate.run:generate",
    "question": "openm6.generate.question:Question",
    "numbers": "openm6.generate.parse:parse_numbers",
    "series": "openm6.generate.parse:parse_series",
    "shares": "openm6.generate.parse:parse_shares",
    "decoding": "openm6.generate.run:read_decoding",
    "serve": "openm6.serve.run:serve",
    "serve replicas": "openm6.serve.replicas:serve_replicas",
    "playground": "openm6.serve.playground.mount:add_playground",
    "bench serve": "openm6.bench.serve:bench_serve",
    "bench generate": "openm6.bench.generate:bench_generate",
    "bench soak": "openm6.bench.soak:bench_soak",
    "bench fuzz": "openm6.bench.fuzz:bench_fuzz",
    "serve config": "openm6.serve.run:read_serve_config",
    "list scenarios": "openm6.serve.scenarios.listing:list_scenarios",
    "scenarios as json": "openm6.serve.scenarios.listing:scenarios_json",
    "run scenarios": "openm6.serve.scenarios.run:run_scenarios",
    "tried scenarios": "openm6.serve.scenarios.run:tried_table",
    "inspect": "openm6.data.inspect:inspect_path",
    "show judgement": "openm6.evaluate.table:print_table",
    "show inspection": "openm6.cli.inspection:show_inspection",
    "bench machine": "openm6.bench.machine:bench_machine",
    "bench plan": "openm6.bench.calibration:bench_plan",
    "cluster options": "openm6.plan.cluster:ClusterOptions",
    "plan machine": "openm6.plan.ask:read_machine",
    "plan question": "openm6.plan.ask:read_question",
    "check plan": "openm6.plan.check:check_run",
    "show plan": "openm6.cli.plan_page:show_plan",
    "show sweep": "openm6.cli.plan_page:show_sweep",
    "show check": "openm6.cli.plan_page:show_check",
    "show energy": "openm6.cli.energy_page:show_energy",
    "list tasks": "openm6.cli.list_tasks:list_tasks",
    "bench experts": "openm6.bench.experts:bench_experts",
    "bench train": "openm6.bench.train:bench_train",
    "bench fp8": "openm6.bench.fp8:bench_fp8",
    "bench packing": "openm6.bench.packing:bench_packing",
    "list presets": "openm6.cli.list_presets:list_presets",
}
# Packages that come with an extra, so that a missing one is a sentence.
EXTRAS = {
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "gradio": "serve",
    "ray": "ray",
}


def door(name: str) -> Any:
    """The function behind a door."""
    module, _, function = DOORS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ConfigError(f"this needs {error.name}: pip install 'openm6[{extra}]'") from None
