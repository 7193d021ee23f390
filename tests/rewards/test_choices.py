import pytest

from rlvid.rewards.answers import bring_letters, choice_lines, choices_meant


def test_choices_are_lettered_one_a_line() -> None:
    assert choice_lines(("red", "blue", "A")) == "A. red\nB. blue\nC. A"
    assert choice_lines(()) == ""


@pytest.mark.parametrize(
    ("answer", "meant"),
    [
        ("blue", {"blue"}),
        (" blue ", {"blue"}),
        ("B", {"blue"}),
        ("b", {"blue"}),
        ("C", set()),  # only two choices
        ("Blue", set()),  # a key is taken by the letter
        ("", set()),
        ("AB", set()),  # no slice of the alphabet is a letter
    ],
)
def test_an_answer_key_means_a_text_or_a_letter(answer: str, meant: set[str]) -> None:
    assert choices_meant(answer, ("red", "blue")) == meant


def test_a_letter_that_is_the_text_of_another_choice_means_two() -> None:
    assert choices_meant("B", ("B", "A")) == {"A", "B"}
    assert choices_meant("B", ("A", "B")) == {"B"}


def test_choices_that_bring_their_letters_are_recognised() -> None:
    assert bring_letters(["A. red", "B. blue"])
    assert bring_letters(["(A) red", " (B) blue"])
    assert not bring_letters(["A. red", "A. blue"])
    assert not bring_letters(["A dog", "B movie"])
