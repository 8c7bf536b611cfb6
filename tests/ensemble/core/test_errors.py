"""Tests of ensemble.core.errors: errors of libraries as one line."""

import pytest

from ensemble.core.errors import error_line, join_limited


@pytest.mark.parametrize(
    ("error", "whole", "first"),
    [
        (ValueError("\n a  b\n\nc.\n"), "a b c", "a b"),
        (ValueError("name\x1b[2J"), r"name\x1b[2J", r"name\x1b[2J"),
        (ValueError("x" * 400), "x" * 300, "x" * 400),
        (KeyError(), "KeyError", "KeyError"),
        ("  \n", "no reason given", "no reason given"),
    ],
)
def test_an_error_is_one_line(error, whole, first):
    assert error_line(error) == whole
    assert error_line(error, first=True) == first


def test_many_things_are_counted_after_the_first_few():
    assert join_limited(range(3)) == "0, 1, 2"
    assert join_limited(["a\nb", *"cde"], limit=2) == r"a\nb, c and 2 more"
