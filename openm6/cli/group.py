"""The end of a command: its result on standard output, or one sentence on standard error and an exit code."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.protocol import is_renderable
from rich.table import Table
from typer.core import TyperGroup

from openm6.core.errors import Interrupted, OpenM6Error
from openm6.core.files import advice_for, renamed, replace_text, to_json
from openm6.core.log import start_log

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
# Errors of the system that are no bugs of the package.
REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})
MAX_NAME = 48  # characters of a name that no terminal cuts
# Packages of an extra, and the name of that extra.
SERVE = ("fastapi", "starlette", "uvicorn", "prometheus_client", "httpx", "gradio")
HUB = ("huggingface_hub", "transformers")
EXTRAS = dict.fromkeys(SERVE, "serve") | dict.fromkeys(HUB, "hub") | {"ray": "ray"}


class PlainGroup(TyperGroup):
    """Turn expected errors into exit code 1 and Ctrl-C into 130; anything else is a bug and keeps its traceback."""

    # The type of a context is in another module in each release of typer.
    def invoke(self, ctx: Any) -> Any:
        start_log()
        try:
            return super().invoke(ctx)
        except OpenM6Error as error:
            sentence, code = f"error: {error}", FAILED
        except ModuleNotFoundError as error:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            sentence, code = f"error: this needs {error.name}: pip install '.[{extra}]' in a checkout", FAILED
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            what = error.filename if error.filename is not None else "a file"
            sentence = f"error: {what} cannot be read or written ({error.strerror}): {advice_for(error)}"
            code = FAILED
        except KeyboardInterrupt as stop:
            sentence = str(stop) or "stopped"
            code = stop.exit_code if isinstance(stop, Interrupted) else INTERRUPTED
        # The error of an unknown option, too, is in another module in each release of typer.
        except Exception as error:
            old = getattr(error, "option_name", None)
            new = None if old is None else renamed("option").get(old)
            if new is None:
                raise
            sentence, code = f"error: the option {old!r} was renamed to {new!r}", MISUSED
        sys.stderr.write(sentence + "\n")
        ctx.exit(code)


def make_app(group: type[TyperGroup] = PlainGroup) -> typer.Typer:
    """Return an empty Typer program with plain help and without Typer's own tracebacks."""
    return typer.Typer(
        cls=group,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=HELP_OPTIONS,
    )


def write_json(content: Any, path: Path | None) -> None:
    if path is not None:
        replace_text(path, to_json(content, indent=2) + "\n")


def print_result(result: Any) -> None:
    """Print what a call returned, if anything: tables as tables, with whole names first, the rest by `str`."""
    if isinstance(result, Table):
        for column in result.columns:
            column.overflow = "fold"  # rich would cut words that are longer than a line
        names = result.columns[0]
        longest = max(cell_len(str(name)) for name in (names.header, *names.cells))
        names.no_wrap, names.min_width = longest <= MAX_NAME, min(longest, MAX_NAME)
    if result is not None:
        # rich would print a dataclass field by field instead of its `str`.
        if isinstance(result, str) or not is_renderable(result):
            typer.echo(str(result))  # as it is: rich would expand tabs and names of emoji
        else:
            Console(emoji=False).print(result, soft_wrap=True, highlight=False, markup=False)
