"""The soak and the fuzz in their short forms, against a server in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from tests.load.fuzz import fuzz, mutated
from tests.load.server import Address
from tests.load.soak import soak
from tests.serve.running import answering
from tests.small_model import loaded


@pytest.fixture(scope="module")
def address() -> Iterator[Address]:
    engine = Engine(loaded(3), EngineConfig(max_num_seqs=4, max_model_len=256, max_num_media=3, max_queued_tokens=600))
    config = ServeConfig(limits=Limits(body_bytes=1_000_000))
    with answering(create_app(engine, config)) as found:
        yield found


def test_a_short_soak_finds_no_wrong_answer(address: Address) -> None:
    found = soak(address, 1.0)
    assert not found["wrong"] and not found["other_statuses"], found
    assert found["answered"] + found["refused"] == found["asked"] and found["answered"] > 0


def test_broken_uploads_never_end_in_a_server_error(address: Address) -> None:
    found = fuzz(address, 100)
    assert found["passed"], found["failures"]
    assert sum(found["statuses"].values()) == 100


def test_the_same_number_is_the_same_upload() -> None:
    data = bytes(range(256))
    first, again = ([mutated(data, random.Random(str(n))) for n in range(200)] for _ in range(2))
    assert first == again and sum(one == data for one in first) < 20
