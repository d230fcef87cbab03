"""KVBlockPool: sharing, eviction, transactions, and that check() sees what is broken."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest

from batcher.kv_blocks import BlockNeed, BlockTable, KVBlockPool, OutOfBlocks, block_hash, root_hash


def chain(tokens: str, block_size: int = 2, tenant: str = "") -> list[bytes]:
    """The hashes of the full blocks of a sequence spelled as a string."""
    hashes = [root_hash(tenant)]
    for i in range(len(tokens) // block_size):
        block = array("q", [ord(token) for token in tokens[i * block_size : (i + 1) * block_size]])
        hashes.append(block_hash(hashes[-1], block))
    return hashes[1:]


def take(pool: KVBlockPool, num_new: int, hits: tuple[int, ...] = ()) -> BlockTable:
    table = BlockTable()
    with pool.reserve([BlockNeed(0, table, hits, num_new)]) as hold:
        hold.commit()
    return table


def written(pool: KVBlockPool, tokens: str, tenant: str = "") -> BlockTable:
    """A sequence computed in full: its whole blocks are findable."""
    hashes = chain(tokens, pool.block_size, tenant)
    table = take(pool, pool.blocks_for(len(tokens)))
    for i, digest in enumerate(hashes):
        pool.remember(table[i], digest)
    return table


def test_blocks_that_were_not_committed_come_back() -> None:
    pool, table = KVBlockPool(4, 2), BlockTable()
    with pool.reserve([BlockNeed(0, table, (), 3)]) as hold:
        assert pool.num_available == 1
        assert len(hold.added[0]) == 3
    assert (pool.num_available, len(table)) == (4, 0)
    pool.check([])


def test_an_error_inside_a_reservation_gives_everything_back() -> None:
    pool = KVBlockPool(4, 2)
    cached = written(pool, "abcd")
    hits = tuple(cached.ids.tolist())
    pool.release(cached)
    with pytest.raises(RuntimeError, match="forward"), pool.reserve([BlockNeed(0, BlockTable(), hits, 2)]):
        raise RuntimeError("forward")
    assert pool.num_available == 4
    pool.check([])


def test_a_reservation_beyond_the_pool_is_refused_and_leaves_no_trace() -> None:
    pool = KVBlockPool(4, 2)
    cached = written(pool, "abcd")
    hits = tuple(cached.ids.tolist())
    pool.release(cached)
    with pytest.raises(OutOfBlocks, match="this is a bug"), pool.reserve([BlockNeed(0, BlockTable(), hits, 3)]):
        pytest.fail("the pool cannot cover this")
    assert pool.num_available == 4
    assert pool.lookup(chain("abcd")) == list(hits)
    pool.check([])


def test_only_the_common_prefix_is_found() -> None:
    pool = KVBlockPool(8, 2)
    table = written(pool, "abcdef")
    assert pool.lookup(chain("abcdXX")) == table.ids.tolist()[:2]
    assert pool.lookup(chain("XXcdef")) == []
    assert pool.lookup(chain("abcdef")) == table.ids.tolist()


def test_a_tenant_never_finds_the_blocks_of_another() -> None:
    pool = KVBlockPool(8, 2)
    written(pool, "abcd", tenant="one")
    assert pool.lookup(chain("abcd", tenant="other")) == []
    assert pool.lookup(chain("abcd", tenant="")) == []
    assert len(pool.lookup(chain("abcd", tenant="one"))) == 2


def test_a_shared_block_is_available_again_after_its_last_user() -> None:
    pool = KVBlockPool(4, 2)
    first = written(pool, "abcd")
    second = take(pool, 1, tuple(first.ids.tolist()))
    assert pool.num_available == 1
    pool.check([first, second])
    assert pool.num_available_without([first]) == 1
    assert pool.num_available_without([second]) == 2
    assert pool.num_available_without([first, second]) == 4
    pool.release(first)
    assert pool.num_available == 1
    pool.release(second)
    assert pool.num_available == 4
    pool.check([])


def test_free_blocks_are_taken_before_a_prefix_is_evicted() -> None:
    pool = KVBlockPool(4, 2)
    pool.release(written(pool, "abcd"))
    take(pool, 2)
    assert len(pool.lookup(chain("abcd"))) == 2


def test_the_least_recently_used_prefix_goes_first_and_its_tail_before_its_head() -> None:
    pool = KVBlockPool(4, 2)
    old, new = written(pool, "abcd"), written(pool, "efgh")
    pool.release(old)
    pool.release(new)
    take(pool, 1)
    assert len(pool.lookup(chain("abcd"))) == 1
    take(pool, 1)
    assert pool.lookup(chain("abcd")) == []
    assert len(pool.lookup(chain("efgh"))) == 2


def test_using_a_prefix_again_makes_it_recent() -> None:
    pool = KVBlockPool(4, 2)
    old, new = written(pool, "abcd"), written(pool, "efgh")
    pool.release(old)
    pool.release(new)
    pool.release(take(pool, 0, tuple(pool.lookup(chain("abcd")))))
    take(pool, 2)
    assert len(pool.lookup(chain("abcd"))) == 2
    assert pool.lookup(chain("efgh")) == []


def test_a_found_block_is_never_evicted_for_a_neighbour_of_the_same_step() -> None:
    pool = KVBlockPool(4, 2)
    pool.release(written(pool, "abcdefgh"))
    hits = tuple(pool.lookup(chain("abcd")))
    greedy, lucky = BlockTable(), BlockTable()
    with pool.reserve([BlockNeed(0, greedy, (), 2), BlockNeed(1, lucky, hits, 0)]) as hold:
        assert not set(hold.added[0]) & set(hits)
        hold.commit()
    assert pool.lookup(chain("abcdefgh")) == list(hits)
    pool.check([greedy, lucky])


def test_an_evicted_prefix_stays_forgotten_after_a_failed_step() -> None:
    pool = KVBlockPool(2, 2)
    pool.release(written(pool, "abcd"))
    with pool.reserve([BlockNeed(0, BlockTable(), (), 2)]):
        pass  # whatever was to happen did not; but it may have written
    assert pool.lookup(chain("abcd")) == []
    pool.check([])


def test_a_prefix_computed_twice_is_kept_once() -> None:
    pool = KVBlockPool(4, 2)
    first, second = written(pool, "abcd"), written(pool, "abcd")
    assert pool.lookup(chain("abcd")) == first.ids.tolist()
    pool.release(second)
    assert pool.num_cached == 2
    pool.check([first])


def test_forgotten_blocks_are_not_found_even_while_others_use_them() -> None:
    pool = KVBlockPool(4, 2)
    first = written(pool, "abcd")
    second = take(pool, 0, tuple(first.ids.tolist()))
    pool.release(first, forget=True)
    assert pool.lookup(chain("abcd")) == []
    pool.check([second])


def test_nothing_is_remembered_when_the_cache_is_off() -> None:
    pool = KVBlockPool(4, 2, prefix_cache=False)
    pool.release(written(pool, "abcd"))
    assert (pool.num_cached, pool.lookup(chain("abcd"))) == (0, [])
    pool.check([])


def test_remembering_an_unused_block_is_a_bug() -> None:
    with pytest.raises(ValueError, match="this is a bug"):
        KVBlockPool(2, 2).remember(0, chain("ab")[0])


def test_a_table_grows_and_reads_only_what_it_has() -> None:
    table = BlockTable()
    for block in range(40):
        table.extend([block])
    assert table.ids.tolist() == list(range(40))
    with pytest.raises(IndexError):
        table[40]
    assert table.clear() == list(range(40))
    assert len(table) == 0


def steal(pool: KVBlockPool, table: BlockTable) -> None:
    table.clear()


def free_twice(pool: KVBlockPool, table: BlockTable) -> None:
    pool._free.append(pool._free[0])


def free_used(pool: KVBlockPool, table: BlockTable) -> None:
    pool._free.append(table[0])


def lose(pool: KVBlockPool, table: BlockTable) -> None:
    pool._free.pop()


def forget_half(pool: KVBlockPool, table: BlockTable) -> None:
    pool._hashes[table[0]] = None


def idle_without_prefix(pool: KVBlockPool, table: BlockTable) -> None:
    pool._idle[pool._free.pop()] = None


def miscount(pool: KVBlockPool, table: BlockTable) -> None:
    pool._refcounts[table[0]] += 1


@pytest.mark.parametrize("damage", [steal, free_twice, free_used, lose, forget_half, idle_without_prefix, miscount])
def test_check_sees(damage: Callable[[KVBlockPool, BlockTable], None]) -> None:
    pool = KVBlockPool(6, 2)
    table = written(pool, "abcd")
    pool.check([table])
    damage(pool, table)
    with pytest.raises(ValueError, match="this is a bug"):
        pool.check([table])
