"""`python -m benchmarks NAME …`: one command per file, its function `bench_NAME`."""

from __future__ import annotations

import importlib
from typing import Any

import typer

from openm6.cli.group import HELP_OPTIONS, PlainGroup, make_app

BENCHMARKS = (
    "train", "experts", "packing", "fp8", "serve", "decode", "generate", "plan", "offload", "rank", "simulate",
    "all-to-all", "scaling", "reshard", "batches", "gpu", "own-data", "multitask", "transfer",
)  # fmt: skip


class Benchmarks(PlainGroup):
    """Import a benchmark when it is called, because most need torch and some transformers."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return command(cmd_name) if cmd_name in BENCHMARKS else None


def command(name: str) -> Any:
    """Return the command of one benchmark, with the options of its function."""
    module = name.replace("-", "_")
    one = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=HELP_OPTIONS,
    )
    one.command(name)(getattr(importlib.import_module(f"benchmarks.{module}"), f"bench_{module}"))
    return typer.main.get_command(one)


app = make_app(Benchmarks)


@app.callback()
def start() -> None:
    """Run a benchmark: it prints one JSON object with its baseline, most within eight minutes, also if interrupted."""


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
