from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from rlvid.errors import UserError
from rlvid.types import Clip
from rlvid.video.cache import DEATHS_COUNT_S, STALE_PART_S, FrameCache, MakerDied

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
    return "".join(clip_id for clip_id in clip_ids if (cache.dir / f"{clip_id}.json").exists())


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


def test_absent_is_none(cache: FrameCache) -> None:
    assert cache.get("a") is None


def test_the_folder_holds_nothing_but_entries_and_total(cache: FrameCache) -> None:
    put(cache, "a")
    assert sorted(p.name for p in cache.dir.iterdir()) == ["a.json", "a.npy", "total_bytes"]


def damage_cut(frames: Path, meta: Path) -> None:
    frames.write_bytes(frames.read_bytes()[:-1])


def damage_no_frames(frames: Path, meta: Path) -> None:
    frames.unlink()


def damage_no_meta(frames: Path, meta: Path) -> None:
    meta.unlink()


def damage_empty(frames: Path, meta: Path) -> None:  # as after a power cut
    frames.write_bytes(b"")
    meta.write_bytes(b"")


def damage_header(frames: Path, meta: Path) -> None:
    frames.write_bytes(b"garbage" + frames.read_bytes()[7:])


def damage_meta(frames: Path, meta: Path) -> None:
    meta.write_bytes(meta.read_bytes()[:40])


def damage_other_frames(frames: Path, meta: Path) -> None:
    np.save(frames, np.zeros((2, 28, 28, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "damage",
    [damage_cut, damage_no_frames, damage_no_meta, damage_empty, damage_header, damage_meta, damage_other_frames],
)
def test_damaged_entries_are_absent_and_removed(cache: FrameCache, damage: Callable[[Path, Path], None]) -> None:
    put(cache, "a")
    damage(cache.dir / "a.npy", cache.dir / "a.json")
    assert cache.get("a") is None
    assert list(cache.dir.glob("a.*")) == []
    put(cache, "a")
    damage(cache.dir / "a.npy", cache.dir / "a.json")
    put(cache, "a")  # made again
    assert cache.get_or_make("a", forbidden)[1] is True


def test_a_failing_decode_leaves_nothing(cache: FrameCache) -> None:
    with pytest.raises(AssertionError, match="decoded although"):
        cache.get_or_make("a", forbidden)
    assert list(cache.dir.iterdir()) == []
    put(cache, "a")


def test_a_clip_of_another_id_is_refused(cache: FrameCache) -> None:
    with pytest.raises(ValueError, match="asked for clip a, made b"):
        cache.get_or_make("a", partial(make_clip, "b"))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 10 * (CLIP_BYTES + 600))
    put(cache, *"abcdefghij")
    assert held(cache, "abcdefghij") == "abcdefghij"
    cache.get_or_make("a", forbidden)
    cache.get("c")
    put(cache, "k")
    assert held(cache, "abcdefghijk") == "acefghijk"  # down to nine tenths of the limit
    assert cache.size_bytes() <= cache.limit_bytes


def test_size_stays_below_the_limit(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 5 * CLIP_BYTES)
    for i in range(40):
        put(cache, f"clip{i}")
        assert cache.size_bytes() <= cache.limit_bytes
    assert cache.get("clip39") is not None


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
    assert cache.size_bytes() == 0


def test_limit_of_one_clip_keeps_the_last(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, CLIP_BYTES + 1000)
    put(cache, "a", "b", "c")
    assert held(cache, "abc") == "c"


def test_frames_stay_usable_after_eviction(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, CLIP_BYTES + 1000)
    cache.get_or_make("a", partial(make_clip, "a", 7))
    clip, _ = cache.get_or_make("a", forbidden)
    put(cache, "b")
    assert cache.get("a") is None
    assert (clip.frames == 7).all()


def test_lost_or_garbled_total_is_counted_anew(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 5 * CLIP_BYTES)
    put(cache, *"abc")
    for damage in (lambda p: p.unlink(), lambda p: p.write_text("?")):
        damage(tmp_path / "total_bytes")
        put(cache, *(f"more{i}" for i in range(8)))
        assert cache.size_bytes() <= cache.limit_bytes


def test_half_written_files_are_cleared_when_old(tmp_path: Path) -> None:
    cache = FrameCache(tmp_path, 2 * (CLIP_BYTES + 1000))
    old, new = tmp_path / "old.npy.part", tmp_path / "new.npy.part"
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
    assert [p.name for p in cache.dir.iterdir()] == ["total_bytes"]


def die_making(cache: FrameCache, clip_id: str) -> None:
    """A process is killed while it makes the clip."""
    maker = get_context("spawn").Process(target=cache.get_or_make, args=(clip_id, partial(time.sleep, 60)))
    deaths = cache.dir / f"{clip_id}.tries"
    before = deaths.stat().st_size if deaths.exists() else 0
    maker.start()
    try:
        deadline = time.monotonic() + 30
        while not deaths.exists() or deaths.stat().st_size == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        maker.kill()
        maker.join()


def test_lock_of_a_killed_process_is_free(cache: FrameCache) -> None:
    die_making(cache, "a")
    put(cache, "a")
    assert sorted(p.name for p in cache.dir.iterdir()) == ["a.json", "a.npy", "total_bytes"]


def test_clip_that_kills_its_makers_is_refused_for_a_while(cache: FrameCache) -> None:
    die_making(cache, "a")
    die_making(cache, "a")
    for _ in range(2):
        with pytest.raises(MakerDied) as caught:
            cache.get_or_make("a", forbidden)
    put(cache, "b")
    past = time.time() - DEATHS_COUNT_S - 1
    os.utime(caught.value.record, (past, past))
    put(cache, "a")


def test_a_decode_that_fails_properly_is_no_death(cache: FrameCache) -> None:
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
    assert not list(cache.dir.glob("*.lock")) and not list(cache.dir.glob("*.part"))


def slow_clip(clip_id: str) -> Clip:
    time.sleep(0.05)
    return make_clip(clip_id)
