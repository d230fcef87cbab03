"""Whom a lease may hand out: what fits, by priority, suspects one at a time, and tenants in proportion to weight.

The bound on shares is that of start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996, theorem 1), for what is
handed out: while a request waits, another tenant gets no more than its own share of that time, and one request beyond.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from tests.simulation.books import Books, Life, demand
from wire.queue import Lease, LeaseBudget

MAX_SUSPECTS_IN_FRONT = 1  # beyond it a pick may not look at everybody


class Order:
    """Judges the choices of one queue.

    `is_roomy`: every worker takes every request, so nobody is passed over for want of room. `is_shared`: and there is
    one model and one priority, so the tenants' shares can be counted.
    """

    def __init__(self, books: Books, *, is_roomy: bool, is_shared: bool) -> None:
        self._books = books
        self._is_roomy = is_roomy
        self._is_shared = is_shared
        self._served: Counter[str] = Counter()  # tokens of each tenant, handed out for the first time
        self._longest: Counter[str] = Counter()  # of each tenant, in tokens
        self._asked: dict[str, dict[int, int]] = defaultdict(dict)  # tenant -> arrival -> tokens, not yet handed out
        # By arrival: tokens of its own tenant that stood before it, and what the others had got by then.
        self._at_arrival: dict[int, tuple[int, Counter[str]]] = {}

    def arrived(self, life: Life) -> None:
        tenant, tokens = life.request.tenant, life.request.max_total_tokens
        self._at_arrival[life.arrival] = (sum(self._asked[tenant].values()), self._served.copy())
        self._asked[tenant][life.arrival] = tokens
        self._longest[tenant] = max(self._longest[tenant], tokens)

    def judge(self, budget: LeaseBudget, leases: list[Lease], chosen: list[Life], others: list[Life]) -> None:
        """`chosen`: whom the leases are of; `others`: who still waits for these models."""
        demand(len(leases) <= budget.max_requests, f"{len(leases)} leases to who asked for {budget.max_requests}")
        demand(all(life.request.model in budget.models for life in chosen), "a lease of a model not asked for")
        sizes = [life.request.max_total_tokens for life in chosen]
        taken = sum(tokens for tokens in sizes if tokens <= budget.capacity_tokens)
        demand(taken <= budget.max_tokens, f"{taken} tokens to who has room for {budget.max_tokens}")
        suspects = sum(lease.is_suspect for lease in leases)
        demand(suspects <= budget.takes_suspect, f"{suspects} suspects to who takes {int(budget.takes_suspect)}")
        if self._is_roomy:
            self._judge_order(chosen, others, is_full=len(leases) == budget.max_requests)
        for life in chosen:
            self._serve(life)

    def _judge_order(self, chosen: list[Life], others: list[Life], *, is_full: bool) -> None:
        ranks = [life.request.priority for life in chosen]
        demand(ranks == sorted(ranks, reverse=True), f"leases in the order of priorities {ranks}")
        passed_over = [life for life in others if not self._books.is_suspect(life)]
        if len(others) - len(passed_over) <= MAX_SUSPECTS_IN_FRONT:
            demand(is_full or not passed_over, f"{len(passed_over)} requests wait before a worker that has room")
        for life in passed_over:
            request = life.request
            for taken in chosen:
                other = taken.request
                demand(other.priority >= request.priority, f"{other.request_id} is taken before {request.request_id}")
                if (other.tenant, other.priority, other.model) == (request.tenant, request.priority, request.model):
                    words = f"{other.request_id} is taken before {request.request_id}, the older one of its tenant"
                    demand(taken.arrival < life.arrival, words)

    def _serve(self, life: Life) -> None:
        tenant = life.request.tenant
        tokens = self._asked[tenant].pop(life.arrival, None)
        if tokens is None:
            return  # handed out before
        own, before = self._at_arrival.pop(life.arrival)
        if self._is_shared:
            for other in self._served:
                if other != tenant:
                    self._judge_share(life, other, own, self._served[other] - before[other])
        self._served[tenant] += tokens

    def _judge_share(self, life: Life, other: str, own_tokens: int, got_tokens: int) -> None:
        # Weights are the tenants' own: weight_of() is constant in a world.
        share = (own_tokens + self._longest[life.request.tenant]) / life.request.weight * weight_of(other)
        most = share + self._longest[other]
        words = f"{life.request.request_id} of {life.request.tenant} behind {own_tokens} tokens of its own"
        demand(got_tokens <= most, f"{words} has waited while {other} got {got_tokens} tokens; its share is {most:.0f}")


def weight_of(tenant: str) -> int:
    """The tenants of a world are t0, t1, t2 ..., with shares 1, 2, 4, 1, 2 ..."""
    return 1 << int(tenant[1:]) % 3
