"""What a run has cost: the report's section on energy."""

from __future__ import annotations

from openm6.base.energy import gpt3
from openm6.base.energy.ledger import Account
from openm6.base.energy.units import in_joules
from openm6.evaluate.energy import EnergyAccount
from openm6.evaluate.figures import count, plain, words
from openm6.evaluate.report_markup import Markup, tag


def energy(account: EnergyAccount | None) -> Markup | None:
    """The section; None for a run that was not metered."""
    if account is None:
        return None
    ledger = account.ledger
    lead = (
        f"{in_joules(ledger.joules)} for {count(ledger.tokens)} tokens, {plain(account.joules_per_token, 3)} J each. "
        "Joules of a step are charged to modalities and tasks by the operations that their tokens took."
    )
    return tag(
        "section",
        tag("h2", "Energy", attributes={"id": "energy"}),
        tag("p.lead", lead),
        _rows("dl.facts", _facts(account)),
        *[_accounts(account, title, accounts) for title, accounts in _kinds(account).items() if accounts],
        tag("p.lead", gpt3.CAVEAT),
    )


def _facts(account: EnergyAccount) -> dict[str, str]:
    ledger = account.ledger
    rows = {f"read by {source}": in_joules(joules) for source, joules in ledger.by_source.items()}
    place = f"{account.grid.name}, {account.grid.grams_per_kwh:g} g/kWh in {account.grid.year}, PUE {account.pue:g}"
    rows |= {
        "CO2e": f"{plain(account.grams(ledger.joules), 3)} g ({place})",
        "a token against GPT-3's": f"{plain(100 * account.of_gpt3, 3)} %",
        "between steps": in_joules(ledger.between),
        "steps that a crash lost": in_joules(ledger.repeated),
        "judging": in_joules(account.judging),
    }
    return rows


def _kinds(account: EnergyAccount) -> dict[str, dict[str, Account]]:
    ledger = account.ledger
    return {"stage": ledger.stages, "modality": ledger.modalities, "task": ledger.tasks}


def _accounts(account: EnergyAccount, title: str, accounts: dict[str, Account]) -> Markup:
    ordered = sorted(accounts.items(), key=lambda item: -item[1].joules)
    rows = {words(name): _told(account, one) for name, one in ordered}
    return tag("div", tag("h3", f"By {title}"), _rows("dl.facts", rows))


def _told(account: EnergyAccount, one: Account) -> str:
    each = 1000 * one.joules / max(1, one.tokens)
    grams = plain(account.grams(one.joules), 3)
    return f"{in_joules(one.joules)}, {grams} g CO2e, {plain(each, 3)} J for 1,000 tokens"


def _rows(name: str, rows: dict[str, str]) -> Markup:
    return tag(name, *[tag("div", tag("dt", key), tag("dd", value)) for key, value in rows.items()])
