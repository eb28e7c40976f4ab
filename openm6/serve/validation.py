"""What is wrong with a request's body, in one sentence: where, what, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Failure = Mapping[str, Any]  # an error of pydantic: type, loc, ctx

# What a value must be, by the type of pydantic's error; several of them are joined by "or".
KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_parsing_size": "a smaller integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "bytes_type": "a file",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_unicode": "valid Unicode",
}

_Words = Callable[[Mapping[str, Any]], str]
# What else is wrong, and what to do.
SENTENCES: dict[str, _Words] = {
    "missing": lambda _: "is missing: add it",
    "extra_forbidden": lambda _: "is not known: leave it out",
    "too_short": lambda ctx: f"holds too little: at least {_count(ctx['min_length'], 'item')}",
    "too_long": lambda ctx: f"holds too much: at most {_count(ctx['max_length'], 'item')}",
    "string_too_short": lambda ctx: f"is too short: at least {_count(ctx['min_length'], 'character')}",
    "string_too_long": lambda ctx: f"is too long: at most {_count(ctx['max_length'], 'character')}",
    "string_pattern_mismatch": lambda ctx: f"must match {ctx['pattern']}",
    "greater_than": lambda ctx: f"must be above {ctx['gt']:g}",
    "greater_than_equal": lambda ctx: f"must be at least {ctx['ge']:g}",
    "less_than": lambda ctx: f"must be below {ctx['lt']:g}",
    "less_than_equal": lambda ctx: f"must be at most {ctx['le']:g}",
    "literal_error": lambda ctx: f"must be {_listed(ctx['expected'])}",
    "enum": lambda ctx: f"must be {_listed(ctx['expected'])}",
    "union_tag_invalid": lambda ctx: f"{ctx['tag']!r} is not supported: use {_listed(ctx['expected_tags'])}",
    "union_tag_not_found": lambda _: "has no type: add it",
    "value_error": lambda ctx: str(ctx["error"]),
}
OTHER = "cannot be used as given: see /docs"


def complaint(errors: Sequence[Failure], body: Any) -> tuple[str, str | None]:
    """One sentence for the errors of a body, and the path of the field that it is about.

    Where a field may be one of several forms, pydantic complains of each; what counts is what it says of the deepest
    field, since that form fits best.
    """
    placed = [(_place(error, body), error) for error in errors]
    # The kind of a part decides before what its fields lack.
    deepest = max((place for place, _ in placed), key=len)
    chosen = [error for place, error in placed if place == deepest]
    path = ".".join(map(str, deepest))
    said = _said(chosen)
    return (f"{path} {said}" if path else f"the body {said}"), path or None


def _said(errors: list[Failure]) -> str:
    for error in errors:
        if error["type"] in SENTENCES:
            return SENTENCES[error["type"]](error.get("ctx", {}))
    kinds = list(dict.fromkeys(KINDS[error["type"]] for error in errors if error["type"] in KINDS))
    return f"must be {' or '.join(kinds)}" if kinds else OTHER


def _place(error: Failure, body: Any) -> tuple[str | int, ...]:
    """Where in the body: pydantic's path without the names of its own classes, which no body holds."""
    path = list(error["loc"][1:])
    found: list[str | int] = []
    node = body
    for number, step in enumerate(path):
        last = number == len(path) - 1
        known = isinstance(node, Mapping) and step in node
        if known or (isinstance(node, list) and isinstance(step, int) and step < len(node)):
            node = node[step]
        elif not (last and error["type"] == "missing") and isinstance(body, (Mapping, list)):
            continue
        found.append(step)
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        found.append(str(error.get("ctx", {}).get("discriminator", "type")).strip("'"))
    return tuple(found)


def _listed(words: str) -> str:
    """pydantic lists as 'a', 'b' or 'c', or with commas alone; so do we, without quotes."""
    names = [word.strip().strip("'") for word in words.replace(" or ", ", ").split(",")]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
