"""KVBlockPool against a model that remembers what was written where.

The model keeps, for each block, the prefix that was last computed into it. What the pool finds must be exactly that.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batcher.kv_blocks import BlockNeed, BlockTable, KVBlockPool, block_hash, root_hash

Prefix = tuple[str, tuple[int, ...]]  # (tenant, all tokens up to the end of a block)


@dataclass
class Sequence:
    tenant: str
    tokens: list[int]
    table: BlockTable = field(default_factory=BlockTable)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 3), prefix_cache=st.booleans())
    def start(self, num_blocks: int, block_size: int, prefix_cache: bool) -> None:
        self.pool = KVBlockPool(num_blocks, block_size, prefix_cache=prefix_cache)
        self.live: list[Sequence] = []
        self.content: dict[int, Prefix] = {}

    def hashes(self, sequence: Sequence) -> list[bytes]:
        size, chain = self.pool.block_size, [root_hash(sequence.tenant)]
        for end in range(size, len(sequence.tokens) + 1, size):
            chain.append(block_hash(chain[-1], array("q", sequence.tokens[end - size : end])))
        return chain[1:]

    def compute(self, sequence: Sequence, start: int) -> None:
        """Write tokens [start, end) of the sequence into its blocks, as a committed step does."""
        size = self.pool.block_size
        for i in range(start // size, self.pool.blocks_for(len(sequence.tokens))):
            self.content[sequence.table[i]] = (sequence.tenant, tuple(sequence.tokens[: (i + 1) * size]))
        for i, digest in enumerate(self.hashes(sequence)):
            if i >= start // size:
                self.pool.remember(sequence.table[i], digest)

    @rule(
        tenant=st.sampled_from(["", "a"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        commits=st.booleans(),
    )
    def begin(self, tenant: str, tokens: list[int], commits: bool) -> None:
        sequence, size = Sequence(tenant, tokens), self.pool.block_size
        hits = self.pool.lookup(self.hashes(sequence)[: (len(tokens) - 1) // size])
        for i, block in enumerate(hits):
            assert self.content[block] == (tenant, tuple(tokens[: (i + 1) * size]))
        num_new = self.pool.blocks_for(len(tokens)) - len(hits)
        if num_new > self.pool.num_available - len(self.pool.idle_among(hits)):
            return
        with self.pool.reserve([BlockNeed(0, sequence.table, tuple(hits), num_new)]) as hold:
            for block in hold.added[0][len(hits) :]:
                self.content[block] = ("", (99,))  # a step writes before it is known whether it commits
            if commits:
                hold.commit()
        if commits:
            self.live.append(sequence)
            self.compute(sequence, len(hits) * size)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), token=st.integers(0, 1))
    def decode(self, pick: int, token: int) -> None:
        sequence = self.live[pick % len(self.live)]
        num_new = self.pool.blocks_for(len(sequence.tokens) + 1) - len(sequence.table)
        if num_new > self.pool.num_available:
            return
        with self.pool.reserve([BlockNeed(0, sequence.table, (), num_new)]) as hold:
            hold.commit()
        sequence.tokens.append(token)
        self.compute(sequence, len(sequence.tokens) - 1)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), forget=st.booleans())
    def end(self, pick: int, forget: bool) -> None:
        self.pool.release(self.live.pop(pick % len(self.live)).table, forget=forget)

    @precondition(lambda self: self.live)
    @rule(picks=st.sets(st.integers(0, 20), max_size=4))
    def foresee(self, picks: set[int]) -> None:
        chosen = {pick % len(self.live) for pick in picks}
        others = [sequence.table.ids.tolist() for i, sequence in enumerate(self.live) if i not in chosen]
        kept = {block for blocks in others for block in blocks}
        foreseen = self.pool.num_available_without(self.live[i].table for i in chosen)
        assert foreseen == self.pool.num_blocks - len(kept)

    @invariant()
    def whole(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(sequence.table for sequence in self.live)
            used = {block for sequence in self.live for block in sequence.table.ids.tolist()}
            assert self.pool.num_available == self.pool.num_blocks - len(used)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for sequence in self.live:
                self.pool.release(sequence.table)
            self.pool.check([])
            assert self.pool.num_available == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
