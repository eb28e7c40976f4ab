"""A server on a free port of this machine, as tests and the official client see one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from tests.load.server import Address
from tests.small_model import loaded


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Runs an app in a thread; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@contextmanager
def answering(app: FastAPI) -> Iterator[Address]:
    """As `running`, for a plain client."""
    with running(app) as url:
        yield Address(int(url.rpartition(":")[2]), os.getpid())


def small_app(
    name: str = "tiny", limits: Limits | None = None, keys: tuple[str, ...] = (), hosts: tuple[str, ...] = ()
) -> FastAPI:
    """An app of the untrained model."""
    engine = Engine(loaded(3), EngineConfig(max_num_seqs=2, max_model_len=256))
    return create_app(engine, ServeConfig(limits=limits or Limits(), keys=keys, hosts=hosts), name)
