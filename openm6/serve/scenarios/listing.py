"""`openm6 scenarios`: all of them, and, given a run, which of them it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from openm6.checkpoint.folder import latest
from openm6.models.description import MODEL_FILE, ModelDescription, read_description
from openm6.serve.scenarios.catalogue import Catalogue, read_catalogue, standing
from openm6.serve.scenarios.scenario import Language
from openm6.serve.scenarios.scores import Scores, read_scores


def list_scenarios(trained: Path | None = None, language: Language = "en") -> Table:
    """One row per scenario; with a run, whether it is ready.

    Raises:
        CheckpointError: there is no model there.
    """
    description, scores = _known(trained)
    catalogue = read_catalogue()
    last = "state" if description is not None else "recipe"
    table = Table("scenario", "domain", "takes", "gives", "what it does", last, box=None)
    for name, scenario in catalogue.scenarios.items():
        domain = catalogue.domains[catalogue.domain_of(name)].title.said(language)
        takes = ", ".join(dict.fromkeys(given.kind for given in scenario.inputs.values()))
        state = standing(scenario, description, scores).said(language) if description else scenario.recipe
        table.add_row(name, domain, takes, scenario.gives, scenario.summary.said(language), state)
    return table


def scenarios_json(trained: Path | None = None) -> str:
    """All that is known of each scenario, as JSON; `ready` and `needs` where a run is given."""
    found = described(read_catalogue(), *_known(trained))
    return json.dumps({"scenarios": found}, ensure_ascii=False, indent=1)


def described(
    catalogue: Catalogue, description: ModelDescription | None, scores: Scores | None = None
) -> list[dict[str, Any]]:
    """Each scenario as plain data, in the order of the files."""
    found = []
    for name, scenario in catalogue.scenarios.items():
        entry = {"domain": catalogue.domain_of(name), **scenario.model_dump(mode="json")}
        if description is not None:
            able = standing(scenario, description, scores)
            entry |= {"ready": able.ready, "needs": list(able.missing), "state": able.said()}
        found.append(entry)
    return found


def _known(trained: Path | None) -> tuple[ModelDescription | None, Scores]:
    """What a run's checkpoint and report say, if a run is given."""
    if trained is None:
        return None, {}
    folder = latest(trained)
    path = folder / MODEL_FILE
    return read_description(path.read_text(encoding="utf-8"), str(path)), read_scores(folder)
