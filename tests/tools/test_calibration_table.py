"""The table of docs/energy.md from the JSON of a calibration."""

from __future__ import annotations

from tools.calibration_table import table


def test_rows_bounds_and_what_is_missing() -> None:
    row = {
        "case": "a small one",
        "disturbed": True,
        "seconds": {"planned": 0.25, "measured": 0.2, "error": 0.25},
        "bytes": {"planned": 2.0**31, "measured": 2.0**31, "error": 0.0},
        "joules": {"planned": 3.3, "measured": 3.6, "error": -0.0833},
    }
    result = {
        "rows": [row], "cases": 1, "undisturbed": 0, "within": {"seconds": 0, "bytes": 1, "joules": 1},
        "metering": {"largest_share_of_a_step": 0.0012}, "left_out": ["a large one"],
    }  # fmt: skip
    lines = table(result).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 11
    assert lines[2] == (
        "| a small one (disturbed) | 250 ms | 200 ms | +25.0 % | 2,048 MiB | 2,048 MiB | +0.0 % "
        "| 3.3 J | 3.6 J | −8.3 % |"
    )
    assert "of 1: step time 0, memory 1, energy 1. 1 of the runs" in lines[4] and "0.12%" in lines[4]
    assert lines[5] == "Out of time: a large one."
