"""One world: a queue, its clients and workers, virtual time and bad wires, all of it drawn from one seed.

A heap of things to do by virtual ms; nothing else moves. The same seed is the same history, call by call. A storm of
`STORM_MS` (weather.py), then the faults end and everything accepted must end, then nothing must be left.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

from msgspec.structs import replace

from services.queues.protocol_core import QueueCore
from tests.simulation.actors import PATIENCE_MS, Act, Actor, Client, Hear, Worker
from tests.simulation.books import Books, Violation, demand
from tests.simulation.calls import Answer, Call, Cancel, CoreQueue, Count, Sweep, Workers
from tests.simulation.check import Judge
from tests.simulation.order import Order, weight_of
from tests.simulation.weather import WEATHERS, Weather, draw_limits
from wire.messages import Generate, SamplingParams

START_MS: Final = 1_700_000_000_000
STORM_MS: Final = 15_000
SETTLED_MS: Final = 900_000  # after the storm everything must have ended by then
LATENCY_MS: Final = 20
LOST: Final = "the call is lost"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a history: a call that was executed, or why it was not."""

    at_ms: int  # of the queue's clock
    caller: str
    call: Call
    answer: Answer
    fate: str = ""  # of the reply, or of the call


class World:
    """Use `run()`; what happened is in `history`."""

    def __init__(self, seed: int, core_class: type[QueueCore] = QueueCore) -> None:
        self.seed = seed
        self.rng = rng = Random(seed)
        self.weather_name = rng.choice(sorted(WEATHERS))
        self.weather: Weather = WEATHERS[self.weather_name]
        self.limits = draw_limits(self.weather, rng)
        self.lease_ms = self.limits.lease_ms
        self.now_ms = START_MS
        self._skew_ms = 0  # how far the queue's clock has jumped ahead
        self.history: list[Record] = []
        self.books = Books(self.limits)
        self._core = core_class(self.limits)
        self._queue = CoreQueue(self._core)
        self._judge = Judge(self._core, self.books, self._order())
        self._agenda: list[tuple[int, int, Actor, int, Act]] = []
        self._num_planned = 0
        self._is_stormy = True
        self._bodies: dict[str, set[int]] = {}
        self._fate = Actor("fate")
        self._models = [f"m{i}" for i in range(self.weather.models)]
        self._poison_seeds: set[int] = set()
        self._workers = self._draw_workers()
        self._clients = self._draw_clients()
        self._draw_disasters()

    def run(self) -> None:
        """The storm, the calm after it, the end. Raises Violation, with the seed in its words."""
        try:
            self._run_while(lambda: self.now_ms < START_MS + STORM_MS)
            self._settle()
            self._run_out()
        except Exception as error:  # whatever it is: a queue that raises what its contract does not name is broken
            words = f"{type(error).__name__}: {error}" if not isinstance(error, Violation) else str(error)
            where = f"seed {self.seed} ({self.weather_name}) at {self.now_ms - START_MS:,} ms"
            raise Violation(f"{where}: {words}; replay: python -m tests.simulation {self.seed}") from error

    # --- what actors see (actors.Surroundings) ------------------------------------------------------------------------

    def later(self, actor: Actor, ms: int, act: Act) -> None:
        self._plan(ms, actor, actor.turn, act)

    def send(self, actor: Actor, call: Call, hear: Hear, lost: Act) -> None:
        rng, wires, turn = self.rng, self.weather.wires, actor.turn
        chance = rng.random() if self._is_stormy else 1.0
        there_ms, back_ms = rng.randint(1, LATENCY_MS), rng.randint(1, LATENCY_MS)

        def arrive() -> None:
            answer = self._execute(actor.name, call)
            self._plan(back_ms, actor, turn, lambda: hear(answer))

        # What is under way arrives even if its caller dies meanwhile, so calls are carried by fate.
        if (chance := chance - wires.lost_calls) < 0:
            self.history.append(Record(self.now_ms + self._skew_ms, actor.name, call, None, LOST))
        elif (chance := chance - wires.lost_replies) < 0:
            self.later(self._fate, there_ms, lambda: self._execute(actor.name, call, "the reply is lost"))
        elif (chance := chance - wires.late_calls) < 0:
            late_ms = rng.randint(PATIENCE_MS, 3 * self.lease_ms)
            self.later(self._fate, late_ms, lambda: self._execute(actor.name, call, "late, nobody listens"))
        else:
            self.later(self._fate, there_ms, arrive)
            return
        self.later(actor, PATIENCE_MS, lost)

    def is_poison(self, request: Generate) -> bool:
        return request.sampling.seed in self._poison_seeds

    def is_sole_body(self, request: Generate) -> bool:
        return len(self._bodies[request.request_id]) == 1

    # --- time ---------------------------------------------------------------------------------------------------------

    def _plan(self, ms: int, actor: Actor, turn: int, act: Act) -> None:
        self._num_planned += 1
        heapq.heappush(self._agenda, (self.now_ms + ms, self._num_planned, actor, turn, act))

    def _run_while(self, goes_on: Callable[[], bool]) -> None:
        agenda = self._agenda
        while agenda and goes_on():
            at_ms, number, actor, turn, act = heapq.heappop(agenda)
            self.now_ms = at_ms
            if turn != actor.turn:
                continue
            if actor.asleep_until_ms > self.now_ms:
                heapq.heappush(agenda, (actor.asleep_until_ms, number, actor, turn, act))
            else:
                act()

    def _execute(self, caller: str, call: Call, fate: str = "") -> Answer:
        now = self.now_ms + self._skew_ms
        answer = self._queue.answer(call, now)
        self.history.append(Record(now, caller, call, answer, fate))
        self._judge.executed(call, answer, now)
        return answer

    # --- the end ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """No more faults: everything accepted must end, by workers or, if none comes back, by cancelling it."""
        self._is_stormy = False
        if self.rng.random() >= self.weather.is_lost_for_good:
            for worker in self._workers:
                worker.wake()
                worker.start()
            self._run_while(self._is_unsettled)
        for worker in self._workers:
            worker.crash()
        self._cancel_all()
        if not self.weather.loses_leases:
            innocents = [life for life in self.books.dead if not self.is_poison(life.request)]
            demand(not innocents, f"{[life.request.request_id for life in innocents]} were given up and killed nobody")

    def _is_unsettled(self) -> bool:
        demand(self.now_ms < START_MS + SETTLED_MS, f"{sorted(self.books.live)} have not ended")
        return bool(self.books.live) or any(client.is_submitting for client in self._clients)

    def _cancel_all(self) -> None:
        """Nobody works any more: a cancellation ends who waits at once, and the others within their leases."""
        for request_id in list(self.books.live):
            self._execute("fate", Cancel(request_id))
        if self.books.live:
            self._skew_ms += self.lease_ms
            self._execute("fate", Sweep())
        demand(not self.books.live, f"{sorted(self.books.live)} outlive their leases though they are cancelled")

    def _run_out(self) -> None:
        """Readers read to the end, late calls arrive, logs are forgotten, and nothing is left."""

        def goes_on() -> bool:
            if self.books.live:  # a late submit
                self._cancel_all()
            return True

        self._run_while(goes_on)
        self._cancel_all()
        for _ in range(4 * len(self._bodies) + 100):
            due_ms = self._core.next_alarm_ms
            if due_ms is None:
                break
            self._skew_ms = max(self._skew_ms, due_ms - self.now_ms)
            self._execute("fate", Sweep())
        self._judge.check_tables(self.now_ms + self._skew_ms)
        self._judge.check_nothing_is_left()
        self._skew_ms += self.limits.worker_ttl_ms
        self._execute("fate", Workers())

    # --- what is drawn ------------------------------------------------------------------------------------------------

    def _order(self) -> Order:
        weather = self.weather
        is_shared = weather.is_roomy and weather.models == 1 and len(weather.priorities) == 1
        return Order(self.books, is_roomy=weather.is_roomy, is_shared=is_shared)

    def _draw_workers(self) -> list[Worker]:
        rng, weather = self.rng, self.weather
        workers = []
        for index in range(rng.randint(1, 4)):
            # The first serves every model, so that each is served.
            serves_all = weather.is_roomy or index == 0 or rng.random() < 0.5
            models = tuple(self._models if serves_all else rng.sample(self._models, 1))
            capacity = 100_000 if weather.is_roomy else rng.randint(50, 150)
            worker = Worker(self, f"w{index}", models, rng.randint(1, 6), capacity)
            self.later(self._fate, rng.randint(0, 500), partial(self._raise, worker))
            workers.append(worker)
        return workers

    def _draw_clients(self) -> list[Client]:
        rng, weather = self.rng, self.weather
        requests: list[Generate] = []
        clients = []
        for index in range(rng.randint(*weather.requests)):
            request = self._draw_request(f"r{index}")
            if requests and rng.random() < 0.2:  # comes again, or another with the same id
                other = rng.choice(requests)
                request = other if rng.random() < 0.6 else replace(request, request_id=other.request_id)
            requests.append(request)
            self._bodies.setdefault(request.request_id, set()).add(request.sampling.seed)
            client = Client(self, f"c{index}", request, weather.cancels)
            self.later(client, rng.randint(0, STORM_MS // (5 if weather.is_roomy else 2)), client.begin)
            clients.append(client)
        self._poison_seeds = {request.sampling.seed for request in rng.sample(requests, weather.poisons)}
        return clients

    def _draw_request(self, request_id: str) -> Generate:
        rng, weather = self.rng, self.weather
        tenant = f"t{rng.randrange(weather.tenants)}" if weather.is_roomy or rng.random() < 0.8 else ""
        is_huge = not weather.is_roomy and rng.random() < (0.1 if weather.is_pressed else 0.03)
        has_deadline = rng.random() < weather.deadlines
        return Generate(
            request_id,
            rng.choice(self._models),
            list(range(rng.randint(1, 20))),
            200 if is_huge else rng.randint(1, 30),
            SamplingParams(seed=rng.getrandbits(30)),
            tenant=tenant,
            weight=weight_of(tenant) if tenant else 1,
            priority=rng.choice(weather.priorities),
            deadline_ms=rng.choice([500, 2_000, 8_000, 20_000, 300_000]) if has_deadline else None,
            background=rng.random() < 0.2,
        )

    # --- disasters ----------------------------------------------------------------------------------------------------

    def _draw_disasters(self) -> None:
        weather = self.weather
        kinds: tuple[tuple[int, Act], ...] = (
            (weather.crash_ms, self._crash),
            (weather.stall_ms, self._stall),
            (weather.drain_ms, self._drain),
            (weather.fleet_gone_ms, self._lose_fleet),
            (weather.jump_ms, self._jump),
            (2_000, self._look_around),
        )
        for every_ms, happen in kinds:
            at_ms = 0.0
            while every_ms and (at_ms := at_ms + self.rng.expovariate(1 / every_ms)) < STORM_MS:
                self.later(self._fate, int(at_ms), happen)

    def _raise(self, worker: Worker) -> None:
        if self._is_stormy:
            worker.start()

    def _crash(self) -> None:
        worker = self.rng.choice(self._workers)
        worker.crash()
        self.later(self._fate, self.rng.randint(200, 6_000), partial(self._raise, worker))

    def _stall(self) -> None:
        self.rng.choice(self._workers).asleep_until_ms = self.now_ms + self.rng.randint(500, 3 * self.lease_ms)

    def _drain(self) -> None:
        worker = self.rng.choice(self._workers)
        if worker.is_up:
            worker.drain()
        self.later(self._fate, self.rng.randint(200, 3_000), partial(self._raise, worker))

    def _lose_fleet(self) -> None:
        gone_ms = self.rng.randint(self.lease_ms, 4 * self.lease_ms)
        for worker in self._workers:
            worker.crash()
            self.later(self._fate, gone_ms + self.rng.randint(0, 1_000), partial(self._raise, worker))

    def _jump(self) -> None:
        self._skew_ms += self.rng.choice([self.lease_ms // 2, self.lease_ms, 10_000, 120_000])

    def _look_around(self) -> None:
        self._execute("fate", Count(self.rng.choice([None, *self._models])))
        self._execute("fate", Workers())
