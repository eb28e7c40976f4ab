from __future__ import annotations

import json

import pytest

from openm6.core.errors import TrainingError
from openm6.data.quarantine import MAX_REASON, Quarantine, merge_counts, summary


def test_counts_and_lines(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.accept(97)
    quarantine.add("shop", "7", "no file '7.png'")
    quarantine.add("shop", "7", "no file '7.png'")
    quarantine.add("pets", "1", ValueError("x" * 1000))
    assert (quarantine.seen, quarantine.broken_fraction) == (100, 0.03)
    assert quarantine.counts["broken"] == {"shop": 2, "pets": 1}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["kind"], line["source"], line["id"]) for line in lines] == [
        ("broken", "shop", "7"),
        ("broken", "pets", "1"),
    ]
    assert len(lines[1]["reason"]) == MAX_REASON


def test_too_many_stop_the_run_once_enough_were_seen():
    quarantine = Quarantine(limit=0.1, minimum=50)
    for number in range(49):
        quarantine.add("shop", str(number), "broken")
    with pytest.raises(TrainingError, match=r"100\.0% of the records .*50\) in 'shop'.*broken.*10%"):
        quarantine.add("shop", "49", "broken")


def test_a_share_at_the_limit_goes_on():
    quarantine = Quarantine(limit=0.05, minimum=1)
    quarantine.accept(19)
    quarantine.add("shop", "1", "broken")
    with pytest.raises(TrainingError):
        quarantine.add("shop", "2", "broken")


def test_state_goes_on_and_lines_are_not_repeated(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    first = Quarantine(path)
    first.add("shop", "1", "broken")
    with path.open("a") as file:
        file.write('{"source": "shop", "id"')  # a crash in the middle of a line
    second = Quarantine(path)
    second.restore(json.loads(json.dumps(first.state())))
    assert (second.seen, second.counts["broken"]) == (1, {"shop": 1})
    second.add("shop", "1", "broken")
    assert path.read_text().count('"id": "1"') == 1


def test_ids_that_are_odd_texts_are_listed_once(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path).add("shop", "a\u2028b", "broken")
    Quarantine(path).add("shop", "a\u2028b", "broken")
    assert path.read_text(encoding="utf-8").count("\n") == 1
    Quarantine(path).add("shop", "\ud800", "half a sign, which UTF-8 cannot hold")
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[1])["id"] == "?"


def test_what_is_too_long_or_truncated_never_stops_a_run(tmp_path):
    quarantine = Quarantine(tmp_path / "q.jsonl", limit=0.0, minimum=1)
    for number in range(300):
        quarantine.add("poems", str(number), "900 tokens", "too_long")
        quarantine.accept()
        quarantine.count("truncated", "speech")
    assert (quarantine.seen, quarantine.broken_fraction) == (600, 0.0)
    with pytest.raises(TrainingError, match="max_broken"):
        quarantine.add("shop", "1", "broken")


def test_the_summary_tells_what_was_broken_too_long_and_truncated_apart():
    quarantine = Quarantine(limit=1.0)
    assert summary(quarantine.state()) == ""
    quarantine.accept(1200)
    assert summary(quarantine.state()) == "", "nothing to tell"
    for source, count in (("shop", 3), ("pets", 1), ("a", 1), ("b", 1)):
        for number in range(count):
            quarantine.add(source, str(number), "broken")
    quarantine.add("poems", "1", "900 tokens", "too_long")
    quarantine.count("truncated", "speech")
    quarantine.count("not_applicable", "shop/text_to_speech")
    merged = merge_counts([quarantine.state(), Quarantine().state()])
    assert merged == quarantine.state()
    assert summary(merged) == (
        "1,207 records drawn; 6 broken (shop 3, pets 1, a 1, …); 1 too long for a row (poems 1); "
        "1 truncated to fit (speech 1); 1 skipped for want of a field (shop/text_to_speech 1)"
    )
