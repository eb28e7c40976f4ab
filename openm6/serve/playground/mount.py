"""The playground under /playground of a server; with API keys, a key is its password."""

from __future__ import annotations

import hmac
from pathlib import Path

import gradio
from fastapi import FastAPI

from openm6.serve.guard import PLAYGROUND
from openm6.serve.playground.page import Page
from openm6.serve.state import Server

STYLE = Path(__file__).with_name("page.css")


def add_playground(app: FastAPI) -> FastAPI:
    """Puts the page on an app that `create_app` made; call it before the app starts."""
    server = app.state.server
    assert isinstance(server, Server)
    keys = server.config.keys
    app.state.playground = True

    def fits(user: str, password: str) -> bool:
        # Every key is compared, so that time tells nothing about which came close.
        found = [hmac.compare_digest(password.encode(), key.encode()) for key in keys]
        return any(found)

    return gradio.mount_gradio_app(
        app,
        Page(server).build(),
        path=PLAYGROUND,
        auth=fits if keys else None,
        auth_message="Any name; the password is an API key." if keys else None,
        footer_links=[],
        max_file_size=server.config.limits.body_bytes,
        ssr_mode=False,
        theme=gradio.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css_paths=[STYLE],
    )
