"""Errors for users: one sentence on what is wrong and how to fix it."""

import difflib
import signal

LONGEST_NAME = 100  # letters that are compared
MIN_SIMILARITY = 0.75  # `describe` is 0.67 like `transcribe`, and means something else


class OpenM6Error(Exception):
    """Base of every expected failure; the command line prints it without a traceback and exits with 1."""


class ConfigError(OpenM6Error):
    """A setting, key, preset, task or recipe that cannot be used as given."""


class DataError(OpenM6Error):
    """Input that is missing, broken, out of bounds or lacks a column."""


class PromptTooLongError(DataError):
    """A prompt of more tokens than a model reads."""


class MissingFieldError(DataError):
    """A record without a field that a task needs: it is skipped for that task, and not broken."""


class MissingColumnError(DataError):
    """A table without a column that is named."""


class CheckpointError(OpenM6Error):
    """A checkpoint that is missing, incomplete, of another shape, or could not be written."""


class OutputError(OpenM6Error):
    """A file that could not be written: a full disk, missing permission, a folder of that name."""


class TrainingError(OpenM6Error):
    """A run that cannot continue: too many broken records or too many non-finite steps."""


class EngineError(OpenM6Error):
    """The engine of a server that failed and cannot continue."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run, which saved itself; the exit code is the shell's: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return a hint such as `did you mean 'penguins'? (known: …)` for a mistyped name."""
    if not known:
        return "none is known"
    # Of a very long name, the search would take seconds.
    close = difflib.get_close_matches(name[:LONGEST_NAME], known, n=1, cutoff=MIN_SIMILARITY)
    listing = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"did you mean {close[0]!r}? (known: {listing})" if close else f"known: {listing}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, 200 characters at most, or its class if it has none."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
