from __future__ import annotations

import os
import pickle
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvid.errors import BadClip, UserError
from rlvid.types import Medium
from rlvid.video import pyav_reader
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader, hashing_limit_s
from tests.video.media import read_numbers, video_config, write_video


@pytest.fixture
def reader(tmp_path: Path) -> ClipReader:
    return make_reader(tmp_path)


def make_reader(tmp_path: Path, multiple: int = 28, **keys: Any) -> ClipReader:
    return ClipReader(video_config(**keys), multiple, FrameCache(tmp_path / "cache", 10**9))


def test_second_read_comes_from_the_cache_with_equal_content(tmp_path: Path, reader: ClipReader) -> None:
    path = str(write_video(tmp_path / "a.mp4"))
    fresh, from_cache = reader.read(Medium(path))
    assert not from_cache
    again, from_cache = make_reader(tmp_path).read(Medium(path))
    assert from_cache
    for clip in (fresh, again):
        assert read_numbers(clip.frames) == clip.indices.tolist() == [0, 4, 8, 12, 16, 20, 24, 29]
        assert clip.frames.flags.c_contiguous and not clip.frames.flags.writeable
        assert (clip.n_frames, clip.reader) == (30, pyav_reader.NAME) and clip.fps == pytest.approx(10.0)
    np.testing.assert_array_equal(again.frames, fresh.frames)
    np.testing.assert_array_equal(again.pts_s, fresh.pts_s)
    assert again.clip_id == fresh.clip_id and len(fresh.clip_id) == 64


def test_same_bytes_under_another_name_are_the_same_clip(tmp_path: Path, reader: ClipReader) -> None:
    path = write_video(tmp_path / "a.mp4")
    (tmp_path / "b.mkv").write_bytes(path.read_bytes())
    clip, _ = reader.read(Medium(str(path)))
    other, from_cache = reader.read(Medium(str(tmp_path / "b.mkv")))
    assert from_cache and other.clip_id == clip.clip_id


def test_changed_content_under_the_same_name_is_another_clip(tmp_path: Path, reader: ClipReader) -> None:
    path = write_video(tmp_path / "a.mp4", range(30))
    first, _ = reader.read(Medium(str(path)))
    write_video(path, range(100, 130))
    os.utime(path, ns=(0, 0))  # whatever the file system's resolution
    second, from_cache = reader.read(Medium(str(path)))
    assert not from_cache and second.clip_id != first.clip_id
    assert read_numbers(second.frames)[0] == 100


def test_whatever_changes_the_frames_changes_the_id(tmp_path: Path) -> None:
    variants: list[tuple[int, dict[str, Any]]] = [
        (28, {}),
        (28, {"frames": 4}),
        (28, {"sampling": "mid_segment"}),
        (28, {"sampling": "first_seconds", "seconds": 1.0}),
        (28, {"sampling": "first_seconds", "seconds": 2.0}),
        (28, {"sampling": "fps", "fps": 1.0}),
        (28, {"sampling": "fps", "fps": 2.0}),
        (28, {"height": 56}),
        (28, {"height": 168, "width": 84}),
        (28, {"height": None, "width": None}),
        (28, {"height": None, "width": None, "max_pixels": 28 * 28 * 4}),
        (14, {"height": None, "width": None}),
        (28, {"reader": "decord"}),
    ]
    ids = {
        make_reader(tmp_path, m, **keys).clip_id(Medium("a"), "c" * 64, keys.get("reader", "")) for m, keys in variants
    }
    own = [{"start_s": 1.0}, {"end_s": 1.0}, {"fps": 3.0}, {"max_pixels": 28 * 28 * 9}]
    ids |= {make_reader(tmp_path).clip_id(Medium("a", **keys), "c" * 64, "") for keys in own}
    ids.add(make_reader(tmp_path).clip_id(Medium("a"), "c" * 64, "pyav 2"))
    assert len(ids) == len(variants) + len(own) + 1


def test_the_time_limit_does_not_change_the_id(tmp_path: Path) -> None:
    ids = {make_reader(tmp_path, **keys).clip_id(Medium("a"), "c" * 64, "pyav") for keys in ({}, {"timeout_s": 7.0})}
    assert len(ids) == 1


def test_what_a_row_says_is_what_the_configuration_may_say(tmp_path: Path) -> None:
    by_row = make_reader(tmp_path).clip_id(Medium("a", fps=1.0, max_pixels=784), "c" * 64, "pyav")
    keys = {"sampling": "fps", "fps": 1.0, "height": None, "width": None, "max_pixels": 784}
    assert make_reader(tmp_path, **keys).clip_id(Medium("a"), "c" * 64, "pyav") == by_row


def test_cached_clip_costs_no_read_of_its_file_in_any_process(
    tmp_path: Path, reader: ClipReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4")
    clip, _ = reader.read(Medium(str(path)))
    status = path.stat()
    path.write_bytes(bytes(status.st_size))  # what is in it now plays no part
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    monkeypatch.setattr("hashlib.file_digest", None)
    again, from_cache = make_reader(tmp_path).read(Medium(str(path)))  # as another process has it
    assert from_cache and again.content_sha256 == clip.content_sha256


@pytest.mark.parametrize("damage", ["", "ab", "x" * 63])
def test_half_written_hash_is_computed_again(tmp_path: Path, reader: ClipReader, damage: str) -> None:
    path = str(write_video(tmp_path / "a.mp4"))
    clip, _ = reader.read(Medium(path))
    (record,) = reader.cache.dir.glob("*.sha256")
    record.write_text(damage)
    assert reader.read(Medium(path))[0].clip_id == clip.clip_id
    assert record.read_text() == clip.content_sha256


PARTS: list[tuple[dict[str, Any], list[int]]] = [  # 30 frames at 10 a second, 4 read
    ({}, [0, 9, 19, 29]),
    ({"start_s": 1.0, "end_s": 2.0}, [10, 13, 16, 19]),
    ({"start_s": 2.0}, [20, 23, 26, 29]),
    ({"end_s": 0.4}, [0, 1, 2, 3]),
    ({"start_s": 1.95, "end_s": 3.4}, [20, 23, 26, 29]),  # an end up to half a second later is taken for the end
    ({"start_s": 1.52, "end_s": 1.58}, [15] * 4),  # no frame begins there: the one on screen
    ({"fps": 1.0}, [0, 29]),  # 3 s; an even number
    ({"fps": 1.0, "start_s": 0.5, "end_s": 2.5}, [5, 24]),
    ({"fps": 9.0}, [0, 10, 19, 29]),  # at most video.frames; 9.67 apart, nearest
]


@pytest.mark.parametrize(("own", "expected"), PARTS)
@pytest.mark.parametrize(("name", "reader_name"), [("a.mp4", "pyav"), ("a.avi", "pyav"), ("a.mp4", "decord")])
def test_part_and_frame_rate_of_a_row_are_read(
    tmp_path: Path, name: str, reader_name: str, own: dict[str, Any], expected: list[int]
) -> None:
    pytest.importorskip(reader_name.replace("pyav", "av"))
    path = write_video(tmp_path / name, codec="mpeg4" if name == "a.avi" else "libx264", options={"bf": "2"})
    clip, _ = make_reader(tmp_path, frames=4, reader=reader_name).read(Medium(str(path), **own))
    assert clip.indices.tolist() == expected == read_numbers(clip.frames)
    np.testing.assert_allclose(clip.pts_s, np.array(expected) / 10, atol=2e-3)  # from the start of the file
    assert clip.n_frames == 30


@pytest.mark.parametrize("reader_name", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"start_s": 3.0}, "3 s to 3 s"),
        ({"start_s": 2.0, "end_s": 9.0}, "2 s to 9 s"),
        ({"start_s": -1.0}, "-1 s to 3 s"),
        ({"start_s": 2.0, "end_s": 1.0}, "2 s to 1 s"),
    ],
)
def test_part_that_is_not_inside_the_file_is_bad(
    tmp_path: Path, reader_name: str, own: dict[str, Any], named: str
) -> None:
    pytest.importorskip(reader_name.replace("pyav", "av"))
    path = str(write_video(tmp_path / "a.mp4"))
    with pytest.raises(BadClip, match=rf"lasts 3\.00 s: the part from {named} is not inside"):
        make_reader(tmp_path, reader=reader_name).read(Medium(path, **own))


def test_area_of_a_row_replaces_the_configured_size(tmp_path: Path, reader: ClipReader) -> None:
    path = str(write_video(tmp_path / "a.mp4", size=(168, 84)))
    assert reader.read(Medium(path))[0].frames.shape == (8, 84, 168, 3)
    assert reader.read(Medium(path, max_pixels=2 * 28 * 28))[0].frames.shape == (8, 28, 56, 3)
    with pytest.raises(UserError, match=r"a\.mp4: video\.max_pixels=100 is too small.*at least 784"):
        reader.read(Medium(path, max_pixels=100))


def test_time_to_hash_a_large_file_is_allowed_for(tmp_path: Path) -> None:
    with open(tmp_path / "a.mp4", "wb") as file:
        file.truncate(2**31)
    assert hashing_limit_s([Medium(str(tmp_path / "a.mp4")), Medium("missing.mp4")]) == 2048.0  # at 1 MiB a second


def test_wrong_size_is_refused_before_any_clip_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"video\.height=84 must be a multiple of 32"):
        make_reader(tmp_path, multiple=32)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.mp4", "there is no such file"),
        ("folder.mp4", "is a folder"),
        ("empty.mp4", r"is empty \(0 bytes\)"),
        ("text.mp4", "cannot be opened: Invalid data found"),
        ("text.mp4/below", "cannot be opened: Not a directory"),
        ("nul\0.mp4", "cannot be opened: embedded null"),
        ("pipe.mp4", "is not a regular file"),
    ],
)
def test_unreadable_is_a_bad_clip_with_path_and_reason(
    tmp_path: Path, reader: ClipReader, name: str, reason: str
) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    with pytest.raises(BadClip, match=reason) as caught:
        reader.read(Medium(f"{tmp_path}/{name}"))
    assert caught.value.path == f"{tmp_path}/{name}"
    assert not list(reader.cache.dir.glob("*.npy"))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")]
)
def test_file_cut_short_is_refused_wherever_the_cut_is(
    tmp_path: Path, reader: ClipReader, name: str, codec: str
) -> None:
    path = write_video(tmp_path / name, codec=codec, mux={"movflags": "faststart"} if name == "a.mp4" else {})
    whole = path.read_bytes()
    for share in (0.3, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(BadClip, match="cut short"):
            reader.read(Medium(str(path)))


def test_clip_that_crashed_its_readers_is_bad_with_the_way_out(tmp_path: Path, reader: ClipReader) -> None:
    path = str(write_video(tmp_path / "a.mp4"))
    clip, _ = reader.read(Medium(path))
    for file in reader.cache.dir.glob(f"{clip.clip_id}.*"):
        file.unlink()
    record = reader.cache.dir / f"{clip.clip_id}.crashes"
    record.write_bytes(b"xx")  # as two crashed processes leave it
    with pytest.raises(BadClip, match=f"crashed several processes .* remove {record}"):
        reader.read(Medium(path))
    record.unlink()
    assert reader.read(Medium(path))[1] is False


def test_decord_is_chosen_by_name(tmp_path: Path) -> None:
    pytest.importorskip("decord")
    path = str(write_video(tmp_path / "a.mp4"))
    clip, from_cache = make_reader(tmp_path, reader="decord").read(Medium(path))
    assert not from_cache and clip.reader.startswith("decord ")
    assert make_reader(tmp_path).read(Medium(path))[1] is False  # two readers share no clips


def test_two_processes_decode_the_same_clip_once(tmp_path: Path, reader: ClipReader) -> None:
    paths = [str(write_video(tmp_path / f"{i}.mp4", range(i, i + 30))) for i in range(4)]
    with get_context("spawn").Pool(2) as pool:
        answers = pool.map(reader.read, [Medium(path) for path in paths for _ in range(4)], chunksize=1)
    fresh = [clip.clip_id for clip, from_cache in answers if not from_cache]
    assert len(fresh) == len(set(fresh)) == 4
    for i, (clip, _) in enumerate(answers):
        assert read_numbers(clip.frames)[0] == i // 4


def test_reader_can_be_pickled(tmp_path: Path, reader: ClipReader) -> None:
    path = str(write_video(tmp_path / "a.mp4"))
    reader.read(Medium(path))
    assert pickle.loads(pickle.dumps(reader)).read(Medium(path))[1] is True


def test_workers_stay_light() -> None:
    heavy = "{'ray', 'torch', 'decord'} & set(sys.modules)"
    code = f"import sys, rlvid.video.clip_reader, rlvid.video.pyav_reader; print(sorted({heavy}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("block_s", "is_ended"), [(20.0, True), (0.0, False)])
def test_process_that_hangs_is_ended_with_its_stack(block_s: float, is_ended: bool) -> None:
    code = f"""
import time
from rlvid.video import clip_reader
clip_reader.END_SLACK_S = 0.0
with clip_reader.ends_hung_process([], timeout_s=0.1):
    time.sleep({block_s})
time.sleep(0.4)
print("alive")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (run.returncode != 0) is is_ended and run.stdout == ("" if is_ended else "alive\n")
    assert ("Timeout" in run.stderr and "line 6" in run.stderr) is is_ended
