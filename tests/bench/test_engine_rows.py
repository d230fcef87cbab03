"""From passes to a row of the table: rates, spreads and shares of limits."""

from __future__ import annotations

import pytest

from bench.gpu.engine import kv_bytes, run_engine, spread, summary
from bench.gpu.limits import DeviceLimits
from model_store.manifest import WEIGHTS_FILE
from services.bench import Pass, Workload
from services.loading import StoredModel, open_backend
from services.settings import Settings

LIMITS = DeviceLimits(1e9, 1e9, 1e12, "bf16 matrix product")
WORKLOAD = Workload(prompt_tokens=100, new_tokens=11, concurrency=(4,))


def _pass(elapsed_s: float, first_token_s: float) -> Pass:
    return Pass(elapsed_s, first_token_s, 11, {"forward": 0.011})


def test_a_row_has_medians_with_the_smallest_and_largest(shipped: StoredModel) -> None:
    passes = [_pass(3.0, 1.0), _pass(2.0, 1.0), _pass(2.5, 0.5)]
    row = summary(4, passes, shipped.manifest, WORKLOAD, LIMITS)
    assert row["rounds"] == 3
    assert row["decode_step_ms"] == [200.0, 100.0, 200.0]
    assert row["decode_tokens_per_s"] == [20.0, 20.0, 40.0]
    assert row["generated_tokens_per_s"] == [17.6, 14.7, 22.0]
    assert row["total_tokens_per_s"] == [177.6, 148.0, 222.0]
    assert row["prefill_tokens_per_s"] == [400.0, 400.0, 800.0]
    assert row["last_first_token_ms"] == [1000.0, 500.0, 1000.0]
    assert row["step_split_us"] == {"forward": 1000.0}


def test_shares_are_the_least_time_over_the_time_taken(shipped: StoredModel) -> None:
    manifest = shipped.manifest
    row = summary(4, [_pass(2.0, 1.0)], manifest, WORKLOAD, LIMITS)
    weights = manifest.files[WEIGHTS_FILE].size_bytes
    # 10 decode steps in one second: each may take weights / 1e9 B/s at best.
    assert row["decode_share_of_memory_limit"] == pytest.approx(weights / 1e9 / 0.1, abs=6e-4)
    # Half way through the answers a sequence has 105.5 tokens; a token's keys and values go through every layer.
    geometry, cache = manifest.geometry, manifest.kv_cache
    token_bytes = 2 * geometry.num_layers * cache.block_bytes / cache.block_size
    assert kv_bytes(4, manifest, WORKLOAD) == pytest.approx(4 * 105.5 * token_bytes)
    with_kv = (weights + kv_bytes(4, manifest, WORKLOAD)) / 1e9 / 0.1
    assert row["decode_share_of_memory_limit_with_kv"] == pytest.approx(with_kv, abs=6e-4)
    arithmetic = 2 * manifest.num_parameters * 400 / 1e12
    assert row["prefill_share_of_arithmetic_limit"] == pytest.approx(arithmetic, abs=6e-4)


def test_one_new_token_is_prefill_and_leaves_no_decode_figures(shipped: StoredModel) -> None:
    row = summary(4, [_pass(1.0, 1.0)], shipped.manifest, Workload(100, 1, (4,)), LIMITS)
    assert row["prefill_tokens_per_s"] == [400.0, 400.0, 400.0]
    assert not [key for key in row if key.startswith("decode")]


def test_a_spread_keeps_the_order_median_smallest_largest() -> None:
    assert spread([3.04, 1.0, 2.0], 1) == [2.0, 1.0, 3.0]


def test_when_the_budget_ends_the_larger_concurrencies_are_left_out_with_a_note(
    shipped_settings: Settings, shipped: StoredModel
) -> None:
    notes: list[str] = []
    # Two short passes and one measured one begin with time left; the next would not.
    left = iter([60.0, 60.0, 60.0])
    backend = open_backend(shipped_settings, shipped)
    try:
        rows = run_engine(
            backend,
            shipped.manifest,
            Workload(8, 4, (2, 1), rounds=2),
            LIMITS,
            left_s=lambda: next(left, 0.0),
            note=notes.append,
        )
    finally:
        backend.close()
    assert [(row["concurrency"], row["rounds"]) for row in rows] == [(1, 1)]
    assert len(notes) == 2
    assert "before concurrency 2" in notes[0]
    assert "before concurrency 1" in notes[1]
