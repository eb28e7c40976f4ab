"""How every command fails: one sentence on standard error and an exit code, no traceback for what was foreseen."""

from __future__ import annotations

import errno
import sys
from typing import Any

from typer.core import TyperGroup

from openm6.base.errors import Interrupted, OpenM6Error
from openm6.base.files import mend_of
from openm6.base.log import start_log

FAILED, INTERRUPTED = 1, 130
# What the system may refuse at any moment, whatever was being written: no bug.
REFUSED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


class PlainGroup(TyperGroup):
    """Turns foreseen errors into exit code 1 and Ctrl-C into 130; anything else is a bug with its traceback."""

    def invoke(
        self, ctx: Any
    ) -> Any:  # the type of a context lives in another place in each release of typer
        start_log()
        try:
            return super().invoke(ctx)
        except OpenM6Error as error:
            _say(f"error: {error}")
            ctx.exit(FAILED)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            _say(f"error: {refused(error)}")
            ctx.exit(FAILED)
        except KeyboardInterrupt as stop:
            _say(str(stop) or "stopped")
            ctx.exit(stop.exit_code if isinstance(stop, Interrupted) else INTERRUPTED)


def refused(error: OSError) -> str:
    """What the system would not do, in one sentence."""
    what = error.filename if error.filename is not None else "a file"
    return f"{what} cannot be read or written ({error.strerror}): {mend_of(error)}"


def _say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")
