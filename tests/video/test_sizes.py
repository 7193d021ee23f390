from __future__ import annotations

import pytest

from rlvid.config import VideoConfig
from rlvid.errors import UserError
from rlvid.video.sizes import target_size

AREA_128 = 128 * 28 * 28  # 100352 pixels, the default


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((280, 280), (280, 280)),  # fits as it is
        ((240, 320), (252, 308)),  # nearest multiples: 8.57 -> 9, 11.43 -> 11
        ((14, 200), (28, 196)),  # at least one multiple
        ((1080, 1920), (224, 420)),  # shrunk by sqrt(1080 * 1920 / 100352) = 4.5457: 237.6, 422.4, rounded down
        ((1920, 1080), (420, 224)),  # portrait alike
        ((720, 1280), (224, 420)),
    ],
)
def test_aspect_is_kept_under_max_pixels_as_in_smart_resize(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size, VideoConfig(), 28) == expected
    assert expected[0] * expected[1] <= AREA_128


@pytest.mark.parametrize("size", [(10, 10_000), (10_000, 10), (30, 5_000)])
def test_very_long_frames_stay_under_max_pixels_too(size: tuple[int, int]) -> None:
    video = VideoConfig(max_pixels=4 * 28 * 28)
    h, w = target_size(*size, video, 28)
    assert h % 28 == 0 and w % 28 == 0 and min(h, w) == 28 and h * w <= video.max_pixels


@pytest.mark.parametrize("multiple", [16, 28, 32, 48])
def test_sides_are_multiples_for_every_family(multiple: int) -> None:
    for height in range(1, 2000, 137):
        for width in range(1, 4000, 211):
            h, w = target_size(height, width, VideoConfig(), multiple)
            assert h % multiple == 0 and w % multiple == 0 and h * w <= AREA_128 and min(h, w) >= multiple


def test_fixed_size_is_used_as_it_is() -> None:
    assert target_size(1080, 1920, VideoConfig(height=56, width=84), 28) == (56, 84)


def test_fixed_size_that_does_not_fit_the_model_names_key_and_fix() -> None:
    with pytest.raises(UserError, match=r"video\.width=100 must be a multiple of 28 .* use 84 or 112"):
        target_size(1, 1, VideoConfig(height=56, width=100), 28)
    with pytest.raises(UserError, match=r"video\.height=28 must be a multiple of 32 .* use 32"):
        target_size(1, 1, VideoConfig(height=28, width=64), 32)


def test_max_pixels_below_one_patch_group_is_refused() -> None:
    with pytest.raises(UserError, match=r"video\.max_pixels=784 .* at least 1024"):
        target_size(100, 100, VideoConfig(max_pixels=784), 32)
