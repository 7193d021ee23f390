"""Synthetic clips: moving shapes in real H.264 files, with questions whose answers are exact.

Five kinds of question: colour, shape and direction of one moving shape, which of two colours comes first, how many
shapes there are. Everything follows from the seed, the bytes of the files too (one encoder thread).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.video.stream import VideoStream

from rlvid.config import SyntheticConfig
from rlvid.errors import UserError
from rlvid.files import dumps, naming_write_errors, write_atomic, write_rows

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 215, 50),
    "white": (235, 235, 235),
    "purple": (170, 50, 200),
}
SHAPES = ("square", "circle", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = ("one", "two", "three", "four")
AXES = (("left", "right"), ("up", "down"))
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "order": tuple(COLOURS), "count": NUMBERS}
QUESTIONS = {
    "colour": "What colour is the moving shape?",
    "shape": "Which shape is moving?",
    "direction": "Does the shape move {} or {}?",  # one of AXES
    "order": "Which colour comes first?",
    "count": "How many shapes are there?",
}
FPS = 8
H264 = {"preset": "veryfast", "crf": "16"}  # options of libx264

Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Figure:
    """One shape: where it is at the start, how far it moves in the clip, and in which frames it is seen."""

    shape: str
    colour: str
    radius: float  # pixels
    start: tuple[float, float]  # centre (x, y), pixels
    travel: tuple[float, float]  # from first to last frame, pixels
    first: int = 0
    last: int | None = None  # half-open


def make_synthetic(out_dir: Path, cfg: SyntheticConfig, seed: int) -> tuple[Path, Path]:
    """Write clips and two manifests into `out_dir`; return the paths of `train.jsonl` and `eval.jsonl`.

    Beside them are `train_pairs.jsonl` and `eval_pairs.jsonl`: the same rows with the right answer as `chosen` and a
    wrong one as `rejected`. A folder that already holds the same set is left as it is; one that holds another set is
    refused.

    Raises:
        UserError: `out_dir` holds something else, or cannot be written.
    """
    stamp = out_dir / "synthetic.json"
    spec = {"seed": seed, **cfg.model_dump(mode="json")}
    manifests = out_dir / "train.jsonl", out_dir / "eval.jsonl"
    if stamp.exists():
        if json.loads(stamp.read_text()) == spec and all(pairs_of(m).exists() for m in manifests):
            return manifests
        raise UserError(f"{out_dir} has a synthetic set of other settings ({stamp}): remove it or give another folder")
    with naming_write_errors(
        f"the synthetic set {out_dir}", "free some space or name another folder, and start it again"
    ):
        (out_dir / "clips").mkdir(parents=True, exist_ok=True)
        for split, (path, n) in enumerate(zip(manifests, (cfg.train, cfg.eval), strict=True)):
            # Independent streams: the train set does not change when the eval set grows.
            rng = np.random.default_rng([seed, split])
            rows = [_make_clip(out_dir, path.stem, i, cfg, rng) for i in range(n)]
            write_rows(path, rows)
            wrong = np.random.default_rng([seed, split, 1])
            pairs = [{**row, "chosen": row["answer"], "rejected": wrong_answer(row, wrong)} for row in rows]
            write_rows(pairs_of(path), pairs)
        write_atomic(stamp, dumps(spec))  # last: an interrupted set is made again
    return manifests


def _make_clip(out_dir: Path, split: str, i: int, cfg: SyntheticConfig, rng: np.random.Generator) -> dict[str, Any]:
    kind = cfg.kinds[i % len(cfg.kinds)]
    figures, answer = _draw_scene(kind, cfg, rng)
    background = int(rng.integers(8, 40))
    name = f"{split}-{i:06d}"
    video = Path("clips") / f"{name}.mp4"
    write_mp4(out_dir / video, render(figures, cfg.size, cfg.frames, background), FPS)
    return {
        "id": name,
        "video": str(video),
        "question": QUESTIONS[kind].format(*possible_answers(kind, answer)),
        "answer": answer,
        "problem_type": kind,
        "description": _describe(kind, figures),
    }


def _describe(kind: str, figures: list[Figure]) -> str:
    """What is seen, as far as a question could ask about it."""
    if kind == "count":
        verb, plural = ("is", "") if len(figures) == 1 else ("are", "s")
        return f"There {verb} {NUMBERS[len(figures) - 1]} shape{plural}."
    first = figures[0]
    if kind == "order":
        return f"First a {first.colour} {first.shape}, then a {figures[1].colour} {figures[1].shape}."
    way = next(name for name, (x, y) in DIRECTIONS.items() if x * first.travel[0] + y * first.travel[1] > 0)
    return f"A {first.colour} {first.shape} moves {way}."


def pairs_of(manifest: Path) -> Path:
    """Where the pairs of a synthetic manifest are."""
    return manifest.with_name(f"{manifest.stem}_pairs.jsonl")


def possible_answers(kind: str, answer: str) -> tuple[str, ...]:
    """All answers that a question allows, given the right one."""
    return ANSWERS.get(kind) or next(axis for axis in AXES if answer in axis)


def wrong_answer(row: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Another answer that the row's question allows."""
    right = row["answer"]
    return str(rng.choice([answer for answer in possible_answers(row["problem_type"], right) if answer != right]))


def _draw_scene(kind: str, cfg: SyntheticConfig, rng: np.random.Generator) -> tuple[list[Figure], str]:
    """Draw the figures of one clip at random, and the answer to its question."""
    size, middle = cfg.size, cfg.frames // 2
    colours = [str(c) for c in rng.permutation(list(COLOURS))]
    figures = []
    if kind == "count":
        answer = NUMBERS[int(rng.integers(len(NUMBERS)))]
        cells = rng.permutation(4)[: NUMBERS.index(answer) + 1]
        dx, dy = rng.uniform(-0.08, 0.08, size=2) * size
        for cell in cells:
            shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
            start = (cell % 2 + 0.5) * size / 2, (cell // 2 + 0.5) * size / 2
            figures.append(Figure(shape, colour, rng.uniform(0.13, 0.16) * size, start, (dx, dy)))
        return figures, answer
    if kind == "order":
        for colour, first, last in ((colours[0], 0, middle), (colours[1], middle, None)):
            shape, radius = str(rng.choice(SHAPES)), rng.uniform(0.2, 0.26) * size
            start = rng.uniform(0.35, 0.65) * size, rng.uniform(0.35, 0.65) * size
            travel = rng.uniform(-0.1, 0.1) * size, rng.uniform(-0.1, 0.1) * size
            figures.append(Figure(shape, colour, radius, start, travel, first, last))
        return figures, colours[0]
    shape, direction = str(rng.choice(SHAPES)), str(rng.choice(list(DIRECTIONS)))
    dx, dy = DIRECTIONS[direction]
    # A shape is recognised by its outline, so it is large and moves little; a direction needs a long way.
    radii, reach = ((0.28, 0.36), (0.1, 0.2)) if kind == "shape" else ((0.15, 0.2), (0.6, 0.7))
    way = rng.uniform(*reach) * size
    off_axis = rng.uniform(0.42, 0.58) * size
    start = size / 2 - dx * way / 2 if dx else off_axis, size / 2 - dy * way / 2 if dy else off_axis
    figure = Figure(shape, colours[0], rng.uniform(*radii) * size, start, (dx * way, dy * way))
    return [figure], {"colour": colours[0], "shape": shape, "direction": direction}[kind]


def render(figures: list[Figure], size: int, n_frames: int, background: int) -> Frames:
    """Draw `figures` on a grey ground: [n_frames, size, size, 3] uint8 RGB."""
    frames = np.full((n_frames, size, size, 3), background, dtype=np.uint8)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    for figure in figures:
        for t in range(n_frames)[figure.first : figure.last]:
            part = t / (n_frames - 1)
            u = (x - figure.start[0] - part * figure.travel[0]) / figure.radius
            v = (y - figure.start[1] - part * figure.travel[1]) / figure.radius
            frames[t][_covers(figure.shape, u, v)] = COLOURS[figure.colour]
    return frames


def _covers(shape: str, u: npt.NDArray[np.float64], v: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Pixels inside the shape; u and v are coordinates from its centre in radii."""
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.9
    if shape == "circle":
        return np.hypot(u, v) < 1.0
    return (v < 0.8) & (v > 2 * abs(u) - 1)  # triangle, point up


def write_mp4(
    path: Path, frames: Frames, fps: int, encoder: str = "libx264", options: Mapping[str, str] = H264
) -> None:
    """Write [T, H, W, 3] uint8 RGB frames as yuv420p with a keyframe a second, whole or not at all."""
    part = path.with_suffix(".part")
    with av.open(str(part), "w", format="mp4") as container:
        stream = cast(VideoStream, container.add_stream(encoder, rate=Fraction(fps)))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"threads": "1", "g": str(fps), **options}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.replace(path)
