"""Evaluates a run on held-out records of the corpus by means other than our own model, and prints a table.

Small networks trained on real records, published networks and exact comparisons evaluate the answers. Beside each value
stands the one that real records reach in place of answers, after the codec.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openm6.core.errors import OpenM6Error
from openm6.core.files import replace_text, to_json
from openm6.evaluate.formatting import plain
from openm6.hub.find import find_model
from openm6.inference.load import load
from tools.mini import rows
from tools.mini.packages import Packages
from tools.mini.rows import Evaluated, Evaluation


@dataclass(frozen=True)
class Row:
    """A row of the table: what is evaluated, by what, and the range in which its value shall lie."""

    title: str
    by: str
    low: float
    evaluate: Callable[[Evaluation], Evaluated]
    high: float | None = None
    percent: bool = True

    @property
    def goal(self) -> str:
        """The range as text."""
        if self.high is not None:
            return f"{self.shown(self.low)} to {self.shown(self.high)}"
        return f"{'≥' if self.low else '>'} {self.shown(self.low)}"

    def reached(self, value: float) -> bool:
        """Whether a value lies in the range; a difference must be positive."""
        return value > 0 if self.low == 0 else self.low <= value <= (self.high if self.high is not None else math.inf)

    def shown(self, value: float | None) -> str:
        """A value as text."""
        if value is None:
            return "exact"
        return f"{100 * value:.1f} %" if self.percent else plain(value, 3)


ROWS: dict[str, Row] = {
    "avatars-drawn": Row("description → avatar, attributes", "small network", 0.93, rows.avatars_drawn),
    "avatars-described": Row("avatar → description, attributes", "comparison", 0.90, rows.avatars_described),
    "icons-named": Row("icon or emoji → name, unseen style", "label or listed synonym", 0.50, rows.icons_named),
    "icons-drawn": Row("name and style → icon, nearest of 100", "EfficientNet-Lite0", 0.50, rows.icons_drawn),
    "syllables-transcribed": Row("syllable → pinyin, unseen voice", "comparison", 0.80, rows.syllables_transcribed),
    "syllables-spoken": Row("pinyin → syllable", "small network", 0.70, rows.syllables_spoken),
    "words-spoken": Row("English word → speech", "Whisper tiny.en", 0.40, rows.words_spoken),
    "words-transcribed": Row("speech → English word, unseen voice", "comparison", 0.80, rows.words_transcribed),
    "instruments": Row("note → instrument", "comparison", 0.85, rows.instruments),
    "pitches": Row("note → pitch within a semitone", "comparison", 0.90, rows.pitches),
    "diamonds-price": Row("diamond → price, R²", "boosted trees beside it", 0.96, rows.diamond_price, percent=False),
    "diamonds-coverage": Row("the same, within the 80 % interval", "comparison", 0.75, rows.diamond_coverage, 0.85),
    "series": Row("series better than seasonal naive, 24 steps", "weighted quantile loss", 0.70, rows.series),
    "couplets-form": Row("upper line → lower line, length and new characters", "comparison", 0.99, rows.couplet_form),
    "couplets-likelihood": Row(
        "true lower lines, bits per character saved", "5-gram model", 0.0, rows.couplet_likelihood, percent=False
    ),
    "kinship": Row("relatives in Chinese", "comparison", 0.85, rows.kinship),
    "countries": Row("facts about countries", "comparison", 0.60, rows.countries),
    "elements": Row("facts about elements", "comparison", 0.60, rows.elements),
}
HEADER = (
    "| row | what | evaluated by | value | 95 % interval | goal | reached | n | real records |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def table_line(name: str, row: Row, found: Evaluated | str) -> str:
    """Return the line of a row in the table, or the reason why it has no value."""
    begin = f"| {name} | {row.title} | {row.by} |"
    if isinstance(found, str):
        return f"{begin} – | {found} | {row.goal} | – | – | – |"
    low, high = map(row.shown, found.interval)
    reached = "yes" if row.reached(found.value) else "no"
    values = [row.shown(found.value), f"{low} to {high}", row.goal, reached, str(found.n), row.shown(found.ceiling)]
    return f"{begin} {' | '.join(values)} |"


def saved_table(report: dict[str, Any]) -> str:
    """Return the table of the results that `--json` wrote."""
    lines = [HEADER]
    for name, entry in report["rows"].items():
        values = {key: entry[key] for key in ("value", "interval", "n", "ceiling") if key in entry}
        lines.append(table_line(name, ROWS[name], entry.get("failure") or Evaluated(**values)))
    return "\n".join(lines)


def evaluate_rows(
    run: Evaluation, names: Iterable[str], show: Callable[[str, dict[str, Any]], None] = lambda line, report: None
) -> dict[str, Any]:
    """Return the JSON of each row; `show` gets each line of the table as it is ready, and the JSON so far."""
    report: dict[str, Any] = {}
    for name in names:
        row, began = ROWS[name], time.monotonic()
        try:
            found: Evaluated | str = row.evaluate(run)
        except (OpenM6Error, ImportError) as error:
            found = str(error)
        own = {"failure": found} if isinstance(found, str) else {**asdict(found), "reached": row.reached(found.value)}
        goal = {"low": row.low, "high": row.high}
        seconds = round(time.monotonic() - began, 1)
        report[name] = {"what": row.title, "by": row.by, "goal": goal, **own, "seconds": seconds}
        show(table_line(name, row, found), report)
    return report


def main(words: list[str] | None = None) -> None:
    """Read the command line, evaluate, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.mini.evaluate", description=__doc__)
    parser.add_argument("run", help="folder of a run or checkpoint, or the name of a model")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--only", action="append", default=[], choices=sorted(ROWS), help="a row; may be repeated")
    parser.add_argument("--limit", type=int, help="at most this many records of each row")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "openm6-mini", help="folder of packages")
    arguments = parser.parse_args(words)
    packages = Packages(arguments.cache)
    packages.import_requirements()
    loaded = load(find_model(arguments.run), "cpu")
    run = Evaluation(loaded, arguments.corpus, arguments.cache, arguments.limit)
    sys.stdout.write(f"{HEADER}\n")

    def show(line: str, report: dict[str, Any]) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if arguments.json is not None:
            content = {"checkpoint": str(loaded.checkpoint), "limit": arguments.limit, "rows": report}
            replace_text(arguments.json, to_json(content, indent=1) + "\n")

    evaluate_rows(run, arguments.only or ROWS, show)


if __name__ == "__main__":
    main()
