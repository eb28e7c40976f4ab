"""Errors in OpenAI's form, {"error": {message, type, param, code}}: one sentence, never a traceback.

An expected failure is an `OpenM6Error`; `failure_of` alone maps it to a status. A body that does not
fit its schema is described by `describe_invalid`, in one sentence: which field, what is wrong, what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from openm6.core.errors import ConfigError, DataError, OpenM6Error
from openm6.core.log import get_log
from openm6.serve.requests import DeadlineExceededError, EngineUnavailableError, QueueFullError


class ErrorDetail(BaseModel):
    """What went wrong, in one sentence; `param` is the field that has to change."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """An error as the official clients read it."""

    error: ErrorDetail


class BadRequestError(OpenM6Error):
    """A field that cannot be used as it is."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class NoModelError(BadRequestError):
    """A request for another model than the one that is served."""


STATUS: dict[type[OpenM6Error], int] = {
    NoModelError: 404,
    BadRequestError: 400,
    DataError: 400,
    ConfigError: 400,
    QueueFullError: 429,
    DeadlineExceededError: 503,
    EngineUnavailableError: 503,
}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in (
        (400, "The request is broken or needs something that is not supported."),
        (401, "The API key is missing or wrong."),
        (404, "No model is called so."),
        (408, "The body did not arrive in time."),
        (413, "The request is too large."),
        (429, "Too much is waiting; Retry-After holds the seconds until the next try."),
        (503, "The deadline passed, or the server is shutting down."),
    )
}


@dataclass(frozen=True)
class Failure:
    status: int
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None

    def body(self, code: str | None = None) -> ErrorBody:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        # A request may hold half a surrogate pair, and a message may quote it.
        message = self.message.encode("utf-8", "replace").decode("utf-8")
        return ErrorBody(error=ErrorDetail(message=message, type=kind, param=self.param, code=code or self.code))

    def response(self) -> JSONResponse:
        """Return the HTTP response; clients retry 5xx by themselves."""
        # Of a body that is too large or too slow the rest is not read.
        closing = {"connection": "close"} if self.status in (408, 413) else {}
        return JSONResponse(self.body().model_dump(), self.status, {**self.headers, **closing})


def failure_of(error: Exception) -> Failure:
    """Return how a failure is answered; one that is not expected is logged."""
    if isinstance(error, HTTPException):
        # FastAPI wraps what reading a body raises.
        if isinstance(error.__cause__, OpenM6Error):
            return failure_of(error.__cause__)
        return Failure(error.status_code, error.detail, headers=error.headers or {})
    if isinstance(error, RequestValidationError):
        # Nothing of the body is echoed but an unknown type: it may be huge, or not Unicode.
        return Failure(400, *describe_invalid(error.errors(), error.body))
    if isinstance(error, OpenM6Error):
        status = next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)
        seconds = error.retry_after if isinstance(error, QueueFullError) else 1 if status == 503 else None
        headers = {} if seconds is None else {"retry-after": str(seconds)}
        code = "model_not_found" if isinstance(error, NoModelError) else None
        return Failure(status, str(error), getattr(error, "param", None), headers, code)
    get_log().error("a request failed", exc_info=error)
    return Failure(500, "the server failed on this request: report it with the server's log")


async def answer_failure(_: Request, error: Exception) -> JSONResponse:
    return failure_of(error).response()


def check_limit(param: str, value: float, limit: float, unit: str = "") -> None:
    """Raise BadRequestError if a field exceeds its limit; with a unit, `value` is how much of it the field holds."""
    if value > limit:
        found = f"{param} holds {value:,} {unit}" if unit else f"{param}={value:,}"
        raise BadRequestError(f"{found}, over the limit of {limit:,}: send less", param)


PydanticError = Mapping[str, Any]  # type, loc, ctx
MAX_SHOWN = 64  # characters of a key or a type

# What a value must be, by the beginning of the type of pydantic's error; several of them are joined by "or".
KINDS = {
    "string": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "dict": "an object",
    "model": "an object",
    "bytes": "a file",
    "none": "null",
    "finite": "a finite number",
    "value": "a file",  # a text in place of an upload, the only ValueError of a body
}
# What else is wrong, and what to do.
SENTENCES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda _: "is missing: add it",
    "int_parsing_size": lambda _: "must be a smaller integer",
    "string_unicode": lambda _: "must be valid Unicode",
    "too_short": lambda ctx: f"holds too little: at least {_count(ctx['min_length'], 'item')}",
    "too_long": lambda ctx: f"holds too much: at most {_count(ctx['max_length'], 'item')}",
    "string_too_short": lambda ctx: f"is too short: at least {_count(ctx['min_length'], 'character')}",
    "string_too_long": lambda ctx: f"is too long: at most {_count(ctx['max_length'], 'character')}",
    "greater_than": lambda ctx: f"must be above {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']:g}",
    "less_than": lambda ctx: f"must be below {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']:g}",
    "literal_error": lambda ctx: f"must be {_listed(ctx['expected'])}",
    "union_tag_invalid": lambda ctx: f"{_short(ctx['tag'])!r} is not supported: use {_listed(ctx['expected_tags'])}",
    "union_tag_not_found": lambda _: "has no type: add it",
}


def _short(text: str) -> str:
    """A key or a type of a body, which may be as long as the body."""
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def describe_invalid(errors: Sequence[PydanticError], body: Any) -> tuple[str, str | None]:
    """Return one sentence for the errors of a body, and the path of its field: of several forms the deepest."""
    located = [(_path(error, body), error) for error in errors]
    # The type of a part decides before what its fields lack.
    deepest = max((path for path, _ in located), key=len)
    meant = [error for path, error in located if path == deepest]
    names = [str(error["type"]).partition("_")[0] for error in meant]
    kinds = dict.fromkeys(KINDS[name] for name in names if name in KINDS)
    sentences = (SENTENCES[error["type"]](error.get("ctx", {})) for error in meant if error["type"] in SENTENCES)
    sentence = next(sentences, f"must be {' or '.join(kinds)}" if kinds else "cannot be used as it is: see /docs")
    name = ".".join(_short(str(step)) for step in deepest)
    return (f"{name} {sentence}" if name else f"the body {sentence}"), name or None


def _path(error: PydanticError, body: Any) -> tuple[str | int, ...]:
    """Where in the body: pydantic's path without the names of its own classes, which no body holds."""
    found: list[str | int] = []
    node, path = body, error["loc"][1:]
    for index, step in enumerate(path, 1):
        exists = isinstance(node, Mapping) and step in node
        if exists or (isinstance(node, list) and isinstance(step, int) and step < len(node)):
            node = node[step]
        elif isinstance(body, (Mapping, list)) and (index < len(path) or error["type"] != "missing"):
            continue
        found.append(step)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        found.append(str(error.get("ctx", {}).get("discriminator", "type")).strip("'"))
    return tuple(found)


def _listed(words: str) -> str:
    """'a', 'b' or 'c', as pydantic lists them, or with commas alone -> the same without quotes."""
    *others, last = [word.strip().strip("'") for word in words.replace(" or ", ", ").split(",")]
    return f"{', '.join(others)} or {last}" if others else last


def _count(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"
