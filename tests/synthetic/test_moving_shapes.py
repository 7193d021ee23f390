"""The answers are exact: they can be read off the decoded pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest

from rlvid.config import SyntheticConfig
from rlvid.errors import UserError
from rlvid.synthetic.moving_shapes import COLOURS, DIRECTIONS, NUMBERS, Figure, make_synthetic, render


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth")
    make_synthetic(folder, SyntheticConfig(train=60, eval=20), seed=11)
    return folder


def rows_of(folder: Path, split: str, kind: str | None = None) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    return [row for row in rows if kind in (None, row["problem_type"])]


def frames_of(path: Path) -> npt.NDArray[np.int64]:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(np.int64)


def figure_mask(frame: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Pixels that are clearly no background (which is dark grey)."""
    return frame.max(axis=-1) > 120


def colour_of(frame: npt.NDArray[np.int64]) -> str:
    mean = np.median(frame[figure_mask(frame)], axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def n_pieces(mask: npt.NDArray[np.bool_]) -> int:
    """Connected pieces of at least 20 pixels."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    count = 0
    while left:
        edge, size = [left.pop()], 1
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
            size += len(near)
        count += size >= 20
    return count


def test_colours(folder: Path) -> None:
    for row in rows_of(folder, "train", "colour"):
        assert colour_of(frames_of(folder / row["video"])[8]) == row["answer"]


def test_directions(folder: Path) -> None:
    for row in rows_of(folder, "train", "direction"):
        frames = frames_of(folder / row["video"])
        first, last = (np.argwhere(figure_mask(frames[i])).mean(axis=0)[::-1] for i in (0, -1))
        moved = last - first
        assert max(DIRECTIONS, key=lambda name: float(moved @ DIRECTIONS[name])) == row["answer"]
        assert row["answer"] in row["question"]


def test_orders(folder: Path) -> None:
    for row in rows_of(folder, "train", "order"):
        frames = frames_of(folder / row["video"])
        assert colour_of(frames[2]) == row["answer"] != colour_of(frames[-2])


def test_counts(folder: Path) -> None:
    for row in rows_of(folder, "train", "count"):
        assert NUMBERS[n_pieces(figure_mask(frames_of(folder / row["video"])[0])) - 1] == row["answer"]


def test_shapes_cover_what_they_should() -> None:
    def area(shape: str) -> int:
        return int(
            figure_mask(
                render([Figure(shape, "white", 20.0, (28.0, 28.0), (0.0, 0.0))], 56, 2, 10)[0].astype(np.int64)
            ).sum()
        )

    # side 2 * 0.9 r; pi r^2; base 1.8 r and height 1.8 r, halved
    assert area("square") == pytest.approx(36**2, rel=0.06)
    assert area("circle") == pytest.approx(np.pi * 20**2, rel=0.03)
    assert area("triangle") == pytest.approx(0.5 * 36 * 36, rel=0.06)


def test_kinds_have_equal_shares_and_splits_have_their_own_ids(folder: Path) -> None:
    kinds = [row["problem_type"] for row in rows_of(folder, "train")]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == dict.fromkeys(
        ("colour", "shape", "direction", "order", "count"), 12
    )
    assert not {r["id"] for r in rows_of(folder, "train")} & {r["id"] for r in rows_of(folder, "eval")}
    assert len(frames_of(folder / rows_of(folder, "eval")[0]["video"])) == 16


def test_same_seed_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "again", SyntheticConfig(train=6, eval=2), seed=11)
    make_synthetic(tmp_path / "other", SyntheticConfig(train=6, eval=2), seed=12)
    for row in rows_of(tmp_path / "again", "train"):
        assert (tmp_path / "again" / row["video"]).read_bytes() == (folder / row["video"]).read_bytes()
    assert rows_of(tmp_path / "again", "train") == rows_of(folder, "train")[:6]
    assert rows_of(tmp_path / "other", "train") != rows_of(tmp_path / "again", "train")


def test_a_finished_set_is_kept_and_another_one_refused(tmp_path: Path) -> None:
    cfg = SyntheticConfig(train=2, eval=1)
    train, _ = make_synthetic(tmp_path, cfg, seed=1)
    before = train.stat().st_mtime_ns
    make_synthetic(tmp_path, cfg, seed=1)
    assert train.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        make_synthetic(tmp_path, cfg, seed=2)
