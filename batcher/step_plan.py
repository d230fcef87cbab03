"""What one step will do, and the functions that decide it from the lists and the pool. They change nothing.

Apart from the scheduler, which applies plans: deciding can be read and tested alone, and a plan that is never run
costs nothing. Who may start, who is cut short and who loses its blocks is decided here with blocks in view; the
arithmetic is in policy.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from batcher.kv_blocks import BlockNeed, KVBlockPool
from batcher.request import Request


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """One request's tokens [start, end) in this step."""

    request: Request
    start: int  # num_computed_tokens, or what the prefix cache covers for a request that is about to start
    end: int
    samples: bool  # end reaches the last known token: a new one is sampled


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Sequences in order of scheduling, and what must happen to blocks for them. No sequences = nothing to compute."""

    sequences: tuple[ScheduledSequence, ...]
    needs: tuple[BlockNeed, ...]  # of those sequences that lack blocks
    preempted: tuple[Request, ...]  # give up their blocks before the needs are reserved
    num_decode_tokens: int
    num_prefill_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + self.num_prefill_tokens


class Candidate(NamedTuple):
    """A request that could run in this step, from its first uncomputed token on."""

    request: Request
    start: int
    hits: tuple[int, ...]  # blocks found in the prefix cache for a request that is about to start


def missing_blocks(running: Iterable[Request], block_size: int) -> int:
    """How many blocks these lack for all the tokens they know."""
    return sum(max(0, -(-len(r.token_ids) // block_size) - len(r.block_table)) for r in running)


def lookup_prefix(request: Request, pool: KVBlockPool) -> list[int]:
    """Blocks that hold a prefix of this request, never all of it: the last token must be computed to have logits."""
    if not pool.prefix_cache:
        return []
    return pool.lookup(request.block_hashes((len(request.token_ids) - 1) // pool.block_size, pool.block_size))


def find_starters(
    waiting: Iterable[Request], pool: KVBlockPool, *, num_running: int, seats: int, spare_blocks: int, budget: int
) -> list[Candidate]:
    """The waiting requests that may start: first come, until one does not fit or `budget` tokens are surely used up.

    One fits if all its known tokens do, in `spare_blocks` beyond what the running ones lack, and leave a block for
    each running one to grow into. Nobody overtakes one that does not fit.
    """
    starters: list[Candidate] = []
    shared: set[int] = set()  # idle blocks that starters share: no longer to be had
    for request in waiting:
        if len(starters) >= seats or budget <= 0:
            break
        hits = lookup_prefix(request, pool)
        idle = pool.idle_among(hits) - shared
        need = pool.blocks_for(len(request.token_ids)) - len(hits) + len(idle)
        if need + num_running + len(starters) > spare_blocks:
            break
        spare_blocks -= need
        shared |= idle
        start = len(hits) * pool.block_size
        starters.append(Candidate(request, start, tuple(hits)))
        budget -= len(request.token_ids) - start
    return starters


def fit_blocks(running: Sequence[Request], counts: list[int], pool: KVBlockPool) -> list[Request]:
    """Blocks are short: cut the `counts` of the running requests to what fits; returns those to preempt.

    In order, each takes what it needs, from the last ones if it must. The last one left takes what there is, or
    pauses: its work is not thrown away for its own sake.
    """
    victims: list[Request] = []
    available, spent = pool.num_available, 0
    for i, request in enumerate(running):
        if request in victims:
            counts[i] = 0
            continue
        held = len(request.block_table)
        need = max(0, pool.blocks_for(request.num_computed_tokens + counts[i]) - held)
        while need > available - spent and running[-1 - len(victims)] is not request:
            victims.append(running[-1 - len(victims)])
            available = pool.num_available_without(victim.block_table for victim in victims)
        if need > available - spent:
            need = available - spent
            counts[i] = (held + need) * pool.block_size - request.num_computed_tokens
        spent += need
    return victims


def assemble(
    candidates: Iterable[Candidate], counts: Iterable[int], victims: Iterable[Request], block_size: int
) -> StepPlan:
    """The plan in which each candidate computes its count of tokens (0 = not in this step)."""
    sequences: list[ScheduledSequence] = []
    needs: list[BlockNeed] = []
    num_tokens = num_decodes = 0
    for (request, start, hits), count in zip(candidates, counts, strict=True):
        if not count:
            continue
        end, known, table = start + count, len(request.token_ids), request.block_table
        num_new = -(-end // block_size) - len(table) - len(hits)
        if num_new or hits:
            needs.append(BlockNeed(len(sequences), table, hits, num_new))
        sequences.append(ScheduledSequence(request, start, end, end == known))
        num_tokens += count
        num_decodes += start + 1 == known
    return StepPlan(tuple(sequences), tuple(needs), tuple(victims), num_decodes, num_tokens - num_decodes)
