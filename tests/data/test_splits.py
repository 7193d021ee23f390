import pytest

from rlvid.data.splits import check_disjoint
from rlvid.errors import UserError
from rlvid.types import Medium, MediumRef, Message, Sample


def sample(id: str, video: str = "/data/a.mp4", question: str = "What moves?", system: str | None = None) -> Sample:
    turns = [Message("user", (MediumRef(0), question))]
    if system:
        turns.insert(0, Message("system", (system,)))
    return Sample(id=id, media=(Medium(video),), messages=tuple(turns), answer="x")


def test_the_same_video_with_another_question_is_allowed() -> None:
    check_disjoint([sample("1")], [sample("2", question="What colour?"), sample("3", video="/data/b.mp4")])
    check_disjoint([], [])


def test_shared_ids_are_named_up_to_five() -> None:
    train = [sample(str(i), video=f"/data/{i}.mp4") for i in range(9)]
    held_out = [sample(str(i), video=f"/held_out/{i}.mp4") for i in range(2, 9)]
    with pytest.raises(UserError, match=r"7 ids are in both \(2, 3, 4, 5, 6, \.\.\.\)"):
        check_disjoint(train, held_out)


def test_the_same_video_and_question_under_another_id_is_found() -> None:
    with pytest.raises(UserError, match=r"1 samples have the same video and question under two ids \(1 = 2\)"):
        check_disjoint([sample("1", system="Be brief.")], [sample("2", question="what  MOVES? ")])


def test_the_same_text_only_question_is_found() -> None:
    one, two = (Sample(id=id, media=(), messages=(Message("user", ("2 + 2?",)),), answer="4") for id in "12")
    with pytest.raises(UserError, match="1 = 2"):
        check_disjoint([one], [two])


def test_a_last_turn_alone_does_not_make_two_conversations_equal() -> None:
    def talk(id: str, first: str) -> Sample:
        turns = (Message("user", (first,)), Message("assistant", ("Yes.",)), Message("user", ("Why?",)))
        return Sample(id=id, media=(), messages=turns, answer="x")

    check_disjoint([talk("1", "Does it rain?")], [talk("2", "Does it snow?")])


def test_both_problems_are_told_at_once() -> None:
    with pytest.raises(UserError, match="1 ids are in both.*1 samples have the same.*Take these rows out"):
        check_disjoint([sample("1"), sample("2", question="Q")], [sample("1"), sample("3", question="Q")])
