"""What the peer is asked and how its passes are counted."""

from __future__ import annotations

import pytest

from bench.gpu.peer_terms import CONFIGURATIONS, Values, accepted, batching_settings, ratio, speed, timed


def test_a_sized_cache_holds_every_request_twice() -> None:
    sized = batching_settings("sized", count=128, tokens=257)
    assert sized["num_blocks"] * sized["block_size"] == 2 * 128 * 512
    assert sized["max_requests_per_batch"] == 128
    assert batching_settings("graphs", 128, 257) | {"use_cuda_graph": False} == sized | {
        "use_async_batching": False,
        "kv_padding_interval_size": 4096,
    }


def test_no_configuration_shares_prompts_and_an_unknown_one_is_refused() -> None:
    for name in CONFIGURATIONS:
        if name != "static":  # has no blocks to share
            assert batching_settings(name, 8, 256)["allow_block_sharing"] is False
    with pytest.raises(ValueError, match="unknown configuration 'fast'"):
        batching_settings("fast", 8, 256)


def test_settings_another_version_does_not_know_are_left_out_and_named() -> None:
    assert accepted({"a": 1, "b": 2, "c": 3}, ["b", "d"]) == ({"b": 2}, ["a", "c"])


def test_timestamps_end_the_clock_and_split_prefill_from_decode() -> None:
    stamps = [[101.0, 101.5, 103.0], [102.0, 102.5, 104.0]]
    found = timed(100.0, 9.0, [3, 3], stamps, 2, 3)
    assert found == {
        "call_s": 9.0,
        "last_first_token_ms": 2000.0,
        "decode_step_ms": 1000.0,
        "elapsed_s": 4.0,
        "generated_tokens_per_s": 1.5,
    }


def test_without_timestamps_the_call_is_the_time() -> None:
    assert timed(100.0, 2.0, [3, 3], [None, None], 2, 3)["generated_tokens_per_s"] == 3.0
    assert "decode_step_ms" not in timed(100.0, 2.0, [3, 3], [[101.0], []], 2, 3)


@pytest.mark.parametrize("lengths", [[3], [3, 2], [3, 3, 3]])
def test_missing_or_short_answers_are_no_figure(lengths: list[int]) -> None:
    with pytest.raises(RuntimeError, match="expected 2 of 3"):
        timed(0.0, 1.0, lengths, [None], 2, 3)


def test_the_ratio_is_to_the_fastest_and_only_at_its_own_concurrency() -> None:
    def figures(*speeds: float) -> Values:
        return {"passes": [{"generated_tokens_per_s": each} for each in speeds]}

    found: dict[str, Values] = {"graphs": figures(100.0, 300.0), "static": figures(250.0), "sized": {"error": "x"}}
    assert speed(found["graphs"]) == 200.0
    assert speed(found["sized"]) == 0.0
    engine = [{"concurrency": count, "generated_tokens_per_s": [1000.0 * count]} for count in (1, 2)]
    assert ratio(found, {"engine": engine}, 2) == {"best": "static", "times_as_fast": 8.0}
    assert ratio(found, {"engine": engine}, 3) == {"best": "static"}
    assert ratio(found, {"engine": {"error": "x"}}, 2) == {"best": "static"}
