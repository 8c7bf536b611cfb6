import pytest

from ensemble.core.log import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0 s"), (0.4, "0 s"), (40, "40 s"), (59.4, "59 s"), (59.6, "1 min"), (89, "1 min"), (170, "3 min"),
        (3569, "59 min"), (3571, "1 h"), (4800, "1 h 20 min"), (7200, "2 h"), (86369, "23 h 59 min"),
        (86371, "1 d"), (97200, "1 d 3 h"),
    ],
)  # fmt: skip
def test_durations_read_as_one_would_say_them(seconds, text):
    assert format_duration(seconds) == text
