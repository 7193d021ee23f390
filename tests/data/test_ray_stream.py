"""Prompts through Ray Data, with real clips and real encoders."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from rlvid.config import VideoConfig
from rlvid.data import ray_stream
from rlvid.data.encoding import Outcome, Source
from rlvid.data.ray_stream import open_prompt, prompt_stream
from rlvid.types import Medium, Message, Prompt, Sample
from tests.video.media import write_video

pytestmark = pytest.mark.engine
NAMES = ["a", "b", "c", "d", "text", "missing"]
ORDER = [3, 0, 4, 1, 5, 2, 0]


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, object_store_memory=300_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("clips")
    for i, name in enumerate(NAMES[:4]):
        write_video(folder / f"{name}.mp4", range(i, i + 10))
    (folder / "text.mp4").write_text("no video")
    media = {name: (Medium(str(folder / f"{name}.mp4")),) for name in NAMES}
    return [Sample(name, media[name], (Message.about(media[name], "What is seen?"),), answer="") for name in NAMES]


@pytest.fixture
def source(tiny_model: Path, tmp_path: Path) -> Source:
    return Source(tiny_model, VideoConfig(frames=4, height=56, width=56), tmp_path, 10**9, max_prompt_tokens=512)


def rows(
    samples: list[Sample], source: Source, order: Sequence[int] = ORDER
) -> list[tuple[str, Prompt | None, Outcome]]:
    opened = map(open_prompt, prompt_stream(ray.put(samples), order, source, 1, 0.5).iter_rows())
    return [(samples[index].id, prompt, outcome) for index, prompt, outcome in opened]


@pytest.mark.usefixtures("ray_session")
class TestWithRay:
    def test_prompts_come_in_the_order_given_and_bad_clips_are_rows_with_a_reason(
        self, samples: list[Sample], source: Source
    ) -> None:
        found = rows(samples, source)
        assert [name for name, _, _ in found] == [NAMES[i] for i in ORDER]
        assert all(prompt.sample_id == name for name, prompt, _ in found if prompt is not None)
        bad = {Path(o.bad[0]).name: o.bad[1] for _, prompt, o in found if o.bad and prompt is None}
        assert bad == {
            "text.mp4": "cannot be opened: Invalid data found when processing input",
            "missing.mp4": "there is no such file",
        }
        assert sum(o.decodes for _, _, o in found) == 4 and sum(o.cache_hits for _, _, o in found) == 1
        again = rows(samples, source)
        assert sum(o.decodes for _, _, o in again) == 0 and sum(o.cache_hits for _, _, o in again) == 5

    def test_a_prompt_that_does_not_fit_is_a_row_with_its_reason(self, samples: list[Sample], source: Source) -> None:
        small = Source(source.model, source.video, source.cache_dir, source.cache_bytes, max_prompt_tokens=4)
        ((_, prompt, outcome),) = rows(samples, small, [0])
        assert prompt is None and outcome.is_prompt_bad
        assert outcome.bad is not None and outcome.bad[0] == "a" and "but the context has room for 4" in outcome.bad[1]

    def test_a_clip_that_ends_its_encoder_is_a_bad_row_and_costs_no_other(
        self, samples: list[Sample], source: Source, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(ray_stream._RowEncoder):  # sent to the workers by value
            def __init__(self, *args: object, **keys: object):
                super().__init__(*args, **keys)  # type: ignore[arg-type]
                from rlvid.video import pyav_reader

                read_frames = pyav_reader.read_frames

                def read_or_die(medium: Medium, *rest: Any) -> Any:
                    if Path(medium.path).name == "b.mp4":
                        os.kill(os.getpid(), signal.SIGKILL)
                    return read_frames(medium, *rest)

                pyav_reader.read_frames = read_or_die  # type: ignore[assignment]  # in this worker only

        monkeypatch.setattr(ray_stream, "_RowEncoder", Killed)
        found = rows(samples, source, [0, 1, 2, 3])
        assert [name for name, _, _ in found] == ["a", "b", "c", "d"]
        assert [name for name, prompt, _ in found if prompt is None] == ["b"]
        bad = found[1][2].bad
        assert bad is not None and "crashed several processes" in bad[1] and bad[0].endswith("b.mp4")
