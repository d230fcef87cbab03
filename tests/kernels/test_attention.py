"""PagedAttention: what it computes, and that nothing else decides a row's bits. Without a runtime, in every form."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kernels.loader import isa_available
from tests.kernels.attention_case import TASK, Pool, cos_sin_table, form, parallel, random_qkv, run_attention
from tests.kernels.reference import (
    AttentionBatch,
    AttentionConfig,
    Cache,
    CacheType,
    Floats,
    attention,
    keys_of,
    split_heads,
    values_of,
)

FORMS = isa_available()
DTYPES = (np.float16, np.float32)
HEADS = AttentionConfig(num_heads=9, kv_num_heads=3, head_dim=64, cos_sin=cos_sin_table(4096, 64))


@st.composite
def configs(draw: st.DrawFn) -> AttentionConfig:
    """Shapes and attributes of a layer."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13]))
    dim = draw(st.sampled_from([8, 16, 20, 32, 48, 64, 80, 96, 112, 128, 256]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rotary_dim = draw(st.sampled_from([dim, dim // 4 * 2, 0]))

    def norm() -> Floats | None:
        return rng.uniform(0.5, 1.5, dim).astype(np.float32) if draw(st.booleans()) else None

    return AttentionConfig(
        num_heads=kv_heads * group,
        kv_num_heads=kv_heads,
        head_dim=dim,
        cos_sin=cos_sin_table(512, rotary_dim),
        scale=draw(st.sampled_from([dim**-0.5, 0.3])),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        window=draw(st.sampled_from([0, 1, 7, 16, 40])),
        layer=draw(st.integers(0, 1)),
        q_norm=norm(),
        k_norm=norm(),
        sinks=rng.standard_normal(kv_heads * group).astype(np.float32) if draw(st.booleans()) else None,
    )


def assert_near_reference(config: AttentionConfig, batch: AttentionBatch, cache: Cache, out: Floats) -> None:
    """Outputs are sums of values with weights that add up to 1, so the largest value seen is the scale of an error."""
    expected = attention(config, batch, cache)
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * scale)


def assert_written(config: AttentionConfig, batch: AttentionBatch, cache: Cache) -> None:
    """Keys and values lie in their slots: rounded once to the cache's type, zero in the padding."""
    _, k, v = split_heads(config, batch)
    where = batch.slot_mapping // 16, slice(None), batch.slot_mapping % 16
    for written, exact in ((keys_of(config, cache)[where], k), (values_of(config, cache)[where], v)):
        clipped = np.clip(exact, -65504, 65504) if cache.dtype == np.float16 else exact
        half_step = np.spacing(np.abs(clipped).astype(cache.dtype)).astype(np.float64) / 2
        error = np.abs(written[..., : config.head_dim].astype(np.float64) - clipped)
        assert (error <= half_step + 1e-6 * np.maximum(1, np.abs(clipped))).all()
        assert not written[..., config.head_dim :].any()


@pytest.mark.parametrize("name", FORMS)
@given(config=configs(), seed=st.integers(0, 2**32), half=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_step_of_any_shape_is_what_the_definition_says(
    name: str, config: AttentionConfig, seed: int, half: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 70)), min_size=1, max_size=4))
    assume(any(new for _, new in lengths))
    pool = Pool.empty(config, 64, np.float16 if half else np.float32, seed, threads=data.draw(st.sampled_from([1, 3])))
    for index, (past, _) in enumerate(lengths):
        pool.fill_past(str(index), past, rng)
    batch = pool.pack([(str(index), random_qkv(config, new, rng)) for index, (_, new) in enumerate(lengths)])
    with form(name):
        out = run_attention(config, batch, pool.cache, pool.threads)
    assert_written(config, batch, pool.cache)
    assert_near_reference(config, batch, pool.cache, out)


@given(
    config=configs(), seed=st.integers(0, 2**32), half=st.booleans(), past=st.integers(0, 80), new=st.integers(1, 70)
)
@settings(max_examples=60, deadline=None)
def test_every_form_gives_the_same_bits(config: AttentionConfig, seed: int, half: bool, past: int, new: int) -> None:
    results = []
    for name in FORMS:
        rng = np.random.default_rng(seed)
        pool = Pool.empty(config, 12, np.float16 if half else np.float32)
        pool.fill_past("a", past, rng)
        with form(name):
            out = pool.step([("a", random_qkv(config, new, rng))])["a"]
        results.append((out.tobytes(), pool.cache.tobytes()))
    assert len(set(results)) == 1


def rows_in_chunks(config: AttentionConfig, dtype: CacheType, tokens: Floats, chunk: int) -> Floats:
    """A sequence alone in a fresh pool, `chunk` tokens a step."""
    pool = Pool.empty(config, 40, dtype, seed=chunk)
    steps = [pool.step([("a", tokens[at : at + chunk])])["a"] for at in range(0, len(tokens), chunk)]
    return np.concatenate(steps)


VARIANTS = {
    "plain": HEADS,
    "windowed": replace(HEADS, window=24),
    "capped, normed, with sinks": replace(
        HEADS,
        softcap=20.0,
        q_norm=np.full(64, 1.5, np.float32),
        k_norm=np.full(64, 0.5, np.float32),
        sinks=np.linspace(-1, 1, 9, dtype=np.float32),
    ),
    "one head a group": replace(HEADS, num_heads=3),
    "eight heads a group, wide": AttentionConfig(16, 2, 128, cos_sin_table(512, 64)),
    "odd": AttentionConfig(7, 1, 80, cos_sin_table(512, 20)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_how_its_prompt_was_cut(variant: str, dtype: CacheType) -> None:
    config = VARIANTS[variant]
    tokens = random_qkv(config, 333, np.random.default_rng(1))
    whole = rows_in_chunks(config, dtype, tokens, len(tokens))
    for chunk in (1, 7, 16, 100):
        np.testing.assert_array_equal(rows_in_chunks(config, dtype, tokens, chunk), whole)


@pytest.mark.parametrize("name", FORMS)
@given(
    seed=st.integers(0, 2**32),
    order=st.permutations(["a", "b", "c", "d"]),
    threads=st.integers(1, 3),
    variant=st.sampled_from(sorted(VARIANTS)),
)
@settings(max_examples=10, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours_threads_or_blocks(
    name: str, seed: int, order: list[str], threads: int, variant: str
) -> None:
    config, rng = VARIANTS[variant], np.random.default_rng(seed)
    stories = {who: random_qkv(config, int(rng.integers(2, 120)), rng) for who in order}
    together = Pool.empty(config, 64, np.float16, seed, threads=threads)
    with form(name):
        firsts = together.step([(who, stories[who][:-1]) for who in order])
        lasts = together.step([(who, stories[who][-1:]) for who in reversed(order)])
        for who, tokens in stories.items():
            alone = Pool.empty(config, 16, np.float16, seed + 1)
            expected = alone.step([(who, tokens)])[who]
            np.testing.assert_array_equal(np.concatenate([firsts[who], lasts[who]]), expected)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_a_row_does_not_see_cannot_reach_it(name: str, bad: float) -> None:
    """Token 40 of 90 is NaN in query, key and value: those before it never know, those 24 later have left it behind."""
    config = replace(HEADS, window=24)
    tokens = random_qkv(config, 90, np.random.default_rng(2))
    poisoned = tokens.copy()
    poisoned[40] = bad
    with form(name):
        clean = Pool.empty(config, 8, np.float16).step([("a", tokens)])["a"]
        dirty = Pool.empty(config, 8, np.float16).step([("a", poisoned)])["a"]
    affected = np.arange(40, 40 + 24)
    np.testing.assert_array_equal(np.delete(dirty, affected, axis=0), np.delete(clean, affected, axis=0))
    assert np.isnan(dirty[affected]).any(axis=1).all() or bad == np.inf


def test_blocks_that_the_window_left_behind_are_not_looked_up() -> None:
    config = replace(HEADS, window=20)
    tokens = random_qkv(config, 100, np.random.default_rng(3))
    whole = Pool.empty(config, 8, np.float16).step([("a", tokens)])["a"]
    pool = Pool.empty(config, 8, np.float16)
    pool.step([("a", tokens[:70])])
    for given_back in range(3):  # token 70 sees 51..70: blocks 3 and 4
        keys_of(config, pool.cache)[pool.tables["a"][given_back]] = np.nan
        pool.tables["a"][given_back] = -(2**31)
    np.testing.assert_array_equal(pool.step([("a", tokens[70:])])["a"], whole[70:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_without_a_slot_reads_the_cache_and_leaves_it_alone(dtype: CacheType) -> None:
    tokens = random_qkv(HEADS, 50, np.random.default_rng(4))
    pool = Pool.empty(HEADS, 8, dtype)
    written = pool.step([("a", tokens)])["a"]
    before = pool.cache.tobytes()
    pool.lengths["a"] = 49
    again = pool.pack([("a", tokens[49:])])
    again = replace(again, slot_mapping=np.array([-1], np.int32))
    np.testing.assert_array_equal(run_attention(HEADS, again, pool.cache), written[49:])
    assert pool.cache.tobytes() == before


@pytest.mark.parametrize("name", FORMS)
def test_only_the_slots_of_the_tokens_and_only_the_own_layer_are_written(name: str) -> None:
    config = replace(HEADS, layer=1)
    pool = Pool.empty(config, 8, np.float16)
    pool.cache[:] = 7
    pool.lengths["a"], pool.tables["a"] = 5, [3]
    with form(name):
        pool.step([("a", random_qkv(config, 30, np.random.default_rng(5)))])
    assert (pool.cache[[0, 2]] == 7).all()
    slots = np.arange(5, 35)
    blocks = np.array(pool.tables["a"])[slots // 16]
    for part in (keys_of(config, pool.cache), values_of(config, pool.cache)):
        untouched = np.ones((8, 16), bool)
        untouched[blocks, slots % 16] = False
        assert (part.swapaxes(1, 2)[untouched] == 7).all()
        assert not (part.swapaxes(1, 2)[~untouched] == 7).any()


@pytest.mark.parametrize("name", FORMS)
def test_half_precision_stores_round_to_even_and_saturate(name: str) -> None:
    config = AttentionConfig(1, 1, 16, cos_sin_table(4, 0))
    large = [65504, 65519.9, 65520, 1e6, -1e6, np.inf, -np.inf, 2049, 2051]
    edges = [*large, 6e-8, 2.9e-8, 3.1e-8, -0.0, 1e-10, 6.1e-5, 0.1]
    qkv = np.zeros((1, 48), np.float32)
    qkv[0, 16:32] = qkv[0, 32:] = edges
    pool = Pool.empty(config, 1, np.float16)
    with form(name):
        pool.step([("a", qkv)])
    expected = np.clip(qkv[0, 16:32], -65504, 65504).astype(np.float16)
    for part in (keys_of(config, pool.cache), values_of(config, pool.cache)):
        assert part[0, 0, 0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("num_new", [1, 20])
def test_a_hundred_thousand_tokens_of_context_work(num_new: int) -> None:
    config = AttentionConfig(4, 2, 8, cos_sin_table(2**17, 8), scale=0.5)
    rng = np.random.default_rng(6)
    pool = Pool.empty(config, 2**13, np.float16, threads=2)
    pool.fill_past("a", 2**17 - num_new, rng)
    batch = pool.pack([("a", random_qkv(config, num_new, rng))])
    out = run_attention(config, batch, pool.cache, threads=2)
    expected = attention(config, batch, pool.cache)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_the_parallel_loop_of_these_tests_really_runs_on_several_threads() -> None:
    """Guard: the independence of threads above means nothing if one thread did it all."""
    idents: dict[int, int] = {}
    barrier = threading.Barrier(3, timeout=10)

    def task(_: int, index: int) -> None:
        barrier.wait()
        idents[index] = threading.get_ident()

    parallel(3).run(None, TASK(task), 3, None)
    assert set(idents) == {0, 1, 2}
    assert len(set(idents.values())) == 3
