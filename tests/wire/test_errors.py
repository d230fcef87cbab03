"""The error tree: every class says its code, its status and whether to try again, and its code leads back to it."""

from __future__ import annotations

import re

import pytest

from wire import errors
from wire.errors import Internal, MillraceError, error_from_code

CLASSES = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, MillraceError) and each is not MillraceError
]
# The tree as drawn at the top of wire/errors.py: name, status.
DRAWN = {name: int(status) for name, status in re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or "")}
RETRYABLE = {"QueueFull", "Unavailable", "WorkerLost"}


def test_codes_are_unique_and_fit_a_failed_event() -> None:
    codes = [each.code for each in CLASSES]
    assert len(set(codes)) == len(codes) == len(DRAWN)
    assert all(re.fullmatch(r"[a-z_]{1,64}", code) for code in codes)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_each_class_is_what_the_drawing_says_and_states_itself(error: type[MillraceError]) -> None:
    assert error.http_status == DRAWN[error.__name__]
    assert error.retryable == (error.__name__ in RETRYABLE)
    assert error.__doc__
    assert "code" in vars(error), "a class without a code of its own would be mistaken for its parent"


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_a_code_leads_back_to_its_class(error: type[MillraceError]) -> None:
    assert error_from_code(error.code) is error
    raised = error_from_code(error.code)("words", param="field", retry_after_s=1.5)
    assert (raised.message, str(raised), raised.param, raised.retry_after_s) == ("words", "words", "field", 1.5)


def test_an_unknown_code_is_an_internal_error() -> None:
    assert error_from_code("a_code_of_next_year") is Internal


def test_classes_of_other_packages_do_not_change_what_a_code_means() -> None:
    class Careless(errors.BadRequest):
        """Inherits its parent's code."""

    assert error_from_code("bad_request") is errors.BadRequest
    assert Careless.code == "bad_request"
