"""Spearman as VideoScore reports it: computed by hand, and compared with the stored results of VideoScore itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlvid.errors import UserError
from rlvid.evaluation.ranking import correlate, read_results, spearman
from rlvid.rewards.videoscore import DIMS

RESULTS = Path(__file__).parents[3] / "shared" / "data" / "videoscore" / "eval_results" / "video_feedback"
STORED = "spearman_corr_video_feedback.json"

# VideoScore names a row by the text between "_" or before the first ".": two Geminis share a name.
FILES = {
    **{name: (name,) for name in ("BRISQUE", "CLIP-Score", "CLIP-sim", "DINO-sim", "PIQE", "SSIM-dyn", "X-CLIP-Score")},
    "gemini-1": ("gemini-1.5-flash-latest", "gemini-1.5-pro-latest"),
    "gpt4o": ("gpt4o",),
    "idefics1": ("idefics1",),
    "next": ("llava_next",),
    "videoscore": ("videoscore",),
}


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15) = 0.6.
    assert spearman([0.1, 0.2, 0.3, 0.4], [2, 1, 4, 3]) == 60.0
    # A tie takes the mean rank: (1, 2, 3) against (1.5, 1.5, 3) is sqrt(3) / 2.
    assert spearman([1, 2, 3], [5, 5, 9]) == pytest.approx(100 * math.sqrt(3) / 2, abs=5e-5)


@pytest.mark.parametrize("columns", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [4, 4, 4]), ([2], [3]), ([], [])])
def test_constant_column_has_no_correlation_and_is_left_out_of_the_average(
    columns: tuple[list[int], list[int]],
) -> None:
    assert spearman(*columns) is None
    found = correlate([{"a": 1, "b": 3}, {"a": 2, "b": 3}], [{"b": 1, "a": 1}, {"b": 2, "a": 2}], ("a", "b"))
    assert found.by_dim == {"a": 100.0, "b": None} and found.average == 100.0 and found.n == 2
    assert math.isnan(found.as_metrics()["spearman/b"])


def test_scores_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError):
        spearman([1, 2], [1, 2, 3])


def test_lists_in_result_rows_are_parsed_never_evaluated(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps([{"id": "1", "ref": "[1, 2]", "ans": "__import__('os').listdir()"}]))
    with pytest.raises(UserError, match="row 0"):
        read_results(file, ("a", "b"))


def measured(name: str, rows: int | None = None) -> list[float | None]:
    answers, references = read_results(RESULTS / f"eval_video_feedback_{name}.json", DIMS)
    return list(correlate(answers[:rows], references[:rows], DIMS).by_dim.values())


@pytest.mark.skipif(not RESULTS.is_dir(), reason="../shared/data/videoscore is not on this machine")
def test_every_stored_correlation_of_videofeedback_is_reproduced() -> None:
    """60 values of 12 metrics and models, some of them from several runs of VideoScore's script."""
    stored = [next(iter(entry.items())) for entry in json.loads((RESULTS / STORED).read_text())]
    assert {name for name, _ in stored} == set(FILES)
    for name, entry in stored:
        # idefics1 was stored when its file had two rows, and three; it has four now.
        counts = (2, 3) if name == "idefics1" else (None,)
        ours = [measured(file, rows) for file in FILES[name] for rows in counts]
        assert any(same(entry["spearman_list"], values) for values in ours), (name, entry["spearman_list"], ours)


def same(stored: list[float | None], ours: list[float | None]) -> bool:
    return all(
        (a is None) == (b is None) and (a is None or b is None or abs(a - b) <= 1e-4)
        for a, b in zip(stored, ours, strict=True)
    )
