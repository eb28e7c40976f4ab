"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from openm6.train.display import LiveDisplay, Pace, PlainDisplay, describe, open_display

LINE = {
    "step": 20,
    "loss": 2.5,
    "loss/text": 2.25,
    "grad_norm": 1.0,
    "c_v": [0.5, 0.7],
    "tokens_per_second": 6123.4,
}
LINE |= {"tokens": 1000, "non_finite": 0, "spikes": 0, "learning_rate": 0.001, "seconds": 3.0}
SCORES = {"step": 20, "evaluation": {"accuracy": 0.625}}


def test_the_energy_of_a_line() -> None:
    few = {name: value for name, value in LINE.items() if name != "loss/text"}
    metered = few | {"joules": 12_340.0, "watts": 41.2, "joules_per_token": 0.01, "energy_source": "rapl"}
    words = describe(metered, 40, Pace(0))
    assert "6,123 tokens/s  12.3 kJ at 41 W (rapl)  c_v" in words and "joules" not in words


def test_a_line_in_words() -> None:
    pace = Pace(0)
    pace.observe(20)
    words = describe(LINE, 40, pace)
    assert words.startswith("step 20/40  loss 2.5000  loss/text 2.2500  6,123 tokens/s  c_v 0.60  ")
    assert words.endswith("s left")
    assert describe(SCORES, 40, pace) == "step 20/40  scores  accuracy 0.625"
    assert "measuring the speed" in describe(LINE, None, pace)


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display("demo", 0)
    assert isinstance(display, PlainDisplay)
    display.step(20, 40)
    display.line(LINE)
    display.close()
    assert capsys.readouterr().err.count("\n") == 1


def test_plain_lines_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {f"loss/{kind}": 12.3456 for kind in ("text", "image_out", "sound_out", "numbers_out", "pool")}
    line = (
        LINE
        | kinds
        | {"joules": 12_340.0, "watts": 41.2, "energy_source": "nvml+rapl", "metering_seconds": 0.1}
    )
    words = describe(line | {"step": 123_456}, 200_000, Pace(0))
    assert len(words) <= 100 and words.startswith("step 123456/200000  loss 2.5000  loss/text 12.3456")
    assert "6,123 tokens/s" in words and "metering" not in words


def test_plain_lines_come_every_ten_seconds_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    display = PlainDisplay(0, lambda: now[0])
    for step in range(1, 41):
        now[0] += 1.0
        display.step(step, 40)
        display.line(LINE | {"step": step})
    display.line(SCORES)
    shown = [words.split("  ")[0] for words in capsys.readouterr().err.splitlines()]
    assert shown == [f"step {step}/40" for step in (1, 11, 21, 31, 40, 20)]


def test_the_live_table_shows_losses_speed_balance_and_scores() -> None:
    screen = io.StringIO()
    display = LiveDisplay("demo", 0, Console(file=screen, force_terminal=True, width=100))
    display.line(LINE)
    display.line(SCORES)
    display.step(20, 40)
    display.close()
    shown = screen.getvalue()
    for words in (
        "demo",
        "step 20 of 40",
        "loss/text",
        "2.2500",
        "6,123",
        "0.50 0.70",
        "accuracy (step 20)",
        "0.625",
    ):
        assert words in shown
