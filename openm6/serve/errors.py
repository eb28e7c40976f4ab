"""Every failure in OpenAI's form: {"error": {message, type, param, code}}, one sentence, never a traceback."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from openm6.base.errors import ConfigError, DataError, OpenM6Error
from openm6.base.log import get_log
from openm6.serve.ticket import LateError, RefusedError, StoppedError
from openm6.serve.validation import complaint


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
    """A field that cannot be used as given; answered with 400."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TooLargeError(OpenM6Error):
    """A body that tells no length has passed its bound on the way; answered with 413."""


class LateBodyError(OpenM6Error):
    """A body that has not arrived within its time; answered with 408."""


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in (
        (400, "The request is broken or asks for something that is not offered."),
        (401, "The API key is missing or wrong."),
        (408, "The body did not arrive in time."),
        (413, "The request is too large."),
        (429, "Too much is waiting; Retry-After says when to try again."),
        (503, "The deadline passed, or the server is going down."),
    )
}


def error_response(
    status: int, message: str, param: str | None = None, code: str | None = None, after: int | None = None
) -> JSONResponse:
    """A response in OpenAI's form. Clients retry 5xx by themselves; `after` tells them when."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    body = ErrorBody(error=ErrorDetail(message=_encodable(message), type=kind, param=param, code=code))
    headers = {} if after is None else {"retry-after": str(after)}
    if status in (408, 413):  # the rest of the body is not waited for
        headers["connection"] = "close"
    return JSONResponse(body.model_dump(), status, headers)


def error_of(error: OpenM6Error) -> tuple[int, str, str | None, int | None]:
    """Status, sentence, field and seconds to wait for an expected failure."""
    if isinstance(error, RefusedError):
        return 429, str(error), None, error.after
    if isinstance(error, LateError | StoppedError):
        return 503, str(error), None, 1
    if isinstance(error, TooLargeError):
        return 413, str(error), None, None
    if isinstance(error, LateBodyError):
        return 408, str(error), None, None
    param = error.param if isinstance(error, BadRequestError) else None
    known = isinstance(error, BadRequestError | DataError | ConfigError)
    return 400 if known else 500, str(error), param, None


def _encodable(text: str) -> str:
    """A request may hold half a surrogate pair, and an error may quote it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def add_error_handlers(app: FastAPI) -> None:
    """Makes every failure of an app speak in one form."""

    @app.exception_handler(OpenM6Error)
    async def expected(_: Request, error: OpenM6Error) -> JSONResponse:
        status, message, param, after = error_of(error)
        return error_response(status, message, param, after=after)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Nothing of the body is echoed but a type that is not known: it may be huge, or not Unicode.
        message, path = complaint(error.errors(), error.body)
        return error_response(400, message, path)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(
            error.__cause__, OpenM6Error
        ):  # FastAPI puts words of its own over what reading a body says
            return await expected(request, error.__cause__)
        message = error.detail or HTTPStatus(error.status_code).phrase
        response = error_response(error.status_code, str(message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        get_log().error("a request failed", exc_info=error)
        return error_response(500, "the server failed on this request: report it with the server's log")
