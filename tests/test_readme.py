"""What the pages tell a reader to type can be typed, and what they point at is there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_origin

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks import __main__ as benchmarks
from openm6.cli.main import app
from openm6.codecs.registry import shipped_codecs
from openm6.core.config import apply_overrides
from openm6.core.errors import ConfigError
from openm6.core.files import renamed
from openm6.serve.config import ServeConfig
from openm6.tasks.registry import TASKS
from openm6.train.recipe import MultimodalRecipe
from openm6.train.run import read_recipe, recipe_path
from tests.cli.lazy_imports import replace_calls

ROOT = Path(__file__).parent.parent
COMMAND = get_command(app)  # the runner would make it again for each line
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
FIRST_PAGES = ("README.md", "quickstart.md", "own-data.md")
CODECS = (ROOT / "docs" / "codecs.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = ("model", "modalities", "packing", "loop", "parallel", "eval", "engine", "limits", "judge")
READERS_OWN = ("my.yaml",)  # recipes that only the reader has
HARMLESS = (
    "parse_numbers",
    "parse_series",
    "parse_fractions",
    "read_decoding",
    "all_tasks",
)  # functions that only read words


def quoted(text: str) -> Iterator[str]:
    """Lines of code blocks, and code within sentences."""
    for block in FENCE.findall(text):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def in_blocks() -> set[str]:
    """Lines of all code blocks, which a reader types as they are."""
    blocks = (block for page in PAGES for block in FENCE.findall(page.read_text(encoding="utf-8")))
    return {line for block in blocks for line in block.splitlines()}


def commands(program: str) -> list[tuple[str, str]]:
    """Page and words of every call of a program with arguments."""
    return sorted(
        (page.name, line)
        for page in PAGES
        for line in set(quoted(page.read_text(encoding="utf-8")))
        if line.startswith(f"{program} ")
    )


def check_training(recipe: str, overrides: list[str], resume: bool, out: Path | None, device: str = "auto") -> None:
    """A recipe of the package is read with the overrides; nothing is trained."""
    if recipe not in READERS_OWN:
        read_recipe(recipe_path(recipe), overrides)


def check_evaluation(
    trained: Path,
    tasks: list[str] | None,
    data: Path | None,
    json_path: Path | None,
    settings: list[str],
    device: str,
    num_gpu_layers: int | None,
    dtype: str,
) -> None:
    apply_overrides({"eval": {}}, settings)
    known = {f"{component['task']}/{component['source']}" for component in demo_mixture()} | set(TASKS)
    assert set(tasks or ()) <= known


def demo_mixture() -> list[dict[str, Any]]:
    return read_recipe(recipe_path("demo"), [])[1]["mixture"]


def parse(line: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command whose functions check the signature of their call, and train and evaluate what it names."""
    model = SimpleNamespace(answer=lambda questions, decoding: [None])
    instead = {"train_recipe": check_training, "evaluate": check_evaluation, "load": lambda *words: model}
    replace_calls(monkeypatch, instead, keep=HARMLESS)
    monkeypatch.setattr("typer.testing._get_command", lambda _: COMMAND)
    return CliRunner().invoke(app, shlex.split(line, comments=True)[1:])


def parse_benchmark(line: str) -> None:
    """Reads the words as the benchmark would, and runs nothing."""
    name, *words = shlex.split(line, comments=True)[3:]
    assert name in benchmarks.BENCHMARKS, f"no benchmark {name}"
    benchmarks.command(name).make_context(name, words)


@pytest.mark.parametrize(("page", "line"), commands("openm6"))
def test_quoted_commands_are_understood(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = parse(line, monkeypatch)
    if line not in in_blocks() and re.search("Missing (argument|option)", shown.output):
        return  # a sentence may name a command and its options without what it is to work on
    assert shown.exception is None or isinstance(shown.exception, SystemExit), shown.exception
    assert shown.exit_code == 0, f"{page}: {line}\n{shown.output}"


@pytest.mark.parametrize(
    "line",
    [
        "openm6 sreve runs/demo",
        "openm6 demo --fast",
        "openm6 generate runs/demo --text hello",
        "openm6 generate runs/demo --text hello --output video",
        "openm6 generate runs/demo --text hello --output text --set text.heat=1",
        "openm6 train recipes/demo.yaml loop.stepz=3",
        "openm6 train recipes/demonstration.yaml",
    ],
)
def test_a_command_that_does_not_exist_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(line, monkeypatch).exit_code != 0


def test_an_unknown_task_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("openm6 evaluate runs/demo --tasks name_picutre", monkeypatch).exit_code != 0


def test_enough_is_quoted_to_be_worth_the_test() -> None:
    lines = [line for page, line in commands("openm6") if page in FIRST_PAGES]
    wants = {word for line in lines for word in re.findall(r"--output (\w+)", line)}
    assert wants == {"text", "image", "audio", "numbers"}
    assert {line.split()[1] for line in lines} >= {"demo", "train", "evaluate", "generate", "data", "tasks"}


@pytest.mark.parametrize(("page", "line"), commands("make"))
def test_quoted_targets_of_make_exist(page: str, line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), commands("python"))
def test_quoted_scripts_exist(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    path = words[2].replace(".", "/") if words[1] == "-m" else words[1].removesuffix(".py")
    assert (ROOT / f"{path}.py").is_file() or (ROOT / path / "__main__.py").is_file(), f"{page}: {line}"


@pytest.mark.parametrize(("page", "line"), commands("python -m benchmarks"))
def test_quoted_benchmarks_are_understood(page: str, line: str) -> None:
    parse_benchmark(line)


@pytest.mark.parametrize("words", ["trian", "train --stepz 3"])
def test_a_benchmark_that_does_not_exist_is_found(words: str) -> None:
    assert CliRunner().invoke(benchmarks.app, shlex.split(words)).exit_code != 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name} points at {target}"
        assert not heading or heading in headings(found), f"{page.name} points at {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_quoted_keys_of_recipes_and_servers_exist(page: Path) -> None:
    for word in quoted(re.sub(r"\w+\.(py|json|yaml)\b", "", page.read_text(encoding="utf-8"))):
        for path in re.findall(rf"(?:^|\s)((?:{'|'.join(SECTIONS)})(?:\.\w+)+)(?![\w.*(/])", word):
            if path.endswith(".weight"):  # a parameter of a model
                continue
            classes: set[type] = {MultimodalRecipe, ServeConfig}
            for part in path.split("."):
                found = [one.model_fields[part] for one in classes if part in getattr(one, "model_fields", {})]
                # Below a mapping, such as model.overrides, any key may follow.
                assert found or not classes or dict in classes, f"{page.name} names {path}"
                classes = {inner for one in found for inner in types_in(one.annotation)}


def types_in(annotation: Any) -> set[type]:
    """The classes that an annotation is made of."""
    inner = {found for one in get_args(annotation) for found in types_in(one)}
    return inner | {get_origin(annotation) or annotation} if annotation not in (Any, None) else inner


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_no_page_names_a_task_by_its_old_name(page: Path) -> None:
    old = {name for name in renamed("task") if "_" in name}
    old |= {name.replace("picture", "image").replace("sound", "audio") for name in old}
    assert not old & set(re.findall(r"\w+", page.read_text(encoding="utf-8")))


def headings(page: Path) -> set[str]:
    """The anchors of a page, made of its headings as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("name", shipped_codecs())
def test_scores_of_the_codecs_are_those_that_were_measured(name: str) -> None:
    scores = json.loads((ROOT / f"openm6/codecs/weights/{name}.json").read_text())["test"]
    row = re.search(rf"^\| `{name}` \| [^|]+ \| (.+) \|$", CODECS, re.MULTILINE)
    assert row, f"no row for codec {name}"
    cells = [float(cell.split()[0]) for cell in row[1].split(" | ")]
    if name.startswith("audio"):
        wanted = [round(scores["digits"]["log_mel_l1"], 2), round(scores["digits"]["bits"], 1)]
    else:
        wanted = [round(scores[f"{source}_64"]["psnr"], 1) for source in ("emoji", "flags", "digits")]
        wanted.append(round(scores["emoji_64"]["bits"], 1))
    assert cells == wanted


def test_results_are_of_tasks_of_the_demo_and_equal_on_both_pages() -> None:
    short, full = (
        dict(re.findall(r"^\| `(\w+/\w+)` \| (.*\]) \|", text, re.MULTILINE)) for text in (README, QUICKSTART)
    )
    assert short and short.items() <= full.items()
    assert set(full) <= {f"{component['task']}/{component['source']}" for component in demo_mixture()}


def test_the_readme_fits_on_two_screens() -> None:
    assert README.count("\n") <= 90


def test_the_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    assert (tmp_path / "skull.png").read_bytes().startswith(b"\x89PNG")


def test_every_shipped_recipe_is_in_the_table_of_the_quickstart() -> None:
    shown = re.findall(r"^\| (`.*) \| .* \| .* ?\|$", section(QUICKSTART, "Shipped recipes"), re.MULTILINE)
    names = {name for cell in shown for name in re.findall(r"`([\w-]+)`", cell.split(" | ")[0])}
    assert names == {path.stem for path in (ROOT / "openm6" / "recipes").glob("*.yaml")}


def section(text: str, heading: str) -> str:
    """The text below a heading of the second level."""
    return re.split(r"^## ", text.partition(f"## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_a_missing_recipe_says_so() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        check_training("recipes/nowhere.yaml", [], False, None)
