"""HTML that cannot be injected: text is escaped on its way into a tag, and only tags made here pass as they are."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_CHINESE = re.compile("[\u3400-\u9fff]")
_VOID = frozenset({"meta", "img", "br", "hr"})


class Markup(str):
    """Finished HTML.

    Adding to it or formatting with it gives a plain string again, which is escaped like any other: a slip shows as
    visible tags on the page, never as markup made of data.
    """

    __slots__ = ()


Attributes = Mapping[str, str | float]


def tag(name: str, *children: str | None, attributes: Attributes | None = None) -> Markup:
    """One element: `tag("p.lede", "a < b")` is `<p class="lede">a &lt; b</p>`. None among the children is nothing."""
    kind, *classes = name.split(".")
    given: dict[str, str | float] = {"class": " ".join(classes)} if classes else {}
    given |= attributes or {}
    inside = "".join(f' {key}="{escape(_text(value))}"' for key, value in given.items())
    opening = f"<{kind}{inside}>"
    return Markup(opening if kind in _VOID else f"{opening}{join(children)}</{kind}>")


def join(children: Iterable[str | None]) -> Markup:
    """Children side by side, text escaped."""
    return Markup("".join(escape(child) for child in children if child is not None))


def escape(text: str) -> Markup:
    """Text as HTML: the five signs escaped, and signs that no page may hold replaced by one that says so."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(_CONTROL.sub("\ufffd", text), quote=True))


def quoted(text: str, name: str = "span", most: int = 260) -> Markup:
    """Text that came from data or from a model: cut to `most` letters' room, set apart from the page's direction."""
    chinese = _CHINESE.search(text[:most]) is not None
    most = most // 2 if chinese else most  # its signs are twice as wide
    cut = text if len(text) <= most else text[: most - 1].rstrip() + "…"
    return tag(f"{name}.words", cut, attributes={"dir": "auto", **({"lang": "zh"} if chinese else {})})


def raw_style(css: str) -> Markup:
    """The page's own style sheet, which is not data; `</` in it could end the element and is refused."""
    if "</" in css:
        raise ValueError("a style sheet must not hold '</'")
    return Markup(f"<style>{css}</style>")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
