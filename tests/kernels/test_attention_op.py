"""PagedAttention inside ONNX Runtime: the same bits as alone, the cache written in place, what is strange refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.attention_case import Pool, cos_sin_table, random_qkv, run_attention
from tests.kernels.one_node import OneNode, Tensor, failure, run
from tests.kernels.reference import AttentionBatch, AttentionConfig, Cache, CacheType

CONFIG = AttentionConfig(num_heads=4, kv_num_heads=2, head_dim=32, cos_sin=cos_sin_table(100, 16), scale=0.25, layer=1)


def node_of(config: AttentionConfig, batch: AttentionBatch, cache: Cache) -> OneNode:
    """The operator on this batch; the cache's memory is handed over as it is."""
    inputs: dict[str, Tensor | None] = {
        "qkv": batch.qkv,
        "kv_cache": cache,
        "positions": batch.positions,
        "cu_seqlens": batch.cu_seqlens,
        "past_lens": batch.past_lens,
        "block_table": batch.block_table,
        "slot_mapping": batch.slot_mapping,
        "cos_sin": config.cos_sin,
        "q_norm": config.q_norm,
        "k_norm": config.k_norm,
        "sinks": config.sinks,
    }
    attributes: dict[str, int | float | str] = {
        "layer": config.layer,
        "num_heads": config.num_heads,
        "kv_num_heads": config.kv_num_heads,
        "scale": config.scale,
        "softcap": config.softcap,
        "window": config.window,
        "norm_epsilon": config.norm_epsilon,
    }
    constants = frozenset({"cos_sin", "q_norm", "k_norm", "sinks"})
    return OneNode("PagedAttention", inputs, constants, attributes)


def two_sequences(config: AttentionConfig, dtype: CacheType = np.float16) -> tuple[Pool, AttentionBatch]:
    """Sequence a has 20 tokens behind it and one new, b is a prompt of 33; a pool of 8 blocks."""
    rng = np.random.default_rng(0)
    pool = Pool.empty(config, 8, dtype)
    pool.fill_past("a", 20, rng)
    return pool, pool.pack([("a", random_qkv(config, 1, rng)), ("b", random_qkv(config, 33, rng))])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, window=10, softcap=8.0, sinks=np.ones(4, np.float32)),
        replace(CONFIG, q_norm=np.full(32, 2, np.float32), norm_epsilon=0.5),
        replace(CONFIG, k_norm=np.full(32, 2, np.float32), layer=0),
    ],
    ids=["plain", "window, cap, sinks", "q_norm", "k_norm"],
)
def test_the_runtime_gives_the_bits_of_the_kernel_and_writes_in_place(
    config: AttentionConfig, dtype: CacheType
) -> None:
    pool, batch = two_sequences(config, dtype)
    mine = pool.cache.copy()
    expected = run_attention(config, batch, mine)
    np.testing.assert_array_equal(run(node_of(config, batch, pool.cache)), expected)
    assert pool.cache.tobytes() == mine.tobytes()


def test_scale_is_one_over_the_root_of_the_head_dim_unless_given() -> None:
    pool, batch = two_sequences(CONFIG)
    node = node_of(CONFIG, batch, pool.cache).with_attributes(scale=None)
    expected = run_attention(replace(CONFIG, scale=32**-0.5), batch, pool.cache.copy())
    np.testing.assert_array_equal(run(node), expected)


def test_no_tokens_are_no_rows() -> None:
    pool, _ = two_sequences(CONFIG)
    empty = AttentionBatch(
        qkv=np.zeros((0, 256), np.float32),
        positions=np.zeros(0, np.int64),
        cu_seqlens=np.zeros(3, np.int32),
        past_lens=np.zeros(2, np.int32),
        block_table=np.zeros((2, 0), np.int32),
        slot_mapping=np.zeros(0, np.int32),
    )
    assert run(node_of(CONFIG, empty, pool.cache)).shape == (0, 128)


def test_a_sequence_without_new_tokens_needs_no_blocks() -> None:
    pool, batch = two_sequences(CONFIG)
    expected = run_attention(CONFIG, batch, pool.cache.copy())
    width = batch.block_table.shape[1]
    idle = replace(
        batch,
        cu_seqlens=np.array([0, 0, 1, 34], np.int32),
        past_lens=np.array([10**6, *batch.past_lens], np.int32),
        block_table=np.concatenate([np.full((1, width), -5, np.int32), batch.block_table]),
    )
    np.testing.assert_array_equal(run(node_of(CONFIG, idle, pool.cache)), expected)


Change = Callable[[OneNode], OneNode]


def shaped(name: str, *shape: int) -> Change:
    """The input `name` with another shape."""

    def change(node: OneNode) -> OneNode:
        before = node.inputs[name]
        dtype = np.float32 if before is None else before.dtype
        return node.replaced(name, np.zeros(shape, dtype))

    return change


def with_value(name: str, index: int | tuple[int, int], value: int) -> Change:
    """The input `name` with another number at one place."""

    def change(node: OneNode) -> OneNode:
        before = node.inputs[name]
        assert before is not None
        after = before.copy()
        after[index] = value
        return node.replaced(name, after)

    return change


def with_attribute(name: str, value: int | float | None) -> Change:
    """Another attribute."""
    return lambda node: node.with_attributes(**{name: value})


# what is wrong, how to make it so, what the message must say
REFUSALS: list[tuple[str, Change, str]] = [
    ("qkv width", shaped("qkv", 34, 250), "qkv has 250 columns; 4 + 2 * 2 heads want a multiple of 8"),
    (
        "head dim too large",
        shaped("qkv", 34, 8 * 257),
        "qkv has 2056 columns; 4 + 2 * 2 heads want a multiple of 8, at most 256",
    ),
    ("qkv rank", shaped("qkv", 34, 8, 32), "qkv has shape [34,8,32], expected [?,?]"),
    (
        "cache rank",
        shaped("kv_cache", 3, 2, 8, 2, 16, 32),
        "kv_cache has shape [3,2,8,2,16,32], expected [?,2,?,2,512]",
    ),
    ("cache of one part", shaped("kv_cache", 3, 1, 8, 2, 512), "expected [?,2,?,2,512]"),
    ("cache heads", shaped("kv_cache", 3, 2, 8, 3, 512), "expected [?,2,?,2,512]"),
    ("cache row", shaped("kv_cache", 3, 2, 8, 2, 256), "expected [?,2,?,2,512]"),
    (
        "cache of doubles",
        lambda node: node.replaced("kv_cache", np.zeros((3, 2, 8, 2, 512))),
        "kv_cache has ONNX type 11",
    ),
    ("layer beyond the cache", with_attribute("layer", 3), "layer is 3, must be in 0..2"),
    ("negative layer", with_attribute("layer", -1), "layer is -1"),
    ("no layer", with_attribute("layer", None), "attribute layer is missing"),
    ("no heads", with_attribute("num_heads", 0), "num_heads is 0"),
    ("heads without groups", with_attribute("kv_num_heads", 3), "num_heads 4 is not a multiple of kv_num_heads 3"),
    ("negative window", with_attribute("window", -1), "window is -1"),
    ("negative cap", with_attribute("softcap", -1.5), "softcap is -1.5"),
    ("number of positions", shaped("positions", 33), "positions has shape [33], expected [34]"),
    ("number of slots", shaped("slot_mapping", 35), "slot_mapping has shape [35], expected [34]"),
    ("number of offsets", shaped("cu_seqlens", 2), "cu_seqlens has shape [2], expected [3]"),
    ("rows of the table", shaped("block_table", 3, 4), "block_table has shape [3,4], expected [2,?]"),
    ("rank of past_lens", shaped("past_lens", 2, 1), "past_lens has shape [2,1], expected [?]"),
    (
        "odd rotation",
        shaped("cos_sin", 100, 15),
        "cos_sin has 15 columns; it takes an even number, at most the head dim 32",
    ),
    ("rotation beyond the head", shaped("cos_sin", 100, 34), "cos_sin has 34 columns"),
    ("q_norm", shaped("q_norm", 31), "q_norm has shape [31], expected [32]"),
    ("k_norm", shaped("k_norm", 1), "k_norm has shape [1], expected [32]"),
    ("sinks", shaped("sinks", 2), "sinks has shape [2], expected [4]"),
    ("position beyond the table", with_value("positions", 5, 100), "positions[5] is 100, cos_sin has rows 0..99"),
    ("negative position", with_value("positions", 0, -1), "positions[0] is -1"),
    ("slot beyond the pool", with_value("slot_mapping", 33, 128), "slot_mapping[33] is 128, the pool has slots 0..127"),
    ("slot below -1", with_value("slot_mapping", 33, -2), "slot_mapping[33] is -2"),
    ("offsets start late", with_value("cu_seqlens", 0, 1), "cu_seqlens[0] is 1, must be 0"),
    ("offsets go back", with_value("cu_seqlens", 1, 40), "cu_seqlens[2] is 34, less than the 40 before it"),
    ("offsets end early", with_value("cu_seqlens", 2, 33), "cu_seqlens ends at 33, qkv has 34 tokens"),
    ("negative past", with_value("past_lens", 1, -1), "past_lens[1] is -1, must not be negative"),
    (
        "more tokens than the row holds",
        with_value("past_lens", 1, 32),
        "sequence 1 has 32 past and 33 new tokens, more than the 4 blocks",
    ),
    ("far more", with_value("past_lens", 1, 2**31 - 1), "sequence 1 has 2147483647 past and 33 new tokens"),
    ("block beyond the pool", with_value("block_table", (1, 2), 8), "block_table[1, 2] is 8, the pool has blocks 0..7"),
    ("negative block", with_value("block_table", (0, 0), -1), "block_table[0, 0] is -1"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS])
def test_what_does_not_fit_is_refused_before_anything_is_written(change: Change, message: str) -> None:
    pool, batch = two_sequences(CONFIG)
    node = change(node_of(CONFIG, batch, pool.cache))
    cache = node.inputs["kv_cache"]
    assert cache is not None
    before = cache.tobytes()
    assert message in failure(node)
    assert cache.tobytes() == before


def test_blocks_behind_the_window_and_beyond_the_sequence_may_hold_any_id() -> None:
    config = replace(CONFIG, window=4)
    pool, batch = two_sequences(config)
    expected = run_attention(config, batch, pool.cache.copy())
    stray = batch.block_table.copy()
    stray[0, 0], stray[0, 2:], stray[1, 3:] = -1, 10**9, -(10**9)  # token 20 of a sees 17..20
    strayed = replace(batch, block_table=stray)
    np.testing.assert_array_equal(run(node_of(config, strayed, pool.cache)), expected)
