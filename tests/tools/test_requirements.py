"""What is asked for in pyproject.toml can be installed beside the versions of torch that it allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tests.triton_interpreter import reads_numpy
from tools import make_venv

ROOT = Path(__file__).parents[2]


def test_the_extra_for_tests_fits_the_triton_that_torch_brings() -> None:
    """torch 2.11 with CUDA 13.0 pins triton 3.6.0; a lower bound above it would replace torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch, triton = (
        next(one for one in map(Requirement, wanted) if one.name == name)
        for name, wanted in (
            ("torch", project["dependencies"]),
            ("triton", project["optional-dependencies"]["dev"]),
        )
    )
    assert "2.11.0" in torch.specifier and "3.6.0" in triton.specifier


def test_one_range_of_torch_everywhere_with_both_ends_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (torch,) = (one for one in map(Requirement, project["dependencies"]) if one.name == "torch")
    assert Requirement(make_venv.TORCH) == torch
    assert f'"{make_venv.TORCH}"' in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tested = re.search(r"TORCH_VERSIONS \?= (.+)", makefile)
    assert tested is not None
    lowest, *_, highest = map(Version, tested[1].split())
    assert {f">={lowest.major}.{lowest.minor}", f"<{highest.major}.{highest.minor + 1}"} == {
        str(bound) for bound in torch.specifier
    }


def test_an_old_interpreter_reads_old_arrays_only() -> None:
    assert reads_numpy((3, 7), (2, 4)) and reads_numpy((3, 6), (2, 3))
    assert not reads_numpy((3, 6), (2, 4))
