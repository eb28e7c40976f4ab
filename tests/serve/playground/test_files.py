"""A request to the page reaches uploads alone: no files of the machine, and no addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio", reason="the extra [serve] is not installed")

import gradio
from gradio import processing_utils
from gradio.context import LocalContext
from gradio.exceptions import InvalidPathError

from openm6.serve.config import EngineConfig
from openm6.serve.engine import Engine
from openm6.serve.playground.page import add_playground
from openm6.serve.run import create_app
from openm6.serve.server import PLAYGROUND
from tests.serve.running import running
from tests.small_model import embedding_model


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    download = processing_utils.async_ssrf_protected_download
    yield add_playground(create_app(Engine(embedding_model(), EngineConfig(max_num_seqs=2, max_model_len=512))))
    processing_utils.async_ssrf_protected_download = download


def moved(app: Any, path: str) -> Any:
    """What Gradio makes of a file of a request before an input reads it."""
    (page,) = (route.app for route in app.routes if getattr(route, "path", None) == PLAYGROUND)
    blocks = page.get_blocks()
    LocalContext.blocks.set(blocks)
    image = next(block for block in blocks.blocks.values() if isinstance(block, gradio.Image))
    data = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return asyncio.run(processing_utils.async_move_files_to_cache(data, image, check_in_upload_folder=True))


def test_files_and_addresses_are_refused(app: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("keys")
    with pytest.raises(InvalidPathError):
        moved(app, str(secret))
    with pytest.raises(gradio.Error, match="addresses are not fetched"):
        moved(app, "https://example.com/endless.png")


def test_the_page_is_no_proxy(app: Any) -> None:
    with running(app) as address:
        for scheme in ("http", "HTTPS"):
            reply = httpx.get(f"{address}{PLAYGROUND}/gradio_api/file={scheme}://example.com/x")
            assert reply.status_code == 404 and "addresses are not fetched" in reply.text
