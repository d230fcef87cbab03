"""Which steps fit what is left of a run."""

from __future__ import annotations

import pytest

from bench.gpu.budget import COSTS, MARGIN, fits, needed_s


def test_steps_add_up_and_grow_with_the_weights() -> None:
    expected = MARGIN * (COSTS["make"].fixed_s + COSTS["engine"].fixed_s + 2 * COSTS["make"].per_gb_s)
    assert needed_s(("make", "engine"), 2_000_000_000) == pytest.approx(
        expected + MARGIN * 2 * COSTS["engine"].per_gb_s
    )
    assert needed_s((), 1) == 0


@pytest.mark.parametrize(
    ("weight_bytes", "steps", "took_s"),
    [
        (2_471_628_800, ("make",), 3.6),
        (2_471_628_800, ("import",), 9.7),
        (2_471_628_800, ("engine",), 6.9),
        (16_060_522_496, ("make", "import", "engine"), 90.9),
    ],
)
def test_estimates_cover_what_the_steps_took_on_an_h200(
    weight_bytes: int, steps: tuple[str, ...], took_s: float
) -> None:
    assert took_s <= needed_s(steps, weight_bytes) <= 1.4 * took_s


def test_a_pass_fits_only_with_a_margin() -> None:
    assert fits(1.0, 2, 2 * MARGIN)
    assert not fits(1.0, 2, 2 * MARGIN - 0.01)
    assert fits(0.0, 1, 0.0)
