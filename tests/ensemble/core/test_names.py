import pytest

from ensemble.core.names import class_labels, parse_classes, resolve_polarity


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


# ---- several names, one class, names of other languages


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fake=ai,human=real", {"fake": "ai", "human": "real"}),
        (" gan = AI , sd=ai,Foto=Real,", {"gan": "ai", "sd": "ai", "foto": "real"}),
        ("生成=ai,写真=real", {"生成": "ai", "写真": "real"}),
        ("a=b=ai", {"a=b": "ai"}),
        ("x=ai,X=ai", {"x": "ai"}),
        ("", {}),
    ],
)
def test_classes_are_parsed(text, expected):
    assert parse_classes(text) == expected


@pytest.mark.parametrize("text", ["fake", "fake=", "=ai", "fake=1", "ai,real", "a=ai,b"])
def test_other_texts_are_no_classes(text):
    with pytest.raises(ValueError, match="write NAME=ai or NAME=real, separated by commas"):
        parse_classes(text)


@pytest.mark.parametrize("text", ["x=ai,x=real", "x=ai,X=real", "\u00e9=ai,e\u0301=real"])
def test_a_name_cannot_mean_both(text):
    with pytest.raises(ValueError, match="is given as both ai and real"):
        parse_classes(text)


def test_several_names_may_mean_one_class():
    classes = parse_classes("gan=ai,sd=ai,photo=real")
    assert class_labels(["photo", "SD", "gan"], classes) == {"photo": 0, "SD": 1, "gan": 1}
    assert class_labels(["gan"], classes) == {"gan": 1}


def test_accents_are_alike_however_they_are_stored():
    composed, apart = "r\u00e9el", "re\u0301el"
    assert class_labels([apart, "faux"], parse_classes(f"faux=ai,{composed}=real")) == {"faux": 1, apart: 0}
    assert class_labels([composed, "faux"], parse_classes(f"faux=ai,{apart}=real")) == {"faux": 1, composed: 0}


def test_names_that_classes_does_not_say_are_refused_by_name():
    with pytest.raises(ValueError, match=r"^--classes does not say what these are: other, x$"):
        class_labels(["x", "fake", "other"], {"fake": "ai", "human": "real"})


def test_classes_overrule_what_names_say():
    assert class_labels(["ai", "real"], {"ai": "real", "real": "ai"}, positive="ai") == {"ai": 0, "real": 1}


@pytest.mark.parametrize(
    ("name", "positive", "label"),
    [("ai", None, 1), ("FAKE", None, 1), ("Human", None, 0), ("cats", "CATS", 1), ("real", "dogs", 0)],
)
def test_one_class_that_speaks_for_itself_will_do(name, positive, label):
    assert class_labels([name], positive=positive, one_will_do=True) == {name: label}


def test_one_class_that_does_not_speak_for_itself_is_refused():
    with pytest.raises(ValueError, match=r"^cannot tell whether cats is ai or real; say it with --classes cats=ai"):
        class_labels(["cats"], one_will_do=True)
    with pytest.raises(ValueError, match="two classes are needed, found 1: ai"):
        class_labels(["ai"])
