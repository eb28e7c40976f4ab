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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from openm6.cli.group import print_result
from openm6.cli.main import app
from openm6.cli.use import _files_in
from openm6.core.config import apply_overrides
from openm6.core.errors import DataError, Interrupted, PromptTooLongError
from openm6.core.files import renamed
from openm6.core.log import get_log
from openm6.optim.config import PRECISIONS
from openm6.train.loop import TrainResult
from tests.cli.lazy_imports import import_name, lazy_imports, replace_calls


def names_of(command: Any, before: str = "") -> Iterator[str]:
    """Every command of a group, those of the groups within it as well."""
    for name, inner in command.commands.items():
        yield from names_of(inner, f"{before}{name} ") if isinstance(inner, TyperGroup) else [before + name]


COMMANDS = sorted(names_of(get_command(app)))
runner = CliRunner()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = runner.invoke(app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert f"Example: openm6 {command}" in shown.stdout


def test_the_first_page_lists_the_commands() -> None:
    shown = runner.invoke(app, ["--help"])
    assert all(command.split()[0] in shown.stdout for command in COMMANDS)
    assert "openm6 try" in shown.stdout


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


@pytest.mark.parametrize(("module", "name"), lazy_imports())
def test_every_lazy_import_is_there(module: str, name: str) -> None:
    """A missing one would be seen only when the command is used."""
    assert import_name(module, name) is not None or importlib.util.find_spec("ray") is None


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.serve.run.read_serve_config", missing_ray)
    shown = runner.invoke(app, ["serve", "runs/x", "--ray"])
    assert shown.exit_code == 1 and shown.stderr == "error: this needs ray: pip install '.[ray]' in a checkout\n"


def missing_ray(settings: list[str], keys: Path | None) -> None:
    raise ModuleNotFoundError("No module named 'ray'", name="ray")


class Called:
    """Replaces what a command calls, and keeps the arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error = error
        names = {name for _, name in lazy_imports()}
        replace_calls(monkeypatch, {name: partial(self.call, name) for name in names} | {"load": self.load})

    def call(self, name: str, *words: Any, **named: Any) -> Any:
        self.calls.append((name, words, named))
        if self.error is not None:
            raise self.error
        return f"{name} is done"

    def load(self, *words: Any) -> Any:
        """A model whose answer is recorded, too."""
        self.call("load", *words)
        return self

    def answer(self, questions: list[Any], decoding: Any) -> list[Any]:
        return [self.call("answer", questions, decoding)]


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("demo", ("train_recipe", ("demo", [], False, Path("runs/demo"), "auto"), {})),
        (
            "train my.yaml loop.steps=3 a=b --resume --out here --device cuda:1",
            ("train_recipe", ("my.yaml", ["loop.steps=3", "a=b"], True, Path("here"), "cuda:1"), {}),
        ),
        ("train my.yaml", ("train_recipe", ("my.yaml", [], False, None, "auto"), {})),
    ],
)
def test_words_arrive(monkeypatch: pytest.MonkeyPatch, words: str, call: tuple) -> None:
    called = Called(monkeypatch)
    shown = runner.invoke(app, words.split())
    assert shown.exit_code == 0, shown.output
    assert called.calls == [call]
    assert shown.stdout == f"{call[0]} is done\n"


def test_an_evaluation_takes_a_model_that_does_not_fit_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch)
    assert runner.invoke(app, ["evaluate", "runs/x", "--num-gpu-layers", "0", "--device", "cpu"]).exit_code == 0
    assert called.calls[0] == ("find_model", (Path("runs/x"),), {})
    assert called.calls[1] == (
        "evaluate",
        ("find_model is done", None, None, None, []),
        {"device": "cpu", "num_gpu_layers": 0, "dtype": "auto"},
    )
    refused = runner.invoke(app, ["evaluate", "runs/x", "--num-gpu-layers", "0", "--scenarios"])
    assert refused.exit_code == 1 and "leave all but --json, --device and --dtype out" in refused.stderr


def test_a_question_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch)
    monkeypatch.setattr("openm6.inference.question.Question", partial(called.call, "question"))
    words = "generate runs/x --text hello --numbers mass=3.5,length= --output image --mask-box 0,0,1,.5 --out o.png"
    shown = runner.invoke(app, [*words.split(), "--seed", "4", "--num-gpu-layers", "2", "--set", "masked.steps=2"])
    assert shown.exit_code == 0, shown.output
    calls = {name: (words, named) for name, words, named in called.calls}
    asked = {name: value for name, value in calls["question"][1].items() if value is not None}
    assert asked == {
        "output": "image",
        "text": "hello",
        "numbers": "parse_numbers is done",
        "series": "parse_series is done",
        "ahead": 8,
        "mask_box": "parse_fractions is done",
        "mask_span": "parse_fractions is done",
        "language": "en",
    }
    assert calls["read_decoding"][0] == (["text.seed=4", "masked.seed=4", "masked.steps=2"],)
    assert calls["parse_numbers"][0] == ("mass=3.5,length=",)
    assert ("parse_fractions", ("0,0,1,.5", 4, "--mask-box"), {}) in called.calls
    order = [name for name, _, _ in called.calls[-4:]]
    assert order == ["check_file", "load", "answer", "write_answer"], "a file that cannot be written is found first"
    assert calls["check_file"][0] == (Path("o.png"), "image")
    assert calls["load"][0] == (Path("runs/x"), "auto", "auto", 2)
    assert calls["answer"][0] == (["question is done"], "read_decoding is done")
    assert calls["write_answer"][0] == ("answer is done", "check_file is done")
    assert shown.stdout == "write_answer is done\n"


def test_how_a_training_ended_is_said_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = TrainResult(8, 1234, 3.0, 0, Path("runs/x/checkpoints/step-8"), {})
    replace_calls(monkeypatch, {"train_recipe": lambda *words: ended})
    shown = runner.invoke(app, ["train", "x.yaml"])
    assert shown.stdout == "8 steps, 1,234 tokens in 3 s, saved as runs/x/checkpoints/step-8\n"


def test_what_an_evaluation_found_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch)
    shown = runner.invoke(app, ["evaluate", "runs/x", "--tasks", "a,b", "--json", "s.json"])
    assert shown.exit_code == 0, shown.output
    _, (name, words, named), (show, shown_words, _) = called.calls
    assert (name, words, named) == (
        "evaluate",
        ("find_model is done", ["a", "b"], None, Path("s.json"), []),
        {"device": "auto", "num_gpu_layers": None, "dtype": "auto"},
    )
    assert (show, shown_words[0]) == ("print_table", "evaluate is done")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (DataError("row 3 has no image: remove it"), 1, "error: row 3 has no image: remove it\n"),
        (Interrupted("stopped at step 9", signal.SIGINT), 130, "stopped at step 9\n"),
        (Interrupted("stopped at step 9", signal.SIGTERM), 143, "stopped at step 9\n"),
        (Interrupted("stopped at step 9", signal.SIGHUP), 129, "stopped at step 9\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_expected_failures_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, sentence: str
) -> None:
    Called(monkeypatch, error)
    shown = runner.invoke(app, ["train", "x.yaml"])
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
def test_what_the_system_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, number: int, sentence: str) -> None:
    """Wherever it happens: no file is written without its own sentence, but libraries write, too."""
    error = OSError(number, os.strerror(number), "/full/x")
    Called(monkeypatch, error)
    shown = runner.invoke(app, ["train", "x.yaml"])
    assert shown.exit_code == 1 and shown.stdout == ""
    assert shown.stderr == f"error: {sentence} another path\n"


def test_another_failure_of_the_system_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    Called(monkeypatch, OSError(errno.EBADF, "Bad file descriptor"))
    assert isinstance(runner.invoke(app, ["train", "x.yaml"]).exception, OSError)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    Called(monkeypatch, ZeroDivisionError())
    assert isinstance(runner.invoke(app, ["train", "x.yaml"]).exception, ZeroDivisionError)


def test_an_unknown_command_or_option_is_an_error() -> None:
    assert runner.invoke(app, ["trian"]).exit_code == 2
    assert runner.invoke(app, ["train", "x.yaml", "--reusme"]).exit_code == 2


OLD_OPTIONS = {
    "generate": ["--want", "--sound", "--hole", "--gap", "--resident"],
    "plan": ["--pseudo-share", "--recompute-every"],
    "convert": ["--bytes"],
}


def test_every_old_option_is_tried() -> None:
    assert sorted(renamed("option")) == sorted(old for options in OLD_OPTIONS.values() for old in options)


@pytest.mark.parametrize(
    ("command", "old"), [(command, old) for command, options in OLD_OPTIONS.items() for old in options]
)
@pytest.mark.parametrize("form", ["{} 2", "{}=2"])
def test_an_old_option_is_refused_with_a_new_one_of_the_same_command(command: str, old: str, form: str) -> None:
    new = renamed("option")[old]
    shown = runner.invoke(app, [command, "runs/x", *form.format(old).split()])
    sentence = f"error: the option '{old}' was renamed to '{new}'\n"
    assert (shown.exit_code, shown.stderr, shown.stdout) == (2, sentence, "")
    assert f"{new} " in runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout


def test_the_help_of_convert_lists_the_precisions() -> None:
    shown = runner.invoke(app, ["convert", "--help"], env={"COLUMNS": "200"}).stdout
    assert f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}" in " ".join(shown.split())


def test_the_module_runs_as_a_program_in_a_terminal() -> None:
    """Also where standard output is a terminal, as for most people."""
    ours, theirs = pty.openpty()
    done = subprocess.run([sys.executable, "-m", "openm6", "--version"], stdout=theirs, timeout=60)
    os.close(theirs)
    assert done.returncode == 0
    assert os.read(ours, 100).decode().strip()[0].isdigit()
    os.close(ours)


@pytest.mark.parametrize(
    "words",
    [
        ["demo", "--out", "{}"],
        ["train", "demo", "--out", "{}"],
        ["train", "demo", "--nproc", "2", "--out", "{}"],
        ["evaluate", "{}"],
        ["evaluate", "{}", "--scenarios"],
        ["generate", "{}", "--output", "text", "--text", "a"],
        ["serve", "{}", "--port", "0"],
    ],
)
def test_every_command_that_computes_asks_for_its_device(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name reaches the one resolver: commands on a run without a checkpoint fail there only if it comes first."""
    monkeypatch.setattr("openm6.inference.load.latest", lambda path: path)
    launched: list[list[str]] = []
    monkeypatch.setattr("openm6.distributed.launch.launch", lambda words, *_: launched.append(words))
    shown = runner.invoke(app, [word.format(tmp_path / "run") for word in words] + ["--device", "tpu"])
    if launched:
        assert launched[0][-4:] == ["--device", "tpu", "--out", str(tmp_path / "run")]
    else:
        sentence = "error: no device is called 'tpu': choose auto, cpu, cuda or cuda:N\n"
        assert (shown.exit_code, shown.stderr) == (1, sentence)


def test_a_plan_for_a_gpu_of_the_table_has_no_device() -> None:
    shown = runner.invoke(app, ["plan", "nano", "--gpu", "h100", "--device", "cpu"])
    assert shown.exit_code == 1 and "leave out --gpu" in shown.stderr


@pytest.mark.parametrize(
    ("words", "model"),
    [("", "mini"), ("mine", "mine"), ("runs/x", Path("runs/x")), ("./mine/", Path("mine"))],
)
def test_a_model_is_named_by_folder_or_name_and_mini_by_default(
    monkeypatch: pytest.MonkeyPatch, words: str, model: Path | str
) -> None:
    called = Called(monkeypatch)
    monkeypatch.setattr("openm6.inference.question.Question", partial(called.call, "question"))
    for line in (f"generate {words} --text a --output text", f"try {words}", f"serve {words}"):
        shown = runner.invoke(app, line.split())
        assert shown.exit_code == 0, shown.output
    found = {name: given[0] for name, given, _ in called.calls if given}
    assert found["load"] == found["try_model"] == found["serve"] == model


class Echo:
    """A model that answers with what it was shown."""

    def chat(self, messages: list[dict[str, Any]], stream: bool, max_new_tokens: int) -> Iterator[str]:
        assert max_new_tokens > 64
        *media, words = messages[-1]["content"]
        if words["text"] == "broken":
            raise DataError("not this one")
        yield f"{len(messages)} "
        if words["text"] == "odd":
            get_log().warning("not trained")
        yield f"{[(part['type'], part['path']) for part in media]} {words['text']}"


def test_a_chat_shows_files_and_remembers_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm6.api.model.load", lambda *_: Echo())
    monkeypatch.setattr("openm6.cli.use.guess_type", lambda _: (None, None))  # as where there is no table of types
    said = "hello\nbroken\n@a/b.png What is @c.flac this?\nWhat does  @dataclass do?\n\nnever\n"
    shown = runner.invoke(app, ["chat", "smol"], input=said)
    assert shown.exit_code == 0
    answers = "> 1 [] hello", "> not this one", "> 3 [('image', 'a/b.png'), ('audio', 'c.flac')] What is this?"
    answers += "> 5 [] What does  @dataclass do?", "> "
    assert shown.stdout == "\n".join(answers)


def test_a_chat_longer_than_the_model_reads_goes_on_without_its_oldest_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Echo):
        def chat(self, messages: list[dict[str, Any]], stream: bool, max_new_tokens: int) -> Iterator[str]:
            if len(messages) > 3 or messages[-1]["content"][0]["text"] == "endless":
                raise PromptTooLongError("too long")
            return super().chat(messages, stream, max_new_tokens)

    monkeypatch.setattr("openm6.api.model.load", lambda *_: Forgetful())
    shown = runner.invoke(app, ["chat", "smol"], input="a\nb\nc\nendless\nd\n\n")
    assert shown.stdout.split("\n") == ["> 1 [] a", "> 3 [] b", "> 3 [] c", "> too long", "> 3 [] d", "> "]


@pytest.mark.parametrize(
    ("line", "words", "names"),
    [
        ("Describe @face.png.", "Describe .", ["face.png"]),
        ("What is @face.png?", "What is ?", ["face.png"]),
        ("描述@face.png", "描述", ["face.png"]),
        ("请看,再描述@face.png上的人。", "请看,再描述上的人。", ["face.png"]),
        ("@notes and @face.png", "and", ["notes", "face.png"]),
        ("Hear @gone.mp3! See 图：@没有.png的内容", "Hear ! See 图：的内容", ["gone.mp3", "没有.png"]),
        ("mail me@face.png @dataclass @notes2 @x.py", "mail me@face.png @dataclass @notes2 @x.py", []),
    ],
)
def test_files_in_a_line_of_a_chat(
    line: str, words: str, names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("face.png", "notes"):
        (tmp_path / name).touch()
    found, files = _files_in(line)
    assert (found, [name for name, _ in files]) == (words, names)
    assert all(kind == ("audio" if name.endswith("mp3") else "image") for name, kind in files)


def test_an_answer_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_result("urn:key:1\tend [red]")
    assert capsys.readouterr().out == "urn:key:1\tend [red]\n"


def test_a_note_about_an_answer_begins_a_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("openm6.api.model.load", lambda *_: Echo())
    shown = runner.invoke(app, ["chat", "smol"], input="odd\n\n")
    assert shown.stdout == "> 1 \n[] odd\n> " and "not trained" in caplog.text
    assert not get_log().filters


def test_what_would_be_ignored_or_lost_is_refused_first(tmp_path: Path) -> None:
    shown = runner.invoke(app, ["serve", "mini", "--replicas", "max_replicas=8"])
    assert shown.exit_code == 1 and "--replicas is for replicas on Ray: add --ray" in shown.stderr
    shown = runner.invoke(app, ["plan", "demo", "--json", str(tmp_path / "no" / "plan.json")])
    assert shown.exit_code == 1 and "--json" in shown.stderr


def test_settings_of_a_server_need_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    called = Called(monkeypatch)
    assert runner.invoke(app, ["serve", "engine.max_num_seqs=2", "--host", "::"]).exit_code == 0
    calls = {name: words for name, words, _ in called.calls}
    assert "engine.max_num_seqs=2" in calls["read_serve_config"][0]
    # Two colons are no text in YAML.
    assert apply_overrides({}, calls["read_serve_config"][0])["host"] == "::"


def test_without_a_shipped_model_a_sentence_names_the_way_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm6.hub.find.SHIPPED", tmp_path)
    monkeypatch.setenv("OPENM6_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shown = runner.invoke(app, ["generate", "--text", "a", "--output", "text"])
    assert shown.exit_code == 1 and shown.stderr.count("\n") == 1
    assert "such as runs/demo, which openm6 demo trains" in shown.stderr


def test_a_restart_does_not_go_on_with_a_run_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt would be refused, and the launcher would start it again as one that resumes."""
    folder = tmp_path / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"files": {}}')
    started: list[Any] = []
    monkeypatch.setattr("openm6.distributed.launch.launch", lambda *words: started.append(words))
    words = ["train", "demo", "--out", str(tmp_path), "--max-restarts", "1"]
    shown = runner.invoke(app, words)
    assert shown.exit_code and "already holds a run" in shown.output + str(shown.exception) and not started
    assert not runner.invoke(app, [*words, "--resume"]).exit_code and len(started) == 1
