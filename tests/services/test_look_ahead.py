"""When to guess: right guesses go on, wrong ones cost ever longer pauses, and are forgiven in the end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.backends.look_ahead import FIRST_PAUSE, FORGIVEN_AFTER, LONGEST_PAUSE, Patience


def pause(patience: Patience) -> int:
    """Steps until a guess is allowed; the allowing question is counted as asked."""
    steps = 0
    while not patience.allows():
        steps += 1
    return steps


def test_right_guesses_never_wait() -> None:
    patience = Patience()
    for _ in range(1000):
        assert patience.allows()
        patience.note(was_right=True)


def test_each_wrong_guess_waits_twice_as_long_up_to_a_limit() -> None:
    patience = Patience()
    pauses = []
    for _ in range(8):
        patience.note(was_right=False)
        pauses.append(pause(patience))
    assert pauses[:4] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE, 8 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_a_run_of_right_guesses_is_forgiving() -> None:
    patience = Patience()
    for _ in range(3):
        patience.note(was_right=False)
    for _ in range(2 * FORGIVEN_AFTER):
        patience.note(was_right=True)
    patience.note(was_right=False)
    assert pause(patience) == 2 * FIRST_PAUSE  # 8 halved twice


@given(st.lists(st.booleans(), max_size=400))
def test_wrong_guesses_are_rare_among_steps_when_all_are_wrong_and_pauses_are_bounded(outcomes: list[bool]) -> None:
    patience = Patience()
    for was_right in outcomes:
        assert pause(patience) <= LONGEST_PAUSE
        patience.note(was_right=was_right)
