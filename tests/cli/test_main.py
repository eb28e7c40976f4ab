"""The command line: help with examples, arguments that arrive, failures in one sentence."""

from __future__ import annotations

import errno
import importlib.util
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from openm6.base.errors import ConfigError, DataError, Interrupted
from openm6.cli import generate as cli_generate
from openm6.cli import main as cli
from openm6.cli.doors import DOORS, door
from openm6.train.loop import TrainResult

NEEDS_AN_EXTRA = {"serve replicas": "ray"}  # doors to what is too large for the extra [dev]


def names_of(command: Any, before: str = "") -> Iterator[str]:
    """Every command of a group, those of the groups within it as well."""
    for name, inner in command.commands.items():
        yield from names_of(inner, f"{before}{name} ") if isinstance(inner, TyperGroup) else [before + name]


COMMANDS = sorted(names_of(get_command(cli.app)))
runner = CliRunner()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = runner.invoke(cli.app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert f"Example: openm6 {command}" in shown.stdout


def test_the_first_page_lists_the_commands() -> None:
    shown = runner.invoke(cli.app, ["--help"])
    assert all(command.split()[0] in shown.stdout for command in COMMANDS)
    assert "openm6 demo" in shown.stdout


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_without_spinning_unless_the_user_wants_it(given: str | None, expected: str) -> None:
    """The setting is there before torch is, which reads it once."""
    statement = (
        "import os, sys; from openm6.cli.main import main; sys.argv[1:] = ['--version']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run(
        [sys.executable, "-c", statement], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == f"{expected} False"


@pytest.mark.parametrize("name", DOORS)
def test_every_door_opens(name: str) -> None:
    if name in NEEDS_AN_EXTRA and importlib.util.find_spec(NEEDS_AN_EXTRA[name]) is None:
        with pytest.raises(ConfigError, match=rf"pip install 'openm6\[{NEEDS_AN_EXTRA[name]}\]'$"):
            door(name)
    else:
        assert callable(door(name))


class Called:
    """Stands where a door leads to, and keeps what it was called with."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def door(self, name: str) -> Any:
        def stand_in(*words: Any, **named: Any) -> Any:
            self.calls.append((name, words, named))
            if self.error is not None:
                raise self.error
            return f"{name} is done"

        return stand_in


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("demo", ("train", ("demo", [], False, Path("runs/demo")), {})),
        (
            "train my.yaml loop.steps=3 a=b --resume --out here",
            ("train", ("my.yaml", ["loop.steps=3", "a=b"], True, Path("here")), {}),
        ),
        ("train my.yaml", ("train", ("my.yaml", [], False, None), {})),
    ],
)
def test_words_arrive(monkeypatch: pytest.MonkeyPatch, words: str, call: tuple) -> None:
    called = Called()
    monkeypatch.setattr(cli, "door", called.door)
    shown = runner.invoke(cli.app, words.split())
    assert shown.exit_code == 0, shown.output
    assert called.calls == [call]
    assert shown.stdout == f"{call[0]} is done\n"


def test_a_question_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    monkeypatch.setattr(cli_generate, "door", called.door)
    words = "generate runs/x --text hello --numbers mass=3.5,length= --want image --hole 0,0,1,.5 --out o.png"
    shown = runner.invoke(
        cli.app, [*words.split(), "--seed", "4", "--resident", "2", "--set", "masked.steps=2"]
    )
    assert shown.exit_code == 0, shown.output
    calls = {name: (words, named) for name, words, named in called.calls}
    asked = {name: value for name, value in calls["question"][1].items() if value is not None}
    assert asked == {
        "want": "image",
        "text": "hello",
        "numbers": "numbers is done",
        "series": "series is done",
        "ahead": 8,
        "hole": "shares is done",
        "gap": "shares is done",
        "language": "en",
    }
    assert calls["decoding"][0] == (["text.seed=4", "masked.seed=4", "masked.steps=2"],)
    assert calls["numbers"][0] == ("mass=3.5,length=",)
    assert ("shares", ("0,0,1,.5", 4, "--hole"), {}) in called.calls
    given = (Path("runs/x"), "question is done", "decoding is done", Path("o.png"))
    assert calls["generate"] == ((*given, 2), {})
    assert shown.stdout == "generate is done\n"


def test_how_a_training_ended_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = TrainResult(8, 1234, 3.0, 0, 0, Path("runs/x/checkpoints/step-8"), {})
    monkeypatch.setattr(cli, "door", lambda name: lambda *words: ended)
    shown = runner.invoke(cli.app, ["train", "x.yaml"])
    assert shown.stdout == "8 steps, 1,234 tokens in 3 s, saved as runs/x/checkpoints/step-8\n"


def test_what_an_evaluation_found_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called()
    monkeypatch.setattr(cli, "door", called.door)
    shown = runner.invoke(cli.app, ["evaluate", "runs/x", "--tasks", "a,b", "--json", "s.json"])
    assert shown.exit_code == 0, shown.output
    (name, words, named), (show, shown_words, _) = called.calls
    assert (name, words, named) == (
        "evaluate",
        (Path("runs/x"),),
        {"tasks": ["a", "b"], "data": None, "json_path": Path("s.json"), "settings": []},
    )
    assert (show, shown_words[0]) == ("show judgement", "evaluate is done")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (DataError("row 3 has no picture: remove it"), 1, "error: row 3 has no picture: remove it\n"),
        (Interrupted("stopped at step 9", signal.SIGINT), 130, "stopped at step 9\n"),
        (Interrupted("stopped at step 9", signal.SIGTERM), 143, "stopped at step 9\n"),
        (Interrupted("stopped at step 9", signal.SIGHUP), 129, "stopped at step 9\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_foreseen_failures_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    monkeypatch.setattr(cli, "door", Called(error).door)
    shown = runner.invoke(cli.app, ["train", "x.yaml"])
    assert (shown.exit_code, shown.stderr, shown.stdout) == (code, sentence, "")


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (
            errno.ENOSPC,
            "/full/x cannot be read or written (No space left on device): free some space or choose",
        ),
        (errno.EACCES, "/full/x cannot be read or written (Permission denied): check its rights or choose"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, number: int, sentence: str
) -> None:
    """Wherever it happens: no file is written without its own sentence, but libraries write, too."""
    error = OSError(number, os.strerror(number), "/full/x")
    monkeypatch.setattr(cli, "door", Called(error).door)
    shown = runner.invoke(cli.app, ["train", "x.yaml"])
    assert shown.exit_code == 1 and shown.stdout == ""
    assert shown.stderr == f"error: {sentence} another place\n"


def test_another_failure_of_the_system_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "door", Called(OSError(errno.EBADF, "Bad file descriptor")).door)
    assert isinstance(runner.invoke(cli.app, ["train", "x.yaml"]).exception, OSError)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "door", Called(ZeroDivisionError()).door)
    assert isinstance(runner.invoke(cli.app, ["train", "x.yaml"]).exception, ZeroDivisionError)


def test_an_unknown_command_or_option_is_an_error() -> None:
    assert runner.invoke(cli.app, ["trian"]).exit_code == 2
    assert runner.invoke(cli.app, ["train", "x.yaml", "--reusme"]).exit_code == 2


def test_the_module_runs_as_a_program_in_a_terminal() -> None:
    """Also where standard output is a terminal, as for most people."""
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "openm6", "--version"], stdout=theirs, timeout=60)
    os.close(theirs)
    assert done.returncode == 0
    assert os.read(ours, 100).decode().strip()[0].isdigit()
    os.close(ours)
