"""Couplets and titles are found in verse as it is written."""

from __future__ import annotations

import numpy as np

from openm6.tasks.poem_slots import couplets
from openm6.tasks.registry import TASKS
from tests.small_model import demo_sources

POEM = "《江雪》 柳宗元\n千山鸟飞绝，万径人踪灭。\n孤舟蓑笠翁，独钓寒江雪。"


def test_halves_of_equal_length_are_a_couplet() -> None:
    assert couplets(POEM) == [("千山鸟飞绝", "万径人踪灭"), ("孤舟蓑笠翁", "独钓寒江雪")]
    assert couplets("a b, c d. One, two and three. No comma here.") == [("a b", "c d")]
    assert couplets("夫如何？齐鲁青未了。") == []


def test_both_lines_are_of_one_couplet() -> None:
    record = {"id": "x", "text_zh": POEM}
    seen = set()
    for seed in range(20):
        example = TASKS["couplet"].example(record, np.random.default_rng(seed))
        seen.add((example.source[0].raw.strip().removeprefix("对下联："), example.answer))
    assert seen == set(couplets(POEM))


def test_title_and_poem_make_the_whole() -> None:
    example = TASKS["write_poem"].example({"id": "x", "text_zh": POEM}, np.random.default_rng(0))
    assert example.source[0].raw == "作诗：《江雪》 柳宗元\n"
    assert POEM == "《江雪》 柳宗元\n" + example.answer


def test_most_poems_hold_a_couplet() -> None:
    poems = demo_sources()["poems"]
    found = [bool(TASKS["couplet"].languages(poems[row])) for row in range(60)]
    assert sum(found) > 40
