"""Conversations in JSON Lines, in the forms of OpenAI, ms-swift and LLaMA-Factory, and ShareGPT."""

import base64
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from openm6.core.errors import DataError, nearest
from openm6.data import records
from openm6.data.storage import is_remote, read_beside
from openm6.data.table import Table, TableConfig
from openm6.data.text_tables import JSONL_ENDINGS, JsonlConfig

TURNS = ("messages", "conversations")  # columns, of which a chat has one
# Columns of files for the marks in texts, and the files allowed.
MEDIA = {"image": ("images", records.MAX_IMAGE_BYTES), "audio": ("audios", records.MAX_AUDIO_BYTES)}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant"}
KINDS = {"text": "text", "image": "image", "image_url": "image", "audio": "audio", "audio_url": "audio"}
KINDS |= {"input_audio": "audio", "numbers": "numbers"}
NO_VIDEO = "videos cannot be read: leave the chat out, or replace each video by images of it"
_MARK = re.compile(r"<(image|audio|video)>")


def is_chat(columns: Sequence[str]) -> bool:
    return any(name in columns for name in TURNS)


class ChatReader(records.RowReader):
    """Turns one line into a record with `messages`, whichever form they have."""

    def __init__(self, columns: Sequence[str], open_file: records.OpenFile, where: str) -> None:
        if not is_chat(columns):
            records.check_columns(TURNS[:1], columns, where)
        self.single = {}
        used = ["id", *TURNS, "system", "tools", "videos", *(column for column, _ in MEDIA.values())]
        self.columns = {name: ["id" if name == "id" else "messages"] for name in used if name in columns}
        self._open_file = open_file

    def read(self, row: Mapping[str, Any]) -> records.Record:
        """The record of one row; DataError without an answer, for an unknown role, a video, or marks without files."""
        turns = row.get("messages") or row.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns) or not turns:
            raise DataError("messages must be a list of {role, content} or {from, value}, with at least one of each")
        if row.get("videos"):
            raise DataError(NO_VIDEO)
        if row.get("tools"):
            raise DataError("tools cannot be called: leave the chat out, or answer without them")
        files = {kind: _listed(row.get(column), column) for kind, (column, _) in MEDIA.items()}
        if row.get("system"):
            turns = [{"role": "system", "content": row["system"]}, *turns]
        messages = [self._message(turn, index, files) for index, turn in enumerate(turns, 1)]
        for kind, (column, _) in MEDIA.items():
            if files[kind]:
                raise DataError(f"{len(files[kind])} of {column} has no mark: write <{kind}> where each belongs")
        if not any(message["role"] == "assistant" for message in messages[1:]):
            raise DataError("no turn of the assistant follows another: there is no answer to learn")
        record: records.Record = {"messages": messages}
        name = records.as_text(row.get("id"), "id")
        return record if name is None else {"id": name, **record}

    def _message(self, turn: Mapping[str, Any], index: int, files: dict[str, list[Any]]) -> dict[str, Any]:
        where = f"message {index}"
        given, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(given, str) or given not in ROLES:
            raise DataError(f"{where} has the role {given!r}; {nearest(str(given), tuple(ROLES))}")
        if isinstance(content, str):
            parts = self._marked(content, where, files)
        elif isinstance(content, list):
            parts = [part for item in content for part in self._part(item, where, files)]
        else:
            parts = []
        if not any(part["type"] != "text" or part["text"].strip() for part in parts):
            raise DataError(f"{where}, of the {ROLES[given]}, is empty: write something, or leave the chat out")
        message = {"role": ROLES[given], "content": parts}
        # As OpenAI and ms-swift mark an answer that is there for its context alone.
        is_learned = turn.get("weight", 1) != 0 and turn.get("loss") is not False
        return message if is_learned else message | {"learned": False}

    def _marked(self, text: str, where: str, files: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """A text with marks as parts in turn; each mark takes the next file of its kind."""
        parts: list[dict[str, Any]] = []
        for index, segment in enumerate(_MARK.split(text)):
            if index % 2:
                parts.append(self._file(segment, _next_file(segment, where, files)))
            elif segment:
                parts.append({"type": "text", "text": records.as_text(segment, where)})
        return parts

    def _part(self, item: Any, where: str, files: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """A part of OpenAI's or of Hugging Face's form; an image or audio without a file takes the next one."""
        if isinstance(item, str):
            return self._marked(item, where, files)
        given = item.get("type") if isinstance(item, Mapping) else None
        name = str(given)
        if "video" in name:
            raise DataError(NO_VIDEO)
        if name not in KINDS:
            raise DataError(f"{where} has a part of type {given!r}; {nearest(name, tuple(KINDS))}")
        kind = KINDS[name]
        value = next((item[key] for key in (name, "path", "url", "bytes") if item.get(key) is not None), None)
        if kind == "text":
            return [{"type": "text", "text": records.as_text(value, where) or ""}]
        if kind == "numbers":
            numbers = records.as_numbers(value, where)
            if not numbers:
                raise DataError(f"{where} has numbers without a column: write {{column: value}}")
            return [{"type": "numbers", "numbers": numbers}]
        if isinstance(value, Mapping):
            value = next((value[key] for key in ("url", "data") if value.get(key) is not None), value)
        if value is None:
            value = _next_file(kind, where, files)
        elif name == "input_audio" and isinstance(value, str) and not value.startswith("data:"):
            value = f"data:;base64,{value}"
        return [self._file(kind, value)]

    def _file(self, kind: str, value: Any) -> dict[str, Any]:
        column, limit = MEDIA[kind]
        content = records.as_bytes(value, column, limit, partial(_read, self._open_file))
        if content is None:
            raise DataError(f"an entry of {column} is empty: name a file")
        return {"type": kind, kind: content}


def _listed(value: Any, column: str) -> list[Any]:
    """Files of a row: a list of them, or one."""
    if value is None or value == "":
        return []
    if isinstance(value, (str, Mapping)):
        return [value]
    if not isinstance(value, list):
        raise DataError(f"{column} must be a list of files, not {type(value).__name__}")
    return list(value)


def _next_file(kind: str, where: str, files: dict[str, list[Any]]) -> Any:
    if kind == "video":
        raise DataError(NO_VIDEO)
    if not files[kind]:
        raise DataError(
            f"{where} has more marks <{kind}> than {MEDIA[kind][0]} has files: add the file or drop the mark"
        )
    return files[kind].pop(0)


def _read(open_file: records.OpenFile, name: str, limit: int) -> bytes:
    """The bytes of a data URL, or of a file beside the chat."""
    if name.startswith("data:"):
        try:
            return base64.b64decode(name.partition(",")[2], validate=True)
        except ValueError:
            raise DataError("a data URL is not base64: encode the bytes of the file again") from None
    name = name.removeprefix("file://")
    if is_remote(name):
        raise DataError(f"{name[:80]} is an address, and nothing is fetched: save the file beside the chat")
    return open_file(name, limit)


class ChatConfig(TableConfig):
    """Conversations, one per line of JSON, also as .gz: `messages`, or `conversations` of ShareGPT."""

    endings: ClassVar[tuple[str, ...]] = JSONL_ENDINGS
    kind: Literal["chat"] = "chat"

    @model_validator(mode="after")
    def _no_fields(self) -> Self:
        if self.fields is not None:
            raise ValueError("a chat has no fields: its columns have the names of the form that it has")
        return self

    def load(self, path: str) -> Table:
        return JsonlConfig(path=path).load(path)

    def reader(self, table: Table, path: str) -> ChatReader:
        return ChatReader(table.names, partial(read_beside, path), path)
