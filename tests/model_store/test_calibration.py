"""Ranges: counts are exact, thresholds are sensible, text is read within bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from bench.random_model import SHAPES, write_checkpoint
from model_store.calibration import BINS, Calibration, Histogram, calibrate, kl_threshold
from model_store.calibration_text import MOST_SEQUENCES, SEQUENCE_TOKENS, read_calibration
from model_store.checkpoint import open_checkpoint
from model_store.importing import import_model
from model_store.store import Store
from model_store.targets import TARGETS
from tests.model_store.checkpoints import CASES
from tests.model_store.cuda_session import open_cuda_session, quiet
from wire.errors import BadRequest

VALUES = arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))


def histogram(*parts: NDArray[np.float32]) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms())
def test_the_order_of_values_does_not_matter(parts: list[NDArray[np.float32]], random: object) -> None:
    forwards, backwards = histogram(*parts), histogram(*parts[::-1])
    at_once = histogram(np.concatenate(parts))
    assert forwards.top == backwards.top == at_once.top
    np.testing.assert_array_equal(forwards.counts, backwards.counts)
    np.testing.assert_array_equal(forwards.counts, at_once.counts)


@given(VALUES)
def test_every_value_but_zeros_is_counted_in_its_bin(values: NDArray[np.float32]) -> None:
    made = histogram(values)
    magnitudes = np.abs(values[values != 0])
    assert made.counts.sum() == len(magnitudes)
    if len(magnitudes):
        assert made.top > magnitudes.max() >= made.top / 2


@settings(max_examples=10, deadline=None)
@given(st.integers(-12, 12), st.integers(0, 1000))
def test_a_threshold_scales_with_its_values(power: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(4000).astype(np.float32)
    scaled = kl_threshold(histogram(values * np.float32(2.0**power)))
    assert scaled == kl_threshold(histogram(values)) * 2.0**power


def test_a_bell_is_cut_in_its_tails() -> None:
    values = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    assert 2.5 < kl_threshold(histogram(values)) < 5.0


def test_an_outlier_is_clipped_and_an_even_spread_is_not() -> None:
    random = np.random.default_rng(1)
    bell = random.standard_normal(200_000).astype(np.float32)
    assert kl_threshold(histogram(bell, np.array([1000.0], np.float32))) < 200
    spread = random.uniform(-1, 1, 200_000).astype(np.float32)
    assert kl_threshold(histogram(spread)) > 0.97


def test_few_levels_are_kept_as_they_are_and_nothing_has_no_threshold() -> None:
    values = np.array([1.0, 2.0, 3.0], np.float32)
    assert kl_threshold(histogram(values)) >= 3.0
    assert kl_threshold(histogram(np.zeros(9, np.float32))) == 0.0
    assert BINS % 2 == 0


def test_a_calibration_knows_every_layers_inputs_and_its_keys_and_values(tmp_path: Path) -> None:
    spec = write_checkpoint(tmp_path, SHAPES["tiny"])
    ids = np.arange(40, dtype=np.int64)
    with open_checkpoint(tmp_path) as checkpoint:
        calibration = calibrate(checkpoint, [ids])
    for layer in range(spec.num_layers):
        for name in ("qkv", "output", "gate_up", "down"):
            assert 0 < calibration.threshold(f"layers.{layer}.{name}") <= 2 * calibration.peak(f"layers.{layer}.{name}")
        for name in ("k", "v"):
            assert calibration.channel_peaks(f"layers.{layer}.{name}").shape == (spec.kv_size,)
    with pytest.raises(KeyError):
        Calibration().threshold("layers.0.qkv")


def test_text_becomes_sequences_within_bounds(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SHAPES["tiny"])
    text = tmp_path / "text.txt"
    text.write_text("The mill turns as long as the race runs. " * 400)
    sequences = read_calibration(text, tmp_path / "source", max_model_len=512)
    assert len(sequences) == MOST_SEQUENCES
    assert {len(sequence) for sequence in sequences} == {SEQUENCE_TOKENS}
    assert {len(s) for s in read_calibration(text, tmp_path / "source", max_model_len=100)} == {100}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"short", "5 tokens; at least 64"), (b"\xff\xfe" * 90, "not UTF-8"), (b"x" * (4 << 20) + b"y", "more than")],
)
def test_unusable_text_is_refused_with_the_reason(tmp_path: Path, content: bytes, words: str) -> None:
    write_checkpoint(tmp_path / "source", SHAPES["tiny"])
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(BadRequest, match=words):
        read_calibration(tmp_path / "text.txt", tmp_path / "source", 512)
    with pytest.raises(BadRequest, match="cannot read"):
        read_calibration(tmp_path / "nothing.txt", tmp_path / "source", 512)


@pytest.mark.parametrize(
    ("target", "scheme"),
    [
        (target, scheme)
        for target, choices in TARGETS.items()
        for scheme, choice in choices.items()
        if choice.scheme.needs_calibration
    ],
)
def test_a_scheme_that_measures_ranges_is_refused_without_text(tmp_path: Path, target: str, scheme: str) -> None:
    CASES["llama"].write(tmp_path / "source")
    with pytest.raises(BadRequest, match="give calibration text") as caught:
        import_model(
            tmp_path / "source",
            Store(tmp_path / "store"),
            "pond",
            scheme=scheme,
            target=target,
            candidate_factory=open_cuda_session,
            progress=quiet,
        )
    assert caught.value.param == "calibration"
    assert Store(tmp_path / "store").list() == []
