from __future__ import annotations

import numpy as np
import pytest

from rlvid.config import VideoConfig
from rlvid.video.sampling import by_fps, first_seconds, linspace, mid_segment, sample_indices


def regular(n: int, fps: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.arange(n) / fps


def test_linspace_has_both_ends_and_rounds_down() -> None:
    assert linspace(10, 4).tolist() == [0, 3, 6, 9]
    assert linspace(100, 8).tolist() == [0, 14, 28, 42, 56, 70, 84, 99]  # 14.14, 28.28, ...


def test_mid_segment_takes_the_middles_and_half_rounds_up() -> None:
    # VideoLLaMA2: segments of 9 / 4 = 2.25 frames, middles 1.125, 3.375, 5.625, 7.875
    assert mid_segment(10, 4).tolist() == [1, 3, 6, 8]
    # segments of 4 / 4 = 1 frame, middles 0.5, 1.5, 2.5, 3.5: half to even would give 0, 2, 2, 4
    assert mid_segment(5, 4).tolist() == [1, 2, 3, 4]


def test_fps_takes_so_many_frames_a_second() -> None:
    # 10 s at 25 fps, 2 a second: 20 frames; 249 / 19 = 13.1 frames apart, nearest
    indices = by_fps(regular(250, 25.0), 2.0, 64)
    assert len(indices) == 20
    assert indices[:4].tolist() == [0, 13, 26, 39] and indices[-1] == 249


def test_fps_is_capped() -> None:
    assert by_fps(regular(250, 25.0), 2.0, 8).tolist() == [0, 36, 71, 107, 142, 178, 213, 249]  # 35.57 apart


@pytest.mark.parametrize(
    ("n", "fps", "count"), [(250, 0.5, 4), (250, 0.3, 2), (250, 0.01, 2), (175, 1.0, 6), (1, 2.0, 2)]
)
def test_fps_count_is_even_and_at_least_two(n: int, fps: float, count: int) -> None:
    assert len(by_fps(regular(n, 25.0), fps, 64)) == count


def test_fps_does_not_ask_for_more_frames_than_there_are() -> None:
    assert len(by_fps(regular(9, 1.0), 30.0, 64)) == 8


def test_fps_goes_by_time_where_the_frame_rate_varies() -> None:
    # four frames in the first 0.3 s, then one a second: the file lasts 4.3 s, on average 8 frames in 4.91 s
    pts_s = np.array([0.0, 0.1, 0.2, 0.3, 1.3, 2.3, 3.3, 4.3])
    # 4 frames at 0, 1.43, 2.87, 4.3 s
    assert by_fps(pts_s, 1.0, 64).tolist() == [0, 4, 6, 7]


def test_first_seconds_never_sees_the_tail() -> None:
    assert first_seconds(regular(1000, 25.0), 10.0, 8).tolist() == linspace(250, 8).tolist()
    assert first_seconds(regular(100, 25.0), 10.0, 8).tolist() == linspace(100, 8).tolist()
    assert first_seconds(regular(10, 1.0), 0.5, 2).tolist() == [0, 0]


@pytest.mark.parametrize("sampling", ["linspace", "mid_segment", "fps", "first_seconds"])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 40, 1001])
def test_every_rule_gives_an_even_number_of_rising_indices_inside(sampling: str, n: int) -> None:
    video = VideoConfig.model_validate({"sampling": sampling, "frames": 6})
    indices = sample_indices(video, regular(n, 29.97))
    assert indices.dtype == np.int64
    assert len(indices) % 2 == 0 and 2 <= len(indices) <= 6
    assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < n


def test_short_files_repeat_frames() -> None:
    assert sample_indices(VideoConfig(frames=4), regular(1, 1.0)).tolist() == [0, 0, 0, 0]
    assert sample_indices(VideoConfig(frames=4, sampling="mid_segment"), regular(2, 1.0)).tolist() == [0, 0, 1, 1]
