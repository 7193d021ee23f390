from __future__ import annotations

import os
import pickle
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from rlvid.errors import UserError
from rlvid.types import Clip
from rlvid.video.cache import CRASHES_COUNT_S, STALE_PART_S, FrameCache, MakerCrashed

CLIP_BYTES = 4 * 28 * 28 * 3


def make_clip(clip_id: str, value: int = 0) -> Clip:
    return Clip(
        clip_id=clip_id,
        frames=np.full((4, 28, 28, 3), value, dtype=np.uint8),
        pts_s=np.array([0.0, 1 / 3, 2 / 3, 0.1 + 0.2]),
        indices=np.array([0, 3, 6, 9]),
        n_frames=10,
        fps=29.97002997,
        reader="test 1",
        content_sha256="c" * 64,
    )


def forbidden() -> Clip:
    raise AssertionError("decoded although it is cached")


def put(cache: FrameCache, *clip_ids: str) -> None:
    for clip_id in clip_ids:
        assert cache.get_or_make(clip_id, partial(make_clip, clip_id))[1] is False


def held(cache: FrameCache, clip_ids: str) -> str:
    return "".join(clip_id for clip_id in clip_ids if (cache.dir / f"{clip_id}.npy").exists())


def size_bytes(cache: FrameCache) -> int:
    return sum(path.stat().st_size for path in cache.dir.glob("*.npy"))


@pytest.fixture
def cache(tmp_path: Path) -> FrameCache:
    return FrameCache(tmp_path / "frames", 10**9)


def test_what_was_put_comes_back_the_same(cache: FrameCache) -> None:
    made, was_cached = cache.get_or_make("a", partial(make_clip, "a", 7))
    assert not was_cached
    clip, was_cached = FrameCache(cache.dir, 10**9).get_or_make("a", forbidden)
    assert was_cached
    for name in ("frames", "pts_s", "indices"):
        array = getattr(clip, name)
        np.testing.assert_array_equal(array, getattr(made, name))
        assert array.dtype == getattr(made, name).dtype
    assert (clip.n_frames, clip.fps, clip.reader, clip.content_sha256) == (10, 29.97002997, "test 1", "c" * 64)


def test_frames_are_plain_read_only_arrays_fresh_or_cached(cache: FrameCache) -> None:
    for _ in range(2):
        clip, _ = cache.get_or_make("a", partial(make_clip, "a", 7))
        assert type(clip.frames) is np.ndarray and not clip.frames.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            clip.frames[0] = 1
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(clip)).frames, clip.frames)


def test_the_folder_holds_nothing_but_entries_and_total(cache: FrameCache) -> None:
    put(cache, "a")
    assert sorted(p.name for p in cache.dir.iterdir()) == ["a.lock", "a.npy", "total_bytes", "total_bytes.lock"]


WHOLE = 128 + CLIP_BYTES  # header of numpy and pixels; then comes the rest of the clip


@pytest.mark.parametrize("damaged", [slice(0), slice(WHOLE - 1), slice(WHOLE), slice(-1), slice(7, None)])
def test_damaged_entries_are_made_again(cache: FrameCache, damaged: slice) -> None:
    put(cache, "a")
    entry = cache.dir / "a.npy"
    entry.write_bytes(entry.read_bytes()[damaged])
    put(cache, "a")
    assert cache.get_or_make("a", forbidden)[1] is True


def test_another_file_of_that_name_is_no_entry(cache: FrameCache) -> None:
    np.save(cache.dir / "a.npy", np.zeros((2, 28, 28, 3), dtype=np.uint8))
    put(cache, "a")
    assert cache.get_or_make("a", forbidden)[1] is True


def test_frames_are_an_array_that_numpy_reads(cache: FrameCache) -> None:
    clip, _ = cache.get_or_make("a", partial(make_clip, "a", 7))
    np.testing.assert_array_equal(np.load(cache.dir / "a.npy"), clip.frames)


def test_entries_of_an_earlier_version_are_evicted(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 2 * (CLIP_BYTES + 1000))
    for name in ("old.npy", "old.json"):
        (tmp_path / name).write_bytes(bytes(CLIP_BYTES))
        os.utime(tmp_path / name, (0, 0))
    put(cache, *"ab")
    assert not list(tmp_path.glob("old.*"))


def test_a_failing_decode_leaves_nothing(cache: FrameCache) -> None:
    with pytest.raises(AssertionError, match="decoded although"):
        cache.get_or_make("a", forbidden)
    assert [p.name for p in cache.dir.iterdir()] == ["a.lock"]
    put(cache, "a")


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 10 * (CLIP_BYTES + 600))
    put(cache, *"abcdefghij")
    assert held(cache, "abcdefghij") == "abcdefghij"
    cache.get_or_make("a", forbidden)
    cache.get_or_make("c", forbidden)
    put(cache, "k")
    assert held(cache, "abcdefghijk") == "acefghijk"  # down to nine tenths of the limit
    assert size_bytes(cache) <= cache.limit_bytes


def test_size_stays_below_the_limit(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 5 * CLIP_BYTES)
    for i in range(40):
        put(cache, f"clip{i}")
        assert size_bytes(cache) <= cache.limit_bytes
    assert cache.get_or_make("clip39", forbidden)[1] is True


def test_the_folder_is_not_searched_at_every_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FrameCache(tmp_path, 20 * (CLIP_BYTES + 600))
    searches: list[int] = []
    scan = cache._scan

    def counting_scan() -> list[tuple[int, int, str]]:
        searches.append(1)
        return scan()

    monkeypatch.setattr(cache, "_scan", counting_scan)
    put(cache, *(f"clip{i}" for i in range(20)))
    assert len(searches) == 1  # to know the size once
    put(cache, *(f"more{i}" for i in range(20)))
    assert len(searches) <= 12


@pytest.mark.parametrize("limit_bytes", [1, CLIP_BYTES - 1])
def test_clip_larger_than_the_limit_is_given_but_not_kept(tmp_path: Path, limit_bytes: int) -> None:
    cache = FrameCache(tmp_path, limit_bytes)
    put(cache, "a", "a", "b")
    assert size_bytes(cache) == 0


def test_limit_of_one_clip_keeps_the_last(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, CLIP_BYTES + 1000)
    put(cache, "a", "b", "c")
    assert held(cache, "abc") == "c"


def test_frames_stay_usable_after_eviction(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, CLIP_BYTES + 1000)
    cache.get_or_make("a", partial(make_clip, "a", 7))
    clip, _ = cache.get_or_make("a", forbidden)
    put(cache, "b")
    assert held(cache, "ab") == "b"
    assert (clip.frames == 7).all()


def test_lost_or_garbled_total_is_counted_again(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 5 * CLIP_BYTES)
    put(cache, *"abc")
    for damage in (lambda p: p.unlink(), lambda p: p.write_text("?")):
        damage(tmp_path / "total_bytes")
        put(cache, *(f"more{i}" for i in range(8)))
        assert size_bytes(cache) <= cache.limit_bytes


def test_half_written_files_are_cleared_when_old(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 2 * (CLIP_BYTES + 1000))
    old, new = tmp_path / "old.part", tmp_path / "new.part"
    for part in (old, new):
        part.write_bytes(bytes(CLIP_BYTES))
    past = time.time() - STALE_PART_S - 1
    os.utime(old, (past, past))
    put(cache, *"abc")
    assert not old.exists() and new.exists()


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FrameCache(Path("~/cache"), 1).dir == tmp_path / "cache"


def test_unwritable_folder_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        FrameCache(tmp_path / "file" / "cache", 1)


def test_full_disk_is_a_users_error(cache: FrameCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", no_space)
    with pytest.raises(UserError, match=r"No space left on device. .*data\.cache_gib"):
        cache.get_or_make("a", partial(make_clip, "a"))
    assert sorted(p.name for p in cache.dir.iterdir()) == ["a.lock", "total_bytes", "total_bytes.lock"]


def crash_making(cache: FrameCache, clip_id: str) -> None:
    """A process is killed while it makes the clip."""
    maker = get_context("spawn").Process(target=cache.get_or_make, args=(clip_id, partial(time.sleep, 60)))
    crashes = cache.dir / f"{clip_id}.crashes"
    before = crashes.stat().st_size if crashes.exists() else 0
    maker.start()
    try:
        deadline = time.monotonic() + 30
        while not crashes.exists() or crashes.stat().st_size == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        maker.kill()
        maker.join()


def test_lock_of_a_killed_process_is_free(cache: FrameCache) -> None:
    crash_making(cache, "a")
    put(cache, "a")
    assert held(cache, "a") == "a" and not list(cache.dir.glob("*.crashes"))


def test_clip_that_crashes_its_makers_is_refused_for_a_while(cache: FrameCache) -> None:
    crash_making(cache, "a")
    crash_making(cache, "a")
    for _ in range(2):
        with pytest.raises(MakerCrashed) as caught:
            cache.get_or_make("a", forbidden)
    put(cache, "b")
    past = time.time() - CRASHES_COUNT_S - 1
    os.utime(caught.value.args[0], (past, past))
    put(cache, "a")


def test_a_decode_that_raises_is_no_crash(cache: FrameCache) -> None:
    for _ in range(5):
        with pytest.raises(AssertionError, match="decoded although"):
            cache.get_or_make("a", forbidden)
    put(cache, "a")


def test_processes_that_ask_for_the_same_clips_make_each_once(cache: FrameCache) -> None:
    ids = [f"clip{i}" for i in range(12)]
    asked = [(clip_id, partial(slow_clip, clip_id)) for clip_id in ids for _ in range(3)]
    with get_context("spawn").Pool(3) as pool:
        answers = pool.starmap(cache.get_or_make, asked, chunksize=1)
    made = [clip.clip_id for clip, was_cached in answers if not was_cached]
    assert sorted(made) == sorted(ids)
    assert [clip.clip_id for clip, _ in answers] == [clip_id for clip_id, _ in asked]
    assert not list(cache.dir.glob("*.part"))


def slow_clip(clip_id: str) -> Clip:
    time.sleep(0.05)
    return make_clip(clip_id)


def test_a_clip_of_another_id_is_refused(cache: FrameCache) -> None:
    with pytest.raises(ValueError, match="asked for clip a, made b"):
        cache.get_or_make("a", partial(make_clip, "b"))
