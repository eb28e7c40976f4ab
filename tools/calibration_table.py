"""Turns what `openm6 bench plan --json` wrote into the table of docs/energy.md.

Run: python tools/calibration_table.py calibration.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HEAD = (
    "| configuration | step time planned | measured | off by | memory planned | measured | off by "
    "| energy a step planned | measured | off by |"
)
UNITS = {"seconds": (1e3, "ms"), "bytes": (2**-20, "MiB"), "joules": (1.0, "J")}
WORDS = {"seconds": "step time", "bytes": "memory", "joules": "energy"}


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown, and a sentence on how many are as near as wanted."""
    lines = [HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    lines += [_line(row) for row in result["rows"]]
    cases, quiet = result["cases"], result["undisturbed"]
    parts = [f"{WORDS[unit]} {result['within'][unit]}" for unit in UNITS]
    metering = result["metering"]["largest_share_of_a_step"]
    lines += [
        "",
        f"Within bounds (15 % for time and energy, 5 % for memory), of {cases}: {', '.join(parts)}. "
        f"{cases - quiet} of the runs were disturbed by other work. Metering took at most {metering:.2%} of a step.",
    ]
    if result["left_out"]:
        lines.append(f"Out of time: {'; '.join(result['left_out'])}.")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    cells = [row["case"] + (" (disturbed)" if row["disturbed"] else "")]
    for unit, (scale, name) in UNITS.items():
        pair = row[unit]
        cells += [f"{_figures(pair[key] * scale)} {name}" for key in ("planned", "measured")]
        cells.append(f"{pair['error']:+.1%}".replace("-", "−").replace("%", " %"))
    return "| " + " | ".join(cells) + " |"


def _figures(number: float) -> str:
    """Three figures, and all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    sys.stdout.write(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))) + "\n")
