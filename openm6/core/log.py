"""The program's log: plain lines on standard error."""

import logging
import sys


class _CurrentStandardError(logging.Handler):
    """Writes to whatever `sys.stderr` is now, since a live display replaces it while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def get_log() -> logging.Logger:
    """Return the program's logger; silent in a library user's program until that program sets logging up."""
    return logging.getLogger("openm6")


def start_log() -> None:
    """Show the program's messages on standard error; called once by the command line."""
    log = get_log()
    if not log.handlers:
        log.addHandler(_CurrentStandardError())
        log.propagate = False
    log.setLevel(logging.INFO)
