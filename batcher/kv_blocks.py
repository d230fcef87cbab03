"""KV blocks: who uses which, and which still hold a prefix worth finding again.

Apart from the scheduler because everything here can be proved by counting: `check()` does, after every step of every
test.

A block is in exactly one of three places:

    used   refcount >= 1: in that many block tables (shared only where a prefix was found); may be known by its hash
    idle   refcount 0, known by its hash: holds a prefix, is taken when nothing is free, least recently used first
    free   refcount 0, no hash: holds nothing

A block's hash covers all tokens up to its end, h(i) = BLAKE2b(h(i-1) + token ids of block i) and h(-1) =
BLAKE2b(tenant), so an equal hash means an equal prefix of the same tenant (the chain of vLLM's automatic prefix
caching; salted as its `cache_salt`, but always). Only full blocks whose every token has been computed are known by a
hash.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_DIGEST_BYTES = 32


class OutOfBlocks(Exception):
    """A plan wants more blocks than there are. plan() must have checked: this is a bug."""


def root_hash(tenant: str) -> bytes:
    """Where a tenant's chains start: no two tenants ever meet in the cache."""
    return blake2b(tenant.encode(), digest_size=_DIGEST_BYTES, person=b"millrace-tenant").digest()


def block_hash(parent: bytes, token_ids: array[int]) -> bytes:
    """The hash of one full block after `parent`; `token_ids` is an array of type "q"."""
    return blake2b(parent + token_ids.tobytes(), digest_size=_DIGEST_BYTES).digest()


class BlockTable:
    """The physical blocks of one sequence, in order: one growing row that packing copies from."""

    __slots__ = ("_length", "_row")

    def __init__(self) -> None:
        self._row: NDArray[np.int32] = np.empty(0, np.int32)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of a table of {self._length}")
        return int(self._row[index])

    @property
    def ids(self) -> NDArray[np.int32]:
        """A view [len]; valid until the table changes."""
        return self._row[: self._length]

    def extend(self, blocks: Sequence[int]) -> None:
        length = self._length + len(blocks)
        if length > len(self._row):
            row = np.empty(max(8, 2 * length), np.int32)
            row[: self._length] = self.ids
            self._row = row
        self._row[self._length : length] = blocks
        self._length = length

    def clear(self) -> list[int]:
        """Empty the table and return what it held."""
        blocks: list[int] = self.ids.tolist()
        self._length = 0
        return blocks


@dataclass(frozen=True, slots=True)
class BlockNeed:
    """What one sequence of a plan lacks: found blocks to share first, then new ones."""

    index: int  # of the sequence in its plan
    table: BlockTable
    hits: tuple[int, ...]
    num_new: int


class Reservation:
    """Blocks held for one step. `added[k]` are the blocks of `needs[k]`, in order: hits, then new."""

    __slots__ = ("added", "committed", "needs")

    def __init__(self, needs: Sequence[BlockNeed]) -> None:
        self.needs = needs
        self.added: list[list[int]] = []
        self.committed = False

    def commit(self) -> None:
        """Hand the blocks to their tables."""
        for need, blocks in zip(self.needs, self.added, strict=True):
            need.table.extend(blocks)
        self.committed = True


class KVBlockPool:
    """Counts references to `num_blocks` blocks of `block_size` tokens and remembers the prefixes they hold."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache  # False: nothing is remembered, so nothing is ever shared
        self._refcounts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks  # block -> hash
        self._known: dict[bytes, int] = {}  # hash -> block
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 first
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_available(self) -> int:
        """Blocks that a reservation can take: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks known by a hash, used or idle."""
        return len(self._known)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of this chain. Changes nothing."""
        blocks: list[int] = []
        for digest in hashes:
            block = self._known.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def idle_among(self, blocks: Iterable[int]) -> set[int]:
        """Those of `blocks` that count as available now and would not once they are shared."""
        return {block for block in blocks if block in self._idle}

    def num_available_without(self, tables: Iterable[BlockTable]) -> int:
        """How many blocks would be available if these tables were released: a shared one once its last user goes."""
        users = Counter(block for table in tables for block in table.ids.tolist())
        return self.num_available + sum(1 for block, n in users.items() if self._refcounts[block] == n)

    @contextmanager
    def reserve(self, needs: Sequence[BlockNeed]) -> Iterator[Reservation]:
        """Hold the blocks that `needs` names; give them back unless committed.

        No table changes before Reservation.commit(). Prefixes that had to be evicted stay forgotten even when the
        blocks come back: a forward that failed half-way may have written into them.
        Raises OutOfBlocks if the pool cannot cover the needs (a bug: plan() must have checked).
        """
        hold = Reservation(needs)
        # Share all hits before taking anything new: a new block may evict an idle one, and must not evict a hit.
        for need in needs:
            for block in need.hits:
                self._share(block)
            hold.added.append(list(need.hits))
        try:
            for need, blocks in zip(needs, hold.added, strict=True):
                for _ in range(need.num_new):
                    blocks.append(self._take())
            yield hold
        finally:
            if not hold.committed:
                for blocks in hold.added:
                    self._give_back(blocks)

    def release(self, table: BlockTable, *, forget: bool = False) -> None:
        """Take away one user's blocks. `forget`: their contents are not to be trusted, nobody shall find them again."""
        blocks = table.clear()
        if forget:
            for block in blocks:
                self._forget(block)
        self._give_back(blocks)

    def remember(self, block: int, digest: bytes) -> None:
        """Block is full, computed and holds the prefix `digest`. A prefix that another block holds stays there."""
        if self.prefix_cache and digest not in self._known:
            if self._hashes[block] is not None or self._refcounts[block] == 0:
                raise ValueError(f"block {block} is unused or already holds another prefix: this is a bug")
            self._known[digest] = block
            self._hashes[block] = digest

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that every block is where it must be, given the tables of all users; raises ValueError if not."""
        users = Counter(block for table in tables for block in table.ids.tolist())
        _claim(all(0 <= block < self.num_blocks for block in users), "a table names a block that does not exist")
        _claim(self._refcounts == [users[b] for b in range(self.num_blocks)], "refcounts differ from the users' tables")
        free, idle, used = set(self._free), set(self._idle), set(users)
        _claim(len(free) == len(self._free), "a block is free twice")
        _claim(not (free & idle or free & used or idle & used), "a block is in two places")
        _claim(len(free) + len(idle) + len(used) == self.num_blocks, "a block is lost")
        hashed = {digest: block for block, digest in enumerate(self._hashes) if digest is not None}
        _claim(hashed == self._known, "the two directions of the prefix map differ")
        _claim(all(self._hashes[block] is None for block in free), "a free block holds a prefix")
        _claim(all(self._hashes[block] is not None for block in idle), "an idle block holds no prefix")

    def _share(self, block: int) -> None:
        if self._refcounts[block] == 0:
            del self._idle[block]
        self._refcounts[block] += 1

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.num_blocks} KV blocks are in use: this is a bug of plan()")
        self._refcounts[block] = 1
        return block

    def _give_back(self, blocks: Sequence[int]) -> None:
        # Last block first: of one prefix the tail is evicted before the head, without which the tail cannot be found.
        for block in reversed(blocks):
            self._refcounts[block] -= 1
            if self._refcounts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def _forget(self, block: int) -> None:
        digest = self._hashes[block]
        if digest is not None:
            del self._known[digest]
            self._hashes[block] = None


def _claim(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"KV block pool: {otherwise}: this is a bug")
