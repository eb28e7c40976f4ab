"""Fleets of two and of four processes for the tests of several rooms."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parallel.fleet import Fleet


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two ranks."""
    fleet = Fleet(2, tmp_path_factory.mktemp("two") / "meeting")
    yield fleet
    fleet.close()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Four ranks."""
    fleet = Fleet(4, tmp_path_factory.mktemp("four") / "meeting")
    yield fleet
    fleet.close()
