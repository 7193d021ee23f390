"""Images and videos of pictures as a viewer shows them, and files that are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from rlvid.config import VideoConfig
from rlvid.errors import BadClip, UserError
from rlvid.types import Medium
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader
from tests.prompts import noise

Reader = Callable[..., npt.NDArray[np.uint8]]


@pytest.fixture
def reader(tmp_path: Path) -> ClipReader:
    return ClipReader(VideoConfig(height=56, width=28), 28, FrameCache(tmp_path / "cache", 2**30))


def read(reader: ClipReader, path: Path) -> npt.NDArray[np.uint8]:
    return reader.read(Medium(str(path), "image"))[0].frames


def save(path: Path, pixels: npt.NDArray[Any], mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def test_an_image_is_a_clip_of_one_frame_and_read_once(reader: ClipReader, tmp_path: Path) -> None:
    pixels = noise(1, 56, 84)[0]
    medium = Medium(str(save(tmp_path / "a.png", pixels)), "image")
    clip, is_hit = reader.read(medium)
    assert not is_hit and np.array_equal(clip.frames, pixels[None])  # its own size: the run's is that of videos
    assert (clip.n_frames, clip.indices.tolist(), clip.pts_s.tolist()) == (1, [0], [0.0])
    again, is_hit = reader.read(medium)
    assert is_hit and again.clip_id == clip.clip_id and np.array_equal(again.frames, clip.frames)


def test_a_large_image_is_made_smaller_in_its_own_proportions(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", noise(1, 400, 800)[0])
    for limit, shape in ((8 * 28 * 28, (56, 112)), (2 * 28 * 28, (28, 56))):
        small = ClipReader(VideoConfig(image_max_pixels=limit), 28, FrameCache(tmp_path / "cache", 2**30))
        assert read(small, path).shape == (1, *shape, 3)


def test_the_limit_of_images_does_not_change_the_identity_of_videos(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path / "cache", 2**30)
    readers = [ClipReader(VideoConfig(image_max_pixels=n), 28, cache) for n in (10_000, 20_000)]
    for kind, n_ids in (("video", 1), ("image", 2)):
        assert len({r.clip_id(Medium("/a", kind), "0" * 64, "x") for r in readers}) == n_ids  # type: ignore[arg-type]


def test_an_image_is_turned_as_its_camera_was(reader: ClipReader, tmp_path: Path) -> None:
    pixels = noise(1, 28, 56)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: shown turned by 90 degrees to the right
    path = save(tmp_path / "a.png", pixels, exif=exif)
    assert np.array_equal(read(reader, path)[0], np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("mode", "value", "shown"),
    [
        ("L", 100, (100, 100, 100)),
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),  # what cannot be seen is white, not its hidden colour
        ("RGBA", (200, 0, 0, 255), (200, 0, 0)),
        ("1", 255, (255, 255, 255)),
        ("I;16", 200 * 256, (200, 200, 200)),  # not cut off at 255
    ],
)
def test_colours_of_every_mode(reader: ClipReader, tmp_path: Path, mode: str, value: Any, shown: Any) -> None:
    Image.new(mode, (28, 28), value).save(tmp_path / "a.png")
    assert (read(reader, tmp_path / "a.png") == shown).all()


def test_palette_with_transparency_and_cmyk(reader: ClipReader, tmp_path: Path) -> None:
    image = Image.new("P", (28, 28), 0)
    image.putpalette([10, 20, 30] * 256)
    image.save(tmp_path / "a.png", transparency=0)
    assert (read(reader, tmp_path / "a.png") == 255).all()
    Image.new("CMYK", (28, 28), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert (read(reader, tmp_path / "a.jpg") >= 253).all()


def pictures(folder: Path, *frames: npt.NDArray[Any]) -> tuple[str, ...]:
    return tuple(str(save(folder / f"{i:03d}.png", frame)) for i, frame in enumerate(frames))


def test_pictures_are_a_video_at_their_own_rate(reader: ClipReader, tmp_path: Path) -> None:
    frames = noise(17, 56, 28)
    medium = Medium(str(tmp_path / "000.png"), pictures=pictures(tmp_path, *frames), pictures_per_s=4.0)
    clip, _ = reader.read(medium)
    assert clip.indices.tolist() == np.linspace(0, 16, 8, dtype=int).tolist()  # as of a file
    assert np.array_equal(clip.frames, frames[clip.indices])
    assert clip.fps == 4.0 and clip.pts_s[-1] == 4.0 and clip.n_frames == 17
    part, _ = reader.read(replace(medium, start_s=1.0, end_s=2.0))
    assert part.indices.tolist() == [4, 4, 4, 5, 5, 6, 6, 7] and part.clip_id != clip.clip_id
    assert reader.read(medium)[1]  # from the cache
    save(tmp_path / "016.png", frames[0])
    assert not reader.read(medium)[1]  # one of them has changed
    assert reader.read(replace(medium, pictures_per_s=2.0))[0].clip_id != reader.read(medium)[0].clip_id


def test_pictures_that_are_no_video_are_bad(reader: ClipReader, tmp_path: Path) -> None:
    paths = pictures(tmp_path, noise(1, 56, 28)[0], noise(1, 28, 56)[0])
    two_sizes = Medium(paths[0], pictures=paths, pictures_per_s=1.0)
    with pytest.raises(BadClip, match=r"000.png: and the pictures after it differ in size: \[\(28, 56\), \(56, 28\)\]"):
        reader.read(two_sizes)
    with pytest.raises(BadClip, match=r"gone.png: there is no such file"):
        reader.read(replace(two_sizes, pictures=(paths[0], str(tmp_path / "gone.png"))))
    with pytest.raises(BadClip, match="the part from 5 s to 6 s is not inside"):
        reader.read(replace(two_sizes, start_s=5.0, end_s=6.0))


def test_an_animated_webp_is_a_video(reader: ClipReader, tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in noise(9, 56, 28)]
    path = tmp_path / "a.webp"
    options: dict[str, Any] = {"save_all": True, "lossless": True, "duration": [100, 200] * 4 + [0]}
    frames[0].save(path, append_images=frames[1:], **options)
    clip, _ = reader.read(Medium(str(path)))
    assert clip.indices.tolist() == [0, 1, 2, 3, 4, 5, 6, 8] and clip.n_frames == 9
    assert clip.pts_s == pytest.approx([0, 0.1, 0.3, 0.4, 0.6, 0.7, 0.9, 1.2])
    assert all(np.array_equal(shown, frames[i]) for shown, i in zip(clip.frames, clip.indices, strict=True))
    frames[0].save(path)
    with pytest.raises(BadClip, match="has one frame: name it as an image"):
        reader.read(Medium(str(path)))


def test_files_that_are_no_image_are_bad(reader: ClipReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = save(tmp_path / "whole.jpg", noise(1, 200, 200)[0]).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    frames = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    save(tmp_path / "broken.png", noise(1, 64, 64)[0])
    content = bytearray((tmp_path / "broken.png").read_bytes())
    content[60:70] = bytes(10)
    (tmp_path / "broken.png").write_bytes(content)
    for name, reason in (
        ("cut.jpg", "cannot be decoded: .*truncated"),
        ("text.png", "cannot be decoded: cannot identify"),
        ("moving.webp", "has 2 frames: name it as a video"),
        ("broken.png", "cannot be decoded"),
        ("missing.png", "there is no such file"),
    ):
        with pytest.raises(BadClip, match=reason):
            read(reader, tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # a bomb is more than twice as large
    with pytest.raises(BadClip, match="exceeds limit"):
        read(reader, tmp_path / "whole.jpg")


def test_a_limit_below_one_patch_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", noise(1, 28, 28)[0])
    large = ClipReader(VideoConfig(image_max_pixels=28 * 28), 56, FrameCache(tmp_path / "cache", 2**30))
    with pytest.raises(UserError, match=r"a.png: video.image_max_pixels=784 is too small"):
        read(large, path)
