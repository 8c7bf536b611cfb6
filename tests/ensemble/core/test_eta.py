import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.core import eta


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (40, "40 s"), (59.4, "59 s"), (59.6, "1 min"), (89, "1 min"), (170, "3 min"),
        (3569, "59 min"), (3571, "1 h"), (4800, "1 h 20 min"), (7200, "2 h"), (86369, "23 h 59 min"),
        (86371, "1 d"), (97200, "1 d 3 h"),
    ],
)  # fmt: skip
def test_durations_read_as_one_would_say_them(seconds, text):
    assert eta.duration(seconds) == text


def test_there_is_no_pace_before_the_first_step():
    assert eta.pace(0, 5.0) is None
    assert eta.pace(4, 10.0) == 2.5


def test_a_member_takes_the_rest_of_its_part_and_the_parts_to_come():
    # Two folds of 40 % each and a refit of 20 %: at step 30 of the first fold's 100, 1 s a step.
    assert eta.member_left(1.0, 30, 100, share=0.4, before=0.0) == pytest.approx(70 + 150)
    assert eta.member_left(1.0, 30, 100, share=0.4, before=0.4) == pytest.approx(70 + 50)
    assert eta.member_left(1.0, 50, 50, share=0.2, before=0.8) == pytest.approx(0, abs=1e-9)


@given(
    pace=st.floats(0.001, 100),
    steps=st.integers(1, 10000),
    share=st.floats(0.01, 1),
    before=st.floats(0, 1),
    data=st.data(),
)
def test_time_left_falls_to_what_later_parts_take(pace, steps, share, before, data):
    step = data.draw(st.integers(0, steps))
    left = [eta.member_left(pace, now, steps, share, before) for now in (step, steps)]
    assert left[0] - left[1] == pytest.approx(pace * (steps - step), rel=1e-6, abs=1e-6)
    assert left[1] >= 0


def test_a_member_that_nothing_is_known_of_counts_as_the_mean():
    assert eta.run_left([100.0], [None, 60.0], known=[200.0, 60.0]) == 100 + 130 + 60
    assert eta.run_left([None], [], known=[50.0]) == 50
    assert eta.run_left([], [], known=[]) == 0


def test_members_side_by_side_share_what_waits():
    assert eta.run_left([100.0, 20.0], [60.0, 60.0], known=[]) == 120
    assert eta.run_left([100.0, 20.0], [], known=[]) == 100, "the longest"


def test_nothing_is_said_while_nothing_is_known():
    assert eta.run_left([100.0], [None], known=[]) is None
    assert eta.run_left([None], [60.0], known=[]) is None
