"""Markup: text is escaped once and only once, whatever way it comes in."""

from __future__ import annotations

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm6.evaluate.report_markup import Markup, escape, join, quoted, raw_style, tag


def test_children_are_escaped_and_markup_is_not() -> None:
    inner = tag("b", "a < b & 'c'")
    assert tag("p.lede", inner, "<i>", None) == (
        '<p class="lede"><b>a &lt; b &amp; &#x27;c&#x27;</b>&lt;i&gt;</p>'
    )


def test_attributes_are_escaped() -> None:
    assert (
        tag("img", attributes={"alt": '"><script>', "width": 12.5})
        == '<img alt="&quot;&gt;&lt;script&gt;" width="12.5">'
    )


def test_a_sum_of_markup_and_text_is_text_again() -> None:
    assert not isinstance(tag("b", "x") + "<i>", Markup)
    assert escape(tag("b", "x") + "<i>") == "&lt;b&gt;x&lt;/b&gt;&lt;i&gt;"
    assert not isinstance(f"{tag('b', 'x')}", Markup)


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_escaped_text_holds_no_sign_of_markup_and_reads_the_same(text: str) -> None:
    escaped = escape(text)
    assert not set(escaped) & set("<>\"'")
    escaped.encode("utf-8")  # no lone surrogates, which no file could hold
    same = [a for a, b in zip(html.unescape(escaped), text, strict=True) if a != b]
    assert set(same) <= {"\ufffd"}


def test_quotes_are_cut_and_know_their_language() -> None:
    assert quoted("x" * 900).count("x") == 259
    assert 'lang="zh"' in quoted("北斗七星高") and 'lang="zh"' not in quoted("the plough")
    assert quoted("星" * 900).count("星") == 129
    assert 'class="words"' in quoted("a") and quoted("<b>", "p.prompt").startswith('<p class="prompt words"')


def test_join_keeps_order() -> None:
    assert join(["<", tag("br"), None, ">"]) == "&lt;<br>&gt;"


def test_a_style_sheet_cannot_end_its_element() -> None:
    with pytest.raises(ValueError, match="style sheet"):
        raw_style("a {} </style><script>")
