"""Conversations in every form become the same record; what cannot be read is one sentence, and one broken row."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from openm6.core.config import build
from openm6.core.errors import DataError
from openm6.data.chat import ChatConfig
from openm6.data.inspect import inspect_path
from openm6.data.source import Source
from openm6.train.recipe import MultimodalRecipe
from tests.data.sample_images import png, wav

IMAGE, OTHER, AUDIO = png(), png("blue"), wav()
DATA_URL = f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}"


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def write(folder: Path, rows: list[Any], name: str = "talk.jsonl") -> str:
    """A file of chats, with the files that they name beside it."""
    for file, content in (("a.png", IMAGE), ("b.png", OTHER), ("c.wav", AUDIO)):
        (folder / file).write_bytes(content)
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return str(path)


def opened(path: str, **settings: Any) -> Source:
    return ChatConfig(path=path, test_fraction=0.0, **settings).open("talk", "train", lambda name: pytest.fail(name))


def read(folder: Path, row: Any) -> list[tuple[str, list[Any]]]:
    """Role and content of each message of a row."""
    (record,) = (opened(write(folder, [row]))[0],)
    return [(x["role"], [item[item["type"]] for item in x["content"]]) for x in record["messages"]]


SAME = [
    ("system", ["Be brief."]),
    ("user", [IMAGE, "What is it?", AUDIO]),
    ("assistant", ["a cup", OTHER]),
]
FORMS: dict[str, dict[str, Any]] = {
    "OpenAI": {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            user([
                {"type": "image_url", "image_url": {"url": DATA_URL}},
                {"type": "text", "text": "What is it?"},
                {"type": "input_audio", "input_audio": {"data": base64.b64encode(AUDIO).decode(), "format": "wav"}},
            ]),
            assistant([{"type": "text", "text": "a cup"}, {"type": "image_url", "image_url": {"url": "b.png"}}]),
        ]
    },
    "Hugging Face": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            user([
                {"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "audio", "path": "c.wav"},
            ]),
            assistant([{"type": "text", "text": "a cup"}, {"type": "image", "image": "b.png"}]),
        ],
        "images": ["a.png"],
    },
    "ms-swift": {
        "messages": [user("<image>What is it?<audio>"), assistant("a cup<image>")],
        "system": "Be brief.", "images": ["a.png", {"bytes": None, "path": "b.png"}], "audios": ["c.wav"],
    },
    "LLaMA-Factory": {
        "messages": [{"role": "system", "content": "Be brief."}, user("<image>What is it?<audio>"),
                     assistant("a cup<image>")],
        "images": ["a.png", "file://b.png"], "audios": "c.wav", "tools": "", "videos": [],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "<image>What is it?<audio>"},
                          {"from": "gpt", "value": "a cup<image>"}],
        "system": "Be brief.", "images": [DATA_URL, "b.png"], "audios": ["c.wav"],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_record(form: str, tmp_path: Path) -> None:
    assert read(tmp_path, FORMS[form]) == SAME


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"weight": 1}])
def test_an_answer_may_be_marked_as_context(mark: dict[str, object], tmp_path: Path) -> None:
    turns = [user("one?"), assistant("bad") | mark, user("two?"), assistant("good")]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    source = ChatConfig(path=str(tmp_path / "chats.jsonl"), test_fraction=0.0).open("x", "train", None)
    learned = [message.get("learned", True) for message in source[0]["messages"]]
    assert learned == [True, mark == {"weight": 1}, True, True]


def test_numbers_are_content(tmp_path: Path) -> None:
    answer = assistant([{"type": "numbers", "numbers": {"price": "3.5", "gone": None}}])
    assert read(tmp_path, {"messages": [user("Price?"), answer]})[1] == ("assistant", [{"price": 3.5, "gone": None}])


TALK = [user("<image> What?"), assistant("a cup")]
BROKEN: dict[str, tuple[Any, str]] = {
    "no answer": ({"messages": [user("Hello")]}, "no turn of the assistant follows another"),
    "nothing asked": ({"messages": [assistant("Hello")]}, "no turn of the assistant follows another"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "no list": ({"messages": "hello"}, "messages must be a list"),
    "unknown role": ({"messages": [{"role": "usr", "content": "x"}]}, "the role 'usr'; did you mean 'user'"),
    "tool": ({"messages": [user("x"), {"role": "tool", "content": "x"}]}, "message 2 has the role 'tool'; known: "),
    "mark without an image": ({"messages": TALK}, "message 1 has more marks <image> than images has files"),
    "image without a mark": (
        {"messages": TALK, "images": ["a.png", "b.png"]}, "1 of images has no mark: write <image> where each belongs",
    ),
    "audio without a mark": ({"messages": [user("x"), assistant("y")], "audios": ["c.wav"]}, "1 of audios has no mark"),
    "empty message": ({"messages": [user(" \n"), assistant("x")]}, "message 1, of the user, is empty"),
    "empty answer": ({"messages": [user("x"), assistant(None)]}, "message 2, of the assistant, is empty"),
    "video": ({"messages": [user("<video>x"), assistant("y")]}, "videos cannot be read"),
    "videos": ({"messages": [user("x"), assistant("y")], "videos": ["v.mp4"]}, "videos cannot be read"),
    "video part": ({"messages": [user([{"type": "video_url"}]), assistant("y")]}, "videos cannot be read"),
    "part": ({"messages": [user([{"type": "imag_url"}]), assistant("y")]}, "did you mean 'image_url'"),
    "role of no text": ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 has the role ['user']"),
    "type of no text": ({"messages": [user([{"type": [1]}]), assistant("y")]}, "message 1 has a part of type [1]"),
    "part of no type": ({"messages": [user([3]), assistant("y")]}, "message 1 has a part of type None"),
    "tools": ({"messages": [user("x"), assistant("y")], "tools": "[{}]"}, "tools cannot be called"),
    "missing file": ({"messages": TALK, "images": ["gone.png"]}, "there is no file 'gone.png' beside"),
    "outside": ({"messages": TALK, "images": ["../x.png"]}, "leads out of the table's folder"),
    "address": ({"messages": TALK, "images": ["https://x.org/a.png"]}, "nothing is fetched: save the file beside"),
    "not base64": ({"messages": TALK, "images": ["data:image/png;base64,?"]}, "a data URL is not base64"),
    "images": ({"messages": TALK, "images": 3}, "images must be a list of files, not int"),
    "no column": ({"messages": [user([{"type": "numbers", "numbers": {}}]), assistant("y")]}, "without a column"),
    "not JSON": ('{"messages": [', "not JSON"),
    "no object": ("[1]", "not a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_chat_is_one_sentence_with_its_line(case: str, tmp_path: Path) -> None:
    row, said = BROKEN[case]
    source = opened(write(tmp_path, [{"messages": [user("x"), assistant("y")]}, row]))
    assert source[0]["messages"]
    with pytest.raises(DataError) as caught:
        source[1]
    assert said in str(caught.value) and "talk, line 2 of " in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'messages'"):
        opened(write(tmp_path, [{"text": "x"}]))
    with pytest.raises(ValueError, match="a chat has no fields"):
        ChatConfig(path="x.jsonl", fields={"text_en": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["talk.jsonl.gz", "TALK.JSONL.GZ"])
def test_a_compressed_file_is_read(name: str, tmp_path: Path) -> None:
    rows = [{"id": str(n), "messages": [user(f"x {n}"), assistant("y")]} for n in range(30)]
    source = opened(write(tmp_path, rows, name.lower()))
    assert len(source) == 30 and source[7]["messages"][0]["content"][0]["text"] == "x 7"


def test_a_cut_off_archive_is_one_sentence(tmp_path: Path) -> None:
    path = Path(write(tmp_path, [{"messages": TALK}], "talk.jsonl.gz"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be unpacked"):
        opened(str(path))


def test_chats_are_split_as_other_tables(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "messages": [user("x"), assistant("y")], "split": "test" if n == 3 else "train"}
            for n in range(9)]  # fmt: skip
    config = ChatConfig(path=write(tmp_path, rows))
    sources = [config.open("talk", split, lambda name: pytest.fail(name)) for split in ("train", "test")]
    assert [len(source) for source in sources] == [8, 1] and sources[1][0]["id"] == "3"


def test_it_is_recognised_and_a_recipe_is_proposed(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", **FORMS["ms-swift"]} for n in range(20)]
    rows += [{"id": "21", "messages": TALK}, "{"]  # type: ignore[list-item]
    inspection = inspect_path(write(tmp_path, rows))
    (report,) = inspection.datasets
    assert report.kind == "chat" and report.tasks == ["chat", "chat_to_image"] and not report.unused
    assert any("line 21" in problem and "more marks" in problem for problem in report.problems)
    assert any("line 22" in problem and "not JSON" in problem for problem in report.problems)
    values = yaml.safe_load(inspection.recipe or "")
    assert values["sources"] == {"talk": {"kind": "chat", "path": str(tmp_path / "talk.jsonl")}}
    recipe = build(MultimodalRecipe, values, "proposal")
    assert [component.task for component in recipe.mixture] == ["chat", "chat_to_image"]
