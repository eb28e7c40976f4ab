"""The one door through which commands reach the rest: imported when called, so that `--help` stays instant."""

from __future__ import annotations

import importlib
from typing import Any

from openm6.base.errors import ConfigError

DOORS = {
    "train": "openm6.train.run:train_recipe",
    "launch": "openm6.parallel.launch:launch",
    "convert": "openm6.train.convert:convert",
    "evaluate": "openm6.evaluate.run:evaluate",
    "generate": "openm6.inference.run:generate",
    "question": "openm6.inference.question:Question",
    "numbers": "openm6.inference.question:parse_numbers",
    "series": "openm6.inference.question:parse_series",
    "shares": "openm6.inference.question:parse_shares",
    "decoding": "openm6.inference.sampling:read_decoding",
    "serve": "openm6.serve.run:serve",
    "serve replicas": "openm6.serve.replicas:serve_replicas",
    "playground": "openm6.serve.playground.mount:add_playground",
    "serve config": "openm6.serve.run:read_serve_config",
    "list scenarios": "openm6.serve.scenarios.listing:list_scenarios",
    "scenarios as json": "openm6.serve.scenarios.listing:scenarios_json",
    "run scenarios": "openm6.serve.scenarios.run:run_scenarios",
    "tried scenarios": "openm6.serve.scenarios.run:tried_table",
    "inspect": "openm6.data.inspect:inspect_path",
    "show judgement": "openm6.evaluate.summary:print_table",
    "show inspection": "openm6.cli.inspection:show_inspection",
    "cluster options": "openm6.plan.hardware:ClusterOptions",
    "plan machine": "openm6.plan.question:read_machine",
    "plan question": "openm6.plan.question:read_question",
    "show plan": "openm6.cli.plan_page:show_plan",
    "show measured": "openm6.cli.plan_page:show_measured",
    "show sweep": "openm6.cli.plan_page:show_sweep",
    "show energy": "openm6.cli.energy_page:show_energy",
    "list tasks": "openm6.cli.list_tasks:list_tasks",
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
