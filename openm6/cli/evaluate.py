"""`openm6 evaluate`: a trained model on held-out records, or on the examples of all scenarios."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from openm6.cli.train import Trained
from openm6.core.errors import ConfigError


def evaluate(
    trained: Trained,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="eval.KEY=VALUE", help="Settings, such as eval.answers=300.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Tasks to evaluate; default: all.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PATH", help="Table or folder with other records."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the scores as JSON.")
    ] = None,
    scenarios: Annotated[
        bool, typer.Option("--scenarios", help="Run the examples of all scenarios instead.")
    ] = False,
) -> None:
    """Evaluate a trained model on held-out records.

    \b
    Example: openm6 evaluate runs/demo --tasks image_classification,text_to_image --json scores.json
    All records: openm6 evaluate runs/demo eval.records=1000 eval.answers=1000
    """
    if scenarios:
        if tasks is not None or data is not None or settings:
            raise ConfigError("--scenarios runs examples of its own: leave --tasks, --data and settings out")
        _run_scenarios(trained, json_path)
        return
    # torch takes seconds to import
    from openm6.evaluate.run import evaluate as evaluate_model
    from openm6.evaluate.summary import print_table

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
    report = evaluate_model(trained, tasks=names, data=data, json_path=json_path, settings=settings or [])
    print_table(report, Console())


def _run_scenarios(trained: Path, json_path: Path | None) -> None:
    # torch takes seconds to import
    from openm6.serve.scenarios.run import results_table, run_scenarios

    Console().print(results_table(run_scenarios(trained, json_path)))
