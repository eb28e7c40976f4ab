"""A file is replaced in one step or not at all; JSON holds only what every parser reads."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest

from openm6.core.errors import ConfigError, OutputError
from openm6.core.files import append_line, check_writable, plain_data, replace_text, to_json
from openm6.core.run_folder import RunFolder


def test_the_old_content_stays_where_the_new_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    replace_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OutputError, match=r"notes.txt could not be written \(File too large\): free some space"):
            replace_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    replace_text(path, "新\n")
    assert path.read_text(encoding="utf-8") == "新\n"


def test_a_line_that_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(OutputError, match=r"^/dev/full could not be written \(No space left on device\): free"):
        append_line(Path("/dev/full"), "x")


def test_where_nothing_can_be_written_is_said_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json", "--json")
    with pytest.raises(ConfigError, match="--json .*: there is no folder .*no; make it first"):
        check_writable(tmp_path / "no/x.json", "--json")
    with pytest.raises(ConfigError, match="is a folder: name a file in it"):
        check_writable(tmp_path, "--json")


def test_a_file_in_the_place_of_a_run_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match=r"run could not be written \(File exists\): check its rights or choose"):
        RunFolder.open(tmp_path / "run")


def test_a_run_keeps_its_settings_in_order(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "a/b")
    assert run.name == "b" and run.read_config() == {}
    run.write_config({"kind": "toy", "loop": {"steps": "auto", "seed": 1}, "名": "é"})
    run.set_config("loop", "steps", 12)
    run.set_config("eval", "records", 3)
    expected = {"kind": "toy", "loop": {"steps": 12, "seed": 1}, "名": "é", "eval": {"records": 3}}
    assert run.read_config() == expected
    assert list(run.read_config()) == list(expected)
    assert "名: é" in run.config.read_text(encoding="utf-8")


def test_lines_of_metrics_are_read_whole(tmp_path: Path) -> None:
    """Only a line break ends a line, not another sign that Unicode calls one."""
    run = RunFolder(tmp_path)
    assert run.read_metrics() == []
    lines = [{"step": 1, "a\u2028b\x85": 0.5}, {"step": 2}]
    run.metrics.write_text("".join(to_json(line) + "\n" for line in lines) + '{"step": 3, "lo', encoding="utf-8")
    assert run.read_metrics() == lines


VALUE = {"a": [1.0, float("inf")], "b": {"c": float("nan")}, "d": "nan", "e": 3, "f": (1, -float("inf"))}


def test_numbers_that_are_not_finite_become_null() -> None:
    expected = {"a": [1.0, None], "b": {"c": None}, "d": "nan", "e": 3, "f": [1, None]}
    assert plain_data(VALUE) == expected
    assert json.loads(to_json(VALUE, indent=1)) == expected


def test_numbers_of_numpy_and_half_characters() -> None:
    value = {"a": np.float32(0.5), 3: np.int64(7), "b": [np.float64("nan"), True], "c": "x\ud800"}
    assert json.loads(to_json(value)) == {"a": 0.5, "3": 7, "b": [None, True], "c": "x?"}
