from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from rlvid.data import ray_stream
from rlvid.data.ray_stream import ClipStream, StreamRow, _fill_gaps
from rlvid.errors import UserError
from rlvid.types import Medium, Message, Sample
from rlvid.video.cache import FrameCache
from rlvid.video.clip_reader import ClipReader
from tests.video.media import read_numbers, video_config, write_video

pytestmark = pytest.mark.engine

N_GOOD, N_BAD = 10, 3


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    ray.init(num_cpus=2, object_store_memory=300_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clip i starts with the number i; three files are bad."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(N_GOOD):
        write_video(folder / f"{i}.mp4", range(i, i + 10))
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").touch()
    return folder


@pytest.fixture
def samples(clips: Path) -> list[Sample]:
    names = [f"{i}.mp4" for i in range(N_GOOD)] + ["text.mp4", "empty.mp4", "missing.mp4"]
    return [make_sample(name.removesuffix(".mp4"), clips / name) for name in names]


def make_sample(sample_id: str, *paths: Path) -> Sample:
    media = tuple(Medium(str(path)) for path in paths)
    return Sample(sample_id, media, (Message.about(media, "What is seen?"),), answer="")


def make_stream(samples: list[Sample], cache: Path, seed: int = 0, **keys: Any) -> ClipStream:
    reader = ClipReader(video_config(frames=4), 28, FrameCache(cache, 10**9))
    return ClipStream(samples, reader, seed, **({"rows_per_block": 2} | keys))


def ids(rows: list[StreamRow]) -> list[str]:
    return [row.sample.id for row in rows]


@pytest.mark.usefixtures("ray_session")
class TestWithRay:
    def test_bad_clips_are_rows_with_a_reason_and_nothing_is_lost(self, samples: list[Sample], tmp_path: Path) -> None:
        rows = list(make_stream(samples, tmp_path).epoch(0))
        assert sorted(ids(rows)) == sorted(sample.id for sample in samples)
        assert [row.offset for row in rows] == list(range(N_GOOD + N_BAD))
        bad = {row.sample.id: row.error.reason for row in rows if row.error}
        assert bad == {
            "text": "cannot be opened: Invalid data found when processing input",
            "empty": "is empty (0 bytes)",
            "missing": "there is no such file",
        }
        assert all(len(row.clip_ids) == (row.error is None) and row.n_cached == 0 for row in rows)
        assert all(row.error.path == row.sample.media[0].path for row in rows if row.error)

    def test_clips_are_opened_from_the_cache_by_id(self, samples: list[Sample], tmp_path: Path) -> None:
        cache = FrameCache(tmp_path, 10**9)
        for row in make_stream(samples[:4], tmp_path).epoch(0):
            clip = cache.get(row.clip_ids[0])
            assert clip is not None and row.frames is None
            assert read_numbers(clip.frames)[0] == int(row.sample.id)

    def test_second_epoch_decodes_nothing_and_has_another_order(self, samples: list[Sample], tmp_path: Path) -> None:
        clip_stream = make_stream(samples, tmp_path)
        first, second = list(clip_stream.epoch(0)), list(clip_stream.epoch(1))
        assert sum(row.n_cached for row in first) == 0
        assert sum(row.n_cached for row in second) == N_GOOD
        assert {row.sample.id: row.clip_ids for row in second} == {row.sample.id: row.clip_ids for row in first}
        assert ids(second) != ids(first) and sorted(ids(second)) == sorted(ids(first))

    @pytest.mark.parametrize("offset", [0, 5, 12, 13])
    def test_resumed_epoch_gives_the_rest_in_the_same_order(
        self, samples: list[Sample], tmp_path: Path, offset: int
    ) -> None:
        whole = list(make_stream(samples, tmp_path, seed=3).epoch(2))
        rest = list(make_stream(samples, tmp_path, seed=3).epoch(2, offset))
        assert ids(rest) == ids(whole)[offset:]
        assert [row.offset for row in rest] == list(range(offset, len(samples)))
        assert ids(list(make_stream(samples, tmp_path, seed=4).epoch(2))) != ids(whole)

    def test_consumer_may_stop_in_between(self, samples: list[Sample], tmp_path: Path) -> None:
        rows = make_stream(samples, tmp_path).epoch(0)
        first = next(rows)
        rows.close()  # type: ignore[attr-defined]
        assert not [t for t in threading.enumerate() if t.name == "iter_threaded"]  # it would outlive Ray
        assert next(make_stream(samples, tmp_path).epoch(0)).sample == first.sample

    def test_frames_come_along_when_asked_for(self, clips: Path, samples: list[Sample], tmp_path: Path) -> None:
        tall = write_video(tmp_path / "tall.mp4", range(50, 60), size=(96, 160))
        mixed = [
            *samples,
            make_sample("two", clips / "1.mp4", tall),
            make_sample("half_bad", clips / "1.mp4", clips / "text.mp4"),
            make_sample("text_only"),
        ]
        video = video_config(frames=4, height=None, width=None)
        reader = ClipReader(video, 28, FrameCache(tmp_path / "cache", 10**9))
        rows = {row.sample.id: row for row in ClipStream(mixed, reader, 0, with_frames=True, rows_per_block=2).epoch(0)}
        assert len(rows) == len(mixed)
        for i in range(N_GOOD):
            (frames,) = rows[str(i)].frames or ()
            assert frames.dtype == np.uint8 and frames.shape == (4, 84, 168, 3) and not frames.flags.writeable
            assert read_numbers(frames) == [i, i + 3, i + 6, i + 9]
        wide_frames, tall_frames = rows["two"].frames or ()
        assert read_numbers(wide_frames)[0] == 1 and read_numbers(tall_frames)[0] == 50
        assert tall_frames.shape == (4, 168, 84, 3)
        for name in ("half_bad", "empty"):
            assert rows[name].frames == () and rows[name].clip_ids == () and rows[name].error is not None
        assert rows["text_only"].frames == () and rows["text_only"].error is None

    def test_wrong_configuration_is_the_users_error(self, samples: list[Sample], tmp_path: Path) -> None:
        clip_stream = make_stream(samples, tmp_path)
        clip_stream._task_args["multiple"] = 32  # as if this machine's check had not seen it
        with pytest.raises(UserError, match=r"video\.height=84"):
            list(clip_stream.epoch(0))

    def test_clip_that_kills_its_workers_is_a_bad_row_and_costs_no_other(
        self, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read_row = ray_stream._read_row
        killer = samples[4]

        def read_row_with_killer(row: dict[str, Any], **args: Any) -> dict[str, Any]:
            from rlvid.video import pyav_reader

            read_frames = pyav_reader.read_frames

            def read_or_die(medium: Medium, *rest: Any) -> Any:
                if medium == killer.media[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return read_frames(medium, *rest)

            pyav_reader.read_frames = read_or_die  # type: ignore[assignment]  # in this worker only
            return read_row(row, **args)

        monkeypatch.setattr(ray_stream, "_read_row", read_row_with_killer)
        rows = list(make_stream(samples, tmp_path).epoch(0))
        assert sorted(ids(rows)) == sorted(sample.id for sample in samples)
        (bad,) = [row for row in rows if row.sample.id == killer.id]
        assert bad.error is not None and "crashed several processes" in bad.error.reason
        assert sum(row.error is None for row in rows) == N_GOOD - 1


def test_no_samples_give_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        list(make_stream([], tmp_path).epoch(0))


def test_rows_of_lost_blocks_are_bad_rows() -> None:
    references = [{"offset": i, "videos": [f"{i}.mp4"]} for i in range(3, 10)]
    kept = [ray_stream._empty_row(offset) | {"clip_ids": ["c"]} for offset in (4, 7, 8)]
    rows = list(_fill_gaps(kept, references))
    assert [row["offset"] for row in rows] == list(range(3, 10))
    assert [row["offset"] for row in rows if row["bad_reason"]] == [3, 5, 6, 9]
    assert rows[0]["bad_path"] == "3.mp4" and "lost" in rows[0]["bad_reason"]


def test_rows_out_of_order_are_an_error() -> None:
    references = [{"offset": i, "videos": []} for i in range(3)]
    with pytest.raises(RuntimeError, match="out of order"):
        list(_fill_gaps([ray_stream._empty_row(1), ray_stream._empty_row(0)], references))
