import pytest

from ahn.eval.metrics import best, exact_match, f1, normalize, qa_f1_score


def test_normalize_is_squads():
    assert normalize(" The  Beyoncé-album, an 'A'! ") == "beyoncéalbum"
    assert normalize("theatre and a cat") == "theatre and cat"


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("the Colorado.", "colorado", 1),
        ("Colorado", "Colorado River", 2 / 3),
        ("The answer is 1624.", "1624", 1 / 2),
        ("10TH AND 11TH CENTURIES , the a an and of 12 #!", "10th and 11th centuries", 8 / 11),
        ("red red blue", "red", 1 / 2),
        ("none", "1624", 0),
        ("", "1624", 0),
        ("the", "a", 0),
    ],
)
def test_f1_counts_common_words(prediction, answer, score):
    assert qa_f1_score(prediction, answer) == pytest.approx(score)


def test_the_best_answer_counts():
    assert f1("October 1973", ["1973", "October 1973"]) == 1
    assert exact_match("in October, 1973", ["1973", "October 1973"]) == 0
    assert exact_match("October, 1973", ["1973", "October 1973"]) == 1
    assert best(lambda said, wanted: len(wanted), "", ["a", "abc"]) == 3
