"""The model card of a run: README.md beside its checkpoints, for whoever is handed the model."""

from __future__ import annotations

from openm6.base.energy import gpt3
from openm6.base.energy.units import in_joules
from openm6.base.files import replace_text
from openm6.base.run_folder import RunFolder
from openm6.evaluate.energy import EnergyAccount
from openm6.evaluate.figures import count, duration, metric_title, score
from openm6.evaluate.results import Judgement, RunFacts

FILE = "README.md"


def write_card(run: RunFolder, judgement: Judgement, facts: RunFacts) -> None:
    """Put the card into the run's folder.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    replace_text(run.path / FILE, card(judgement, facts))


def card(judgement: Judgement, facts: RunFacts) -> str:
    """The text: what the model is, what it scores, what it has cost."""
    parts = [
        f"# {_line(facts.name)}",
        f"A model of OpenM6, size `{_line(facts.preset)}`: {count(facts.total_parameters)} parameters, "
        f"{count(facts.active_parameters)} active a token. Trained for {count(facts.steps)} steps on "
        f"{count(facts.tokens)} tokens in {duration(facts.seconds)}.",
        "## What it can do",
        "Scores on test records; `report.html` shows answers.",
        _scores(judgement),
        "## What it has cost",
        _energy(facts.energy),
        "## Limits",
        "It knows what its training data told it, and nothing of whether that was right or fair. Judge it on your own "
        "records (`openm6 evaluate RUN --data FILE`) before you rely on it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _scores(judgement: Judgement) -> str:
    rows = [
        f"| {_line(result.name)} | {metric_title(result.metric)} | {score(result.metric, result.value)} "
        f"| {score(result.metric, result.baseline)} |"
        for result in judgement.results
    ]
    return "\n".join(["| task | metric | score | baseline |", "|---|---|---|---|", *rows]) if rows else ""


def _energy(account: EnergyAccount | None) -> str:
    if account is None:
        return "Its training was not metered."
    ledger = account.ledger
    return (
        f"{in_joules(ledger.joules)} ({account.joules_per_token:.3g} J a token; read by {ledger.source}), "
        f"{account.grams(ledger.joules):.3g} g CO2e with the current of {account.grid.name} "
        f"({account.grid.grams_per_kwh:g} g/kWh, {account.grid.year}) and a PUE of {account.pue:g}. "
        f"A token took {account.of_gpt3:.3%} of what one of GPT-3's training took. {gpt3.CAVEAT}"
    )


def _line(text: str) -> str:
    """Text as it may stand in a line or a cell of Markdown."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())
