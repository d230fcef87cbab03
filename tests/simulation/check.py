"""The judge of a world: every answer of the queue against the books, and the core's own tables against them too.

One terminal each, indices without gap, repeat or change, stale epochs without effect, bills that equal logs, deadlines
and cancellations in time, nothing forgotten before its end, nothing left behind: all of it is equality with the books.
"""

from __future__ import annotations

from typing import assert_never

from services.queues.entry import Entry
from services.queues.protocol_core import QueueCore
from tests.simulation.books import Books, Life, Violation, demand, same_end
from tests.simulation.calls import (
    Abandon,
    Answer,
    Call,
    Cancel,
    Count,
    Logged,
    Look,
    Publish,
    Read,
    Refused,
    Release,
    Renew,
    Report,
    Submit,
    Sweep,
    Take,
    Workers,
)
from tests.simulation.order import Order
from wire.messages import decode_event
from wire.queue import Lease, Standing, Status

FULL_CHECK_EVERY = 16  # calls


class Judge:
    """Sees every call that the queue has executed, in order."""

    def __init__(self, core: QueueCore, books: Books, order: Order) -> None:
        self._core = core
        self._order = order
        self._calls = 0
        self._handed_out: dict[
            str, tuple[str, list[Lease]]
        ] = {}  # by worker: nonce and leases of the last that found any
        self.books = books

    def executed(self, call: Call, answer: Answer, now: int) -> None:
        """Raises Violation."""
        self._judge(call, answer, now)
        self._judge_news()
        self._calls += 1
        if self._calls % FULL_CHECK_EVERY == 0:
            self.check_tables(now)

    def _judge(self, call: Call, answer: Answer, now: int) -> None:
        books = self.books
        match call:
            case Publish(appends):
                self._same(answer, books.publish(appends, now))
            case Renew(leases):
                self._same(answer, books.renew(leases, now))
            case Take():
                assert isinstance(answer, list)
                self._judge_leases(call, [lease for lease in answer if isinstance(lease, Lease)], now)
            case Read(request_id, start):
                self._judge_log(books.standing(request_id, now), request_id, start, answer)
            case Submit(request):
                self._judge_submit(books.submit(request, now), books.known.get(request.request_id), answer)
            case Look(request_id):
                self._judge_standing(books.standing(request_id, now), answer)
            case Cancel(request_id):
                is_known = books.cancel(request_id, now)
                self._same(
                    answer.code if isinstance(answer, Refused) else answer, None if is_known else "unknown_request"
                )
            case Abandon(request_id):
                books.cancel(request_id, now, is_for_lack_of_readers=True)
                self._same(answer, None)
            case Release(leases):
                books.release(leases, now)
                self._same(answer, None)
            case Report(report):
                books.report(report, now)
                self._same(answer, None)
            case Workers():
                books.pass_time(now)
                self._same(answer, books.workers(now))
            case Count(model):
                self._same(answer, books.depth(model, now))
            case Sweep():
                books.pass_time(now)
            case _:
                assert_never(call)

    def _same(self, answer: object, expected: object) -> None:
        demand(answer == expected, f"the answer is {answer}; it should be {expected}")

    def _judge_submit(self, expected: str, life: Life | None, answer: Answer) -> None:
        found = answer.code if isinstance(answer, Refused) else "accepted" if answer is True else "attached"
        self._same(found, expected)
        if found == "accepted":
            assert life is not None
            self._order.arrived(life)

    def _judge_leases(self, call: Take, leases: list[Lease], now: int) -> None:
        budget, books = call.budget, self.books
        nonce, before = self._handed_out.get(budget.worker_id, ("", []))
        if nonce == call.nonce:
            self._same(leases, books.handed_out_again(before, now))
            return
        waiting = books.waiting(budget.models, now)
        chosen = [books.handed_out(lease, now) for lease in leases]
        self._order.judge(budget, leases, chosen, [life for life in waiting if life.until_ms is None])
        if leases:
            self._handed_out[budget.worker_id] = (call.nonce, leases)

    def _judge_standing(self, expected: Standing | None, answer: Answer) -> None:
        if expected is None:
            demand(isinstance(answer, Refused) and answer.code == "unknown_request", f"{answer} of who is unknown")
            return
        if not isinstance(answer, Standing):
            raise Violation(f"{answer} of who is known")
        self._same(
            (answer.facts, answer.status, answer.num_tokens), (expected.facts, expected.status, expected.num_tokens)
        )
        demand(same_end(answer.terminal, expected.terminal), f"the end is {answer.terminal}, not {expected.terminal}")

    def _judge_log(self, standing: Standing | None, request_id: str, start: int, answer: Answer) -> None:
        if standing is None:
            demand(isinstance(answer, Refused) and answer.code == "unknown_request", f"{answer} of who is unknown")
            return
        if not isinstance(answer, Logged):
            raise Violation(f"{answer} of who is known")
        life = self.books.known[request_id]
        self._same(list(answer.token_ids), life.log[start:])
        demand(same_end(answer.terminal, life.terminal), f"the end is {answer.terminal}, not {life.terminal}")

    def _judge_news(self) -> None:
        """Those who wait for news are woken by exactly these; what is new is what the books say."""
        core, books = self._core, self.books
        if core.grown or books.grown:
            demand(core.grown == books.grown, f"news of {sorted(core.grown)}; grown are {sorted(books.grown)}")
            for request_id in sorted(core.grown):
                self._check_entry(books.known[request_id])
            core.grown.clear()
            books.grown.clear()
        if core.offered or books.offered:
            demand(core.offered == books.offered, f"offers of {sorted(core.offered)}, not {sorted(books.offered)}")
            core.offered.clear()
            books.offered.clear()

    # --- the core's tables --------------------------------------------------------------------------------------------

    def check_tables(self, now: int) -> None:
        """Every table of the core against the books, as of the last call."""
        core, books = self._core, self.books
        books.pass_time(now)
        self._same(sorted(core._entries), sorted(books.known))
        alarms = set(core._alarms)
        for life in books.known.values():
            entry = self._check_entry(life)
            due_ms = entry.due_ms()
            if due_ms is not None:
                is_set = entry.alarm_ms is not None and entry.alarm_ms <= due_ms
                demand(is_set and (entry.alarm_ms, entry.request_id) in alarms, f"no alarm for {entry.request_id}")
        self._check_line()
        self._check_accounts(now)

    def _check_entry(self, life: Life) -> Entry:
        request_id = life.request.request_id
        entry = self._core._entries[request_id]
        self._same((entry.status, entry.epoch, entry.deliveries), (life.status, life.owner, life.deliveries))
        demand(entry.tokens.tolist() == life.log, f"{request_id} logs {entry.tokens.tolist()}, not {life.log}")
        terminal = decode_event(entry.terminal) if entry.terminal else None
        demand(same_end(terminal, life.terminal), f"{request_id} ends as {terminal}, not {life.terminal}")
        demand(life.status is Status.ENDED or entry.is_cancelled == life.is_cancelled, f"{request_id} forgot a cancel")
        return entry

    def _check_line(self) -> None:
        lines, suspects = self._core._line._lines, set()
        waiting: dict[str, set[str]] = {}
        for request_id, life in self.books.live.items():
            if life.until_ms is None:
                waiting.setdefault(life.request.model, set()).add(request_id)
                if self.books.is_suspect(life):
                    suspects.add(request_id)
        self._same({model: {place.request_id for place in line} for model, line in lines.items()}, waiting)
        for model, line in lines.items():
            demand(line == sorted(line), f"the line of {model} is out of order")
        self._same(sorted(self._core._line._suspects), sorted(suspects))

    def _check_accounts(self, now: int) -> None:
        models = sorted({life.request.model for life in self.books.live.values()})
        for model in (None, *models):
            self._same(self._core._accounts.depth(model, now), self.books.depth(model, now))
        tenants: dict[str, int] = {}
        for life in self.books.live.values():
            tenants[life.request.tenant] = tenants.get(life.request.tenant, 0) + life.request.max_total_tokens
        self._same(dict(self._core._accounts._tenants), tenants)

    def check_nothing_is_left(self) -> None:
        """After the last log's time: no entry, alarm, place, account or report, whatever has happened."""
        core = self._core
        left = {
            "entries": core._entries,
            "alarms": core._alarms,
            "lines": core._line._lines,
            "overtaken": core._line._overtaken,
            "suspects": core._line._suspects,
            "ends of tenants": core._line.share._ends,
            "requests": core._accounts._requests,
            "tokens": core._accounts._tokens,
            "tenants": core._accounts._tenants,
        }
        for name, table in left.items():
            if table:
                raise Violation(f"{name} are left: {table}")
