import pytest

from ensemble.labels import resolve_polarity


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["ai", "real"], ("real", "ai")),
        (["real", "ai", "ai"], ("real", "ai")),
        (["Fake", "REAL"], ("REAL", "Fake")),
        (["human", "artificial"], ("human", "artificial")),
        (["natural", "synthetic"], ("natural", "synthetic")),
        (["photo", "generated"], ("photo", "generated")),
    ],
)
def test_known_names_speak_for_themselves(names, expected):
    assert resolve_polarity(names) == expected
    assert resolve_polarity(names[::-1]) == expected


@pytest.mark.parametrize(
    "names", [["cats", "dogs"], ["ai", "midjourney"], ["real", "photo"], ["ai", "fake"], ["0", "1"]]
)
def test_ambiguous_names_need_positive(names):
    with pytest.raises(ValueError, match=r"cannot tell which of .* name it with --positive"):
        resolve_polarity(names)
    assert resolve_polarity(names, positive=names[0].upper()) == (names[1], names[0])


def test_positive_overrules_the_names():
    assert resolve_polarity(["ai", "real"], positive="real") == ("ai", "real")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "found 0: none"),
        (["ai", "ai"], "found 1: ai"),
        (["ai", "real", "other"], "found 3: ai, other, real"),
    ],
)
def test_other_than_two_classes_are_refused(names, message):
    with pytest.raises(ValueError, match=f"two classes are needed, {message}"):
        resolve_polarity(names, positive="ai")


def test_unknown_positive_is_refused_with_the_classes():
    with pytest.raises(ValueError, match="no class is called 'cat'; the classes are ai, real"):
        resolve_polarity(["ai", "real"], positive="cat")


def test_positive_that_two_classes_share_is_refused():
    with pytest.raises(ValueError, match="no class is called 'AI'"):
        resolve_polarity(["ai", "Ai"], positive="AI")
