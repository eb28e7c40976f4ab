from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from openm6.base.errors import TrainingError
from openm6.data.quarantine import MAX_REASON, Quarantine


def test_counts_and_lines(tmp_path):
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path)
    quarantine.accept(97)
    quarantine.add("shop", "7", "no file '7.png'")
    quarantine.add("shop", "7", "no file '7.png'")
    quarantine.add("pets", "1", ValueError("x" * 1000))
    assert (quarantine.seen, quarantine.total, quarantine.share) == (100, 3, 0.03)
    assert quarantine.counts == {"shop": 2, "pets": 1}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["source"], line["id"]) for line in lines] == [("shop", "7"), ("pets", "1")]
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
    assert (second.seen, second.counts) == (1, {"shop": 1})
    second.add("shop", "1", "broken")
    assert path.read_text().count('"id": "1"') == 1


def test_threads_lose_no_count():
    quarantine = Quarantine(limit=1.0)

    def work(number: int) -> None:
        for _ in range(200):
            quarantine.accept()
            quarantine.add(f"s{number}", "1", "broken")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert quarantine.seen == 3200 and quarantine.total == 1600
