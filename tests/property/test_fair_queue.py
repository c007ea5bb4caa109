"""Whoever comes and goes, tenants that wait get tokens by their weights, and nobody waits for ever."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admission.fair_queue import FairQueue, Waiting, virtual_tokens
from cluster.admission.tenant import Tenant


def make_waiting(tenant: Tenant, item: int = 0, *, priority: int = 0, tokens: int = 10) -> Waiting[int]:
    return Waiting(item=item, tenant=tenant, priority=priority, tokens=tokens, cost=float(tokens))


def serve_next(queue: FairQueue[int]) -> Waiting[int]:
    head = queue.head()
    assert head is not None
    queue.remove(head)
    queue.count(head.tenant, head.cost)
    return head


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2, max_size=4),
)
def test_tenants_that_always_wait_differ_by_one_request_at_most(seed: int, weights: list[float]) -> None:
    random = Random(seed)
    tenants = [Tenant(name=f"t{index}", weight=weight) for index, weight in enumerate(weights)]
    queue: FairQueue[int] = FairQueue()
    most = 100
    for tenant in tenants:
        queue.push(make_waiting(tenant, tokens=random.randint(1, most)))
    for _ in range(200):
        served = serve_next(queue)
        queue.push(make_waiting(served.tenant, tokens=random.randint(1, most)))
        counters = [queue.counter(tenant) for tenant in tenants]
        assert max(counters) - min(counters) <= most / min(weights) * (1 + 1e-9)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    events=st.lists(
        st.tuples(st.sampled_from(["push", "serve", "remove"]), st.integers(0, 2), st.integers(-1, 1)),
        max_size=60,
    )
)
def test_nothing_is_lost_and_priority_goes_first(events: list[tuple[str, int, int]]) -> None:
    tenants = [Tenant(name=f"t{index}") for index in range(3)]
    queue: FairQueue[int] = FairQueue()
    waiting: dict[int, Waiting[int]] = {}
    for number, (event, index, priority) in enumerate(events):
        if event == "push":
            waiting[number] = make_waiting(tenants[index], number, priority=priority)
            queue.push(waiting[number])
        elif event == "serve" and waiting:
            served = serve_next(queue)
            assert served.priority == max(one.priority for one in waiting.values())
            older = [one for one in waiting if one < served.item and waiting[one].tenant is served.tenant]
            assert all(waiting[one].priority < served.priority for one in older), "first come, first served"
            del waiting[served.item]
        elif event == "remove" and waiting:
            queue.remove(waiting.pop(list(waiting)[index % len(waiting)]))
        assert len(queue) == len(waiting)
        assert {one.item for one in queue} == set(waiting)
    last = queue.last()
    assert (last is None) is (not waiting)
    if last is not None:
        assert last.priority == min(one.priority for one in waiting.values())


def test_one_that_comes_back_saves_up_nothing() -> None:
    busy, lazy = Tenant(name="busy"), Tenant(name="lazy")
    queue: FairQueue[int] = FairQueue()
    for _ in range(20):
        queue.push(make_waiting(busy))
    for _ in range(10):
        serve_next(queue)
    for _ in range(10):
        queue.push(make_waiting(lazy))
    order = [serve_next(queue).tenant.name for _ in range(10)]
    assert sorted(order) == ["busy"] * 5 + ["lazy"] * 5


def test_one_that_comes_to_an_empty_queue_starts_where_the_last_one_was() -> None:
    first, second = Tenant(name="first"), Tenant(name="second")
    queue: FairQueue[int] = FairQueue()
    queue.count(first, 1000.0)
    queue.push(make_waiting(second))
    queue.push(make_waiting(first))
    assert queue.counter(second) == 1000.0
    queue.correct(first, -400.0)
    assert queue.counter(first) == 600.0


def test_the_tokens_ahead_of_a_newcomer_follow_weights_and_priorities() -> None:
    flood, small = Tenant(name="flood"), Tenant(name="small", weight=2.0)
    queue: FairQueue[int] = FairQueue()
    for _ in range(100):
        queue.push(make_waiting(flood))
    assert queue.tokens_ahead(flood, priority=0, cost=10.0) == 1000
    assert queue.tokens_ahead(small, priority=0, cost=10.0) == pytest.approx(5.0)
    assert queue.tokens_ahead(small, priority=1, cost=10.0) == 0
    queue.push(make_waiting(flood, priority=1, tokens=7))
    assert queue.tokens_ahead(small, priority=0, cost=10.0) == pytest.approx(12.0)


def test_answers_weigh_more_than_prompts() -> None:
    assert virtual_tokens(uncached_tokens=100, output_tokens=50) == 200.0
