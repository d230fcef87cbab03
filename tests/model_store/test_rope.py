"""The rotation table: exact at every position, and scaled the way each method says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from model_store.config import Config
from model_store.rope import Rope, read_rope

LONG = 100_000


def rope(**scaling: object) -> Rope:
    return read_rope(Config({"rope_theta": 10_000.0, "rope_scaling": scaling or None}), 16, LONG)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    table = rope().table()
    frequency = 10_000.0 ** (-2 / 16)  # of pair 1
    assert table.shape == (LONG, 16)
    for position in (0, 1, 4095, 4096, LONG - 1):
        assert table[position, 1] == np.float32(math.cos(position * frequency))
        assert table[position, 9] == np.float32(math.sin(position * frequency))


def test_linear_scaling_divides_every_frequency() -> None:
    np.testing.assert_allclose(rope(type="linear", factor=4.0).frequencies, np.array(rope().frequencies) / 4)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_pairs_are_kept_and_slow_pairs_are_stretched(kind: str) -> None:
    scaling: dict[str, object] = {"rope_type": kind, "factor": 8.0, "original_max_position_embeddings": 1024}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    ratio = np.array(rope().frequencies) / np.array(rope(**scaling).frequencies)
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(8)
    assert (np.diff(ratio) >= -1e-9).all()


def test_yarn_multiplies_cosines_and_sines_by_its_attention_factor() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope(**scaling).table()[0, 0] == np.float32(0.1 * math.log(4.0) + 1.0)
    assert rope(**scaling, attention_factor=1.25).table()[0, 0] == np.float32(1.25)
    assert rope(**scaling, mscale=2.0, mscale_all_dim=2.0).table()[0, 0] == 1.0
