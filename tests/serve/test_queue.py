"""Fair turns: by hypothesis, over any arrivals."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openm6.serve.engine import MAX_COUNTERS, FairQueue
from openm6.serve.requests import CodesRequest, PreparedRequest, QueueFullError, Request, TextRequest
from openm6.serve.worker import RequestHandle


def handle(client: str, work: int, drawn: bool = False) -> RequestHandle:
    request: Request = TextRequest(parts=(), client=client)
    if drawn:
        request = CodesRequest(parts=(), client=client, modality="image")
    return RequestHandle(cast(PreparedRequest, SimpleNamespace(request=request, work=work)))


class PlainQueue:
    """The rule of the queue: sort all clients, look through all lines."""

    def __init__(self) -> None:
        self.waiting: dict[str, deque[RequestHandle]] = {}
        self.counters: OrderedDict[str, int] = OrderedDict()
        self.last = 0  # the counter of the client that left last, when it left

    def push(self, handle: RequestHandle) -> None:
        client = handle.client
        if client not in self.waiting:
            lowest = min((self.counters.get(name, 0) for name in self.waiting), default=self.last)
            self.counters[client] = max(lowest, self.counters.get(client, 0))
            self.waiting[client] = deque()
        self.waiting[client].append(handle)

    def pop(self, fits: Callable[[RequestHandle], bool]) -> RequestHandle | None:
        for client in sorted(self.waiting, key=lambda name: self.counters.get(name, 0)):
            for handle in self.waiting[client]:
                if fits(handle):
                    self.last = self.counters[client]
                    self.counters[client] += handle.prepared.work
                    self.remove(handle)
                    return handle
        return None

    def remove(self, handle: RequestHandle) -> None:
        self.waiting[handle.client].remove(handle)
        if not self.waiting[handle.client]:
            del self.waiting[handle.client]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abcd"), st.integers(1, 50), st.booleans()),
        st.tuples(st.just("pop"), st.sampled_from("tcb"), st.integers(1, 50)),
        st.tuples(st.just("drop"), st.integers(0, 5)),
    ),
    max_size=80,
)


@given(STEPS)
def test_the_order_is_that_of_the_plain_rule(steps: list[tuple[object, ...]]) -> None:
    queue, plain, left = FairQueue(10**9), PlainQueue(), list[RequestHandle]()
    for step in steps:
        if step[0] == "push":
            one = handle(str(step[1]), cast(int, step[2]), bool(step[3]))
            queue.push([one], 1.0)
            plain.push(one)
            left.append(one)
        elif step[0] == "pop":
            kinds = {"t": {TextRequest}, "c": {CodesRequest}, "b": {TextRequest, CodesRequest}}[str(step[1])]
            most = cast(int, step[2])
            found = queue.pop(lambda one, most=most: one.prepared.work <= most, kinds)  # type: ignore[misc]
            assert found is plain.pop(
                lambda one, most=most, kinds=kinds: (  # type: ignore[misc]
                    one.prepared.work <= most and type(one.prepared.request) in kinds
                )
            )
            left = [one for one in left if one is not found]
        elif left:
            gone = left.pop(cast(int, step[1]) % len(left))
            assert queue.drop(lambda one, gone=gone: one is gone) == [gone]  # type: ignore[misc]
            plain.remove(gone)
        assert len(queue) == len(left) and queue.work == sum(one.prepared.work for one in left)
        assert set(queue.waiting) == set(plain.waiting)


def test_a_kind_without_a_free_slot_is_not_examined() -> None:
    queue = FairQueue(10**9)
    for number in range(50):
        queue.push([handle(f"client {number}", 5)], 1.0)
    queue.push([handle("late", 5, drawn=True)], 1.0)
    looked: list[RequestHandle] = []
    found = queue.pop(lambda one: not looked.append(one), {CodesRequest})  # type: ignore[func-returns-value]
    assert found is not None and found.client == "late" and looked == [found]
    assert queue.pop(lambda one: not looked.append(one), set()) is None  # type: ignore[func-returns-value]
    assert len(looked) == 1


def test_counters_of_clients_that_left_do_not_fill_the_memory() -> None:
    queue = FairQueue(10**9)
    for number in range(MAX_COUNTERS + 10):
        queue.push([handle(f"client {number}", 5)], 1.0)
        queue.pop(lambda _: True)
    assert len(queue.counters) == MAX_COUNTERS and not queue.waiting


def test_a_client_that_comes_and_goes_does_not_fill_the_memory() -> None:
    queue = FairQueue(10**9)
    queue.push([handle("busy", 5)], 1.0)
    for _ in range(2000):
        queue.push([handle("restless", 5)], 1.0)
        queue.drop(lambda one: one.client == "restless")
    assert len(queue.waiting) == len(queue.counters) == 1


ARRIVALS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), max_size=60)


@given(ARRIVALS)
def test_nothing_is_lost_and_each_client_keeps_its_order(arrivals: list[tuple[str, int]]) -> None:
    queue = FairQueue(10**9)
    sent = [handle(client, work) for client, work in arrivals]
    for one in sent:
        queue.push([one], 1.0)
    assert len(queue) == len(sent) and queue.work == sum(work for _, work in arrivals)
    served = [queue.pop(lambda _: True) for _ in sent]
    assert queue.pop(lambda _: True) is None and queue.work == 0
    for client in "abcd":
        assert [one for one in served if one and one.client == client] == [one for one in sent if one.client == client]


@given(
    st.lists(st.integers(1, 50), min_size=30, max_size=30),
    st.lists(st.integers(1, 50), min_size=30, max_size=30),
)
def test_two_who_always_want_more_differ_by_one_request(first: list[int], second: list[int]) -> None:
    queue = FairQueue(10**9)
    for one, other in zip(first, second, strict=True):
        queue.push([handle("a", one)], 1.0)
        queue.push([handle("b", other)], 1.0)
    got = {"a": 0, "b": 0}
    while {"a", "b"} <= set(queue.waiting):
        found = queue.pop(lambda _: True)
        assert found is not None
        got[found.client] += found.prepared.work
        assert abs(got["a"] - got["b"]) <= 50


def test_who_comes_back_has_saved_up_nothing() -> None:
    queue = FairQueue(10**9)
    for _ in range(20):
        queue.push([handle("busy", 10)], 1.0)
    for _ in range(10):
        queue.pop(lambda _: True)
    for _ in range(5):
        queue.push([handle("new", 10)], 1.0)
    turns = [found.client for _ in range(6) if (found := queue.pop(lambda _: True))]
    assert turns.count("busy") >= 2


def test_who_comes_when_nothing_waits_does_not_pass_older_clients() -> None:
    queue = FairQueue(10**9)
    for _ in range(50):
        queue.push([handle("old", 10)], 1.0)
        queue.pop(lambda _: True)
    for _ in range(4):
        queue.push([handle("new", 10)], 1.0)
    for _ in range(4):
        queue.push([handle("old", 10)], 1.0)
    turns = [found.client for _ in range(8) if (found := queue.pop(lambda _: True))]
    assert turns[:5].count("old") == 2


def test_what_does_not_fit_lets_others_pass() -> None:
    queue = FairQueue(100)
    queue.push([handle("a", 60)], 1.0)
    queue.push([handle("b", 5)], 1.0)
    found = queue.pop(lambda one: one.prepared.work < 10)
    assert found is not None and found.client == "b"
    with pytest.raises(QueueFullError) as caught:
        queue.push([handle("c", 50)], 7.4)
    assert caught.value.retry_after == 7


def test_one_that_exceeds_the_bound_alone_is_taken_when_nothing_waits() -> None:
    queue = FairQueue(10)
    queue.push([handle("a", 50)], 1.0)
    assert len(queue.drop(lambda one: one.client == "a")) == 1 and queue.work == 0


def test_the_parts_of_one_request_wait_together_or_not_at_all() -> None:
    queue = FairQueue(100)
    queue.push([handle("a", 60), handle("a", 60), handle("a", 60)], 1.0)
    assert len(queue) == 3 and queue.work == 180
    with pytest.raises(QueueFullError):
        queue.push([handle("b", 1), handle("b", 1)], 1.0)
    assert len(queue) == 3
