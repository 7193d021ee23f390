"""Encoders in a real Ray session."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.experimental import get_object_locations

from actors.clip_store import INLINE_BYTES, ClipStore, Encoder
from rlvid.config import GrpoJobConfig
from rlvid.data.manifest import load_manifest
from rlvid.errors import UserError
from rlvid.rollout.engine import Refused
from rlvid.types import Medium, Message, Prompt, Sample

pytestmark = pytest.mark.usefixtures("local_ray")

Make = Callable[..., ClipStore]
TALK = tuple(Message(role, ("and which way does it move?",)) for role in ("assistant", "user") * 10)


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    def make(
        n_clips: int = 20, on_bad: Any = lambda path, reason: None, n_samples: int = 0, **sections: Any
    ) -> ClipStore:
        cfg = GrpoJobConfig.model_validate(
            {
                "model": {"tiny": {}},
                "data": {"synthetic": {}, "cache_dir": str(tmp_path / "cache"), **sections.pop("data", {})},
                "video": {"height": 56, "width": 56, **sections.pop("video", {})},
                **sections,
            }
        )
        return ClipStore(cfg, tiny_model, n_clips, on_bad, n_samples)

    return make


@pytest.fixture
def samples(synthetic: Path) -> list[Sample]:
    return load_manifest(synthetic / "train.jsonl", None, None, "")[:4]


def test_each_clip_is_decoded_once_whatever_asks_for_it(make: Make, samples: list[Sample]) -> None:
    clips = make()
    first, *_ = clips.encode(samples)
    clips.encode(samples * 3)
    assert (clips.decodes, clips.cache_hits) == (4, 12)
    prompt: Prompt = ray.get(first.prompt)
    assert (first.n_tokens, first.cost) == (prompt.length, prompt.length + len(prompt.patches))
    assert not prompt.patches.flags.writeable  # a view into the object store, not a copy
    again = make()
    again.encode(samples)
    assert (again.decodes, again.cache_hits) == (0, 4)


@pytest.mark.parametrize("side", [28, 56, 112])
def test_prompts_of_any_size_lie_in_the_object_store(make: Make, samples: list[Sample], side: int) -> None:
    encoded = make(video={"height": side, "width": side}).encode(samples)
    located = get_object_locations([e.prompt for e in encoded])
    for prompt in (e.prompt for e in encoded):
        value: Prompt = ray.get(prompt)
        assert (value.patches.nbytes < INLINE_BYTES) == (side < 112)
        assert located[prompt]["node_ids"], "Ray carries it within its messages"
        assert located[prompt]["object_size"] < 1.1 * (value.patches.nbytes + value.token_ids.nbytes) + 1000


def test_variants_have_ids_and_pixels_of_their_own(make: Make, samples: list[Sample]) -> None:
    clips = make()
    moving = [s for s in samples if s.problem_type == "direction"]
    plain, tall, altered = (ray.get(clips.encode(moving, v)[0].prompt) for v in ("as_is", "tall", "altered"))  # type: ignore[arg-type]
    assert len({plain.clip_ids, tall.clip_ids, altered.clip_ids}) == 3
    t, h, w = tall.grid_thw[0]
    assert t > max(h, w) // 2
    assert not np.array_equal(plain.patches, altered.patches)


def test_bad_clips_are_left_out_and_told_once(make: Make, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    told: list[tuple[str, str]] = []
    bad = [
        Sample(str(i), (Medium(str(path)),), samples[0].messages, "x")
        for i, path in enumerate((tmp_path / "text.mp4", tmp_path / "none.mp4"))
    ]
    clips = make(on_bad=lambda path, reason: told.append((Path(path).name, reason)))
    assert [e.sample.id for e in clips.encode([bad[0], samples[0], bad[1], bad[0]])] == [samples[0].id]
    assert clips.encode(bad) == []
    assert sorted(name for name, _ in told) == ["none.mp4", "text.mp4"]
    assert clips.decodes == 1


def test_too_many_bad_clips_stop_the_run(make: Make, samples: list[Sample], tmp_path: Path) -> None:
    bad = [Sample(str(i), (Medium(str(tmp_path / f"none-{i}.mp4")),), samples[0].messages, "x") for i in range(3)]
    clips = make(n_clips=20, data={"max_bad_fraction": 0.1})
    clips.encode(bad[:2])  # 2 of 20 are just allowed
    with pytest.raises(UserError, match=r"3 of 20 clips cannot be read.*max_bad_fraction=0.1(.|\n)*none-0.mp4"):
        clips.encode(bad[2:])


def test_prompts_that_do_not_fit_are_set_aside_up_to_a_limit(make: Make, samples: list[Sample]) -> None:
    told: dict[str, str] = {}
    keys = {"rollout": {"max_model_len": 104, "max_tokens": 16}, "data": {"max_bad_fraction": 0.25}}
    clips = make(on_bad=told.__setitem__, n_samples=8, **keys)
    long = [replace(s, id=f"long-{i}", messages=(*s.messages, *TALK)) for i, s in enumerate(samples)]
    assert [e.sample for e in clips.encode([*long[:2], samples[3]])] == [samples[3]]
    assert sorted(told) == ["sample 'long-0'", "sample 'long-1'"]
    assert "tokens (16 of them video), but the context has room for 88" in told["sample 'long-0'"]
    with pytest.raises(UserError, match=r"3 of 8 samples have a prompt that is too long(.|\n)*long-0: its prompt has"):
        clips.encode(long[2:3])


def test_a_prompt_that_the_engine_refuses_does_not_take_the_others_along(make: Make, samples: list[Sample]) -> None:
    told: dict[str, str] = {}
    clips = make(on_bad=told.__setitem__, n_samples=4)
    prompts = clips.encode(samples)
    kept, groups = clips.answered(prompts, [[], Refused("too many videos"), [], []])
    assert [p.sample.id for p in kept] == [samples[i].id for i in (0, 2, 3)] and len(groups) == 3
    assert told == {f"sample {samples[1].id!r}": "the engine refused its prompt: too many videos"}


class Sleepy(Encoder):
    """Hangs or dies where a real decoder might, in native code; the rest is the encoder's own."""

    def __init__(self, source: Any):
        super().__init__(source)
        read = self.reader.read

        def moody(medium: Medium) -> Any:
            import os
            import time

            if "hang" in medium.path:
                time.sleep(600)
            if "crash" in medium.path:
                os._exit(1)
            return read(medium)

        self.reader.read = moody  # type: ignore[method-assign]


def test_a_reader_that_hangs_or_crashes_costs_one_clip(
    make: Make, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.clip_store.Encoder", Sleepy)
    monkeypatch.setattr("actors.clip_store.ENCODER_START_S", 10.0)
    told: dict[str, str] = {}
    clips = make(on_bad=told.__setitem__, video={"timeout_s": 1.0})
    doomed = [Sample(name, (Medium(f"/{name}.mp4"),), samples[0].messages, "x") for name in ("hang", "crash")]
    encoded = clips.encode([*doomed, *samples])
    assert [e.sample.id for e in encoded] == [s.id for s in samples]
    assert told == {"/hang.mp4": "not read within 11 s", "/crash.mp4": "the process that read it crashed"}


def test_closing_waits_for_no_reader_and_leaves_no_thread(
    make: Make, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.clip_store.Encoder", Sleepy)
    told: list[str] = []
    clips = make(on_bad=lambda path, reason: told.append(path), placement={"encoders": 1})
    clips.encode(samples[:1])
    (thread,) = clips._pool._threads
    under_way, waiting = clips.submit([replace(samples[1], media=(Medium("/hang.mp4"),)), samples[2]])
    while not under_way.running():
        time.sleep(0.01)
    begin = time.monotonic()
    clips.close()
    assert time.monotonic() - begin < 10 and under_way.result() is None and waiting.cancelled() and not told
    assert not thread.is_alive()


def test_strips_are_small_pictures(make: Make, samples: list[Sample]) -> None:
    strips = make().strips(samples[:2])
    assert set(strips) == {s.id for s in samples[:2]}
    assert all(jpeg.startswith(b"\xff\xd8") for jpegs in strips.values() for jpeg in jpegs)
    assert [len(jpegs) for jpegs in strips.values()] == [6, 6]
