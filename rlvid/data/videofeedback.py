"""VideoFeedback (TIGER-Lab/VideoFeedback) and files like it as a manifest for `rlvid reward-model`.

An item is `{"id", "images": [...] or "video", ...}` in one of two forms: regression (`prompt`, `labels`) or
conversation (`conversations`: the human text with the caption in it, then "visual quality: 1", a line per dimension). A
row of ours is

    {"id", "video", "question", "answer", "prompt", "labels", "source"}

with the caption as `prompt`, a field of its own: it is never again recovered from a text. Frames that come as pictures
become one lossless clip (FFV1), so that everything behind sees a video like any other.

Items are judged one by one. What is refused stands in `refused.jsonl` with the reason; the others keep their labels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import numpy.typing as npt

from rlvid.errors import UserError
from rlvid.rewards.videoscore import ALIGNMENT, CAPTION_BEGINS, CAPTION_ENDS, DIMS, NoScore, Rubric

SourceName = Literal["annotated", "real", "both"]
FPS = 8  # of VideoFeedback's videos
RUBRIC = Rubric("regression", DIMS, 1, 4, "integer", {})


def convert(
    source: Path, out: Path, which: SourceName = "both", mismatched: float = 0.0, seed: int = 0
) -> tuple[Path, int, int]:
    """Write `manifest.jsonl`, `clips/` and `refused.jsonl` into `out`.

    Args:
        source: a file of items (JSON list or JSON lines), or a folder of such files. Frames and videos are named
            relative to the item's file and stay under its folder.
        which: annotated (generated videos with human scores), real (real ones, which score 4 throughout), or both.
        mismatched: share of items that come a second time with another item's caption and text-to-video alignment 1.
            Without them a model learns to ignore the caption (VideoScore issue 4; v1.1 added such pairs).

    Returns:
        The manifest, its number of rows, the number of refused items.

    Raises:
        UserError: nothing to read, or nothing left.
    """
    (out / "clips").mkdir(parents=True, exist_ok=True)
    items = list(_items(source))
    first = {_name(item): where for where, _, item in reversed(items)}

    def made(where: str, file: Path, item: Any) -> dict[str, Any] | NoScore | None:
        try:
            if _name(item) and (earlier := first[_name(item)]) != where:
                raise NoScore(f"it has the same id as {earlier}")
            return _row(item, file.parent, out, which)
        except NoScore as e:
            return e

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding and encoding let go of the interpreter
        outcomes = list(pool.map(made, *zip(*items, strict=True))) if items else []
    rows = [row for row in outcomes if isinstance(row, dict)]
    refused = [
        {"id": _name(item) or None, "where": where, "reason": str(outcome)}
        for (where, _, item), outcome in zip(items, outcomes, strict=True)
        if isinstance(outcome, NoScore)
    ]
    _write(out / "refused.jsonl", refused)
    if not rows:
        why = f"; the first: {refused[0]['where']}: {refused[0]['reason']}" if refused else ""
        raise UserError(f"{source}: no item left for source={which}, {len(refused)} refused{why}")
    rows += mismatch(rows, mismatched, np.random.default_rng(seed))
    _write(out / "manifest.jsonl", rows)
    return out / "manifest.jsonl", len(rows), len(refused)


def mismatch(rows: Sequence[Mapping[str, Any]], share: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Rows of a share of the videos with another video's caption: alignment is 1, the other scores are the video's."""
    if not 0 <= share <= 1:
        raise UserError(f"the share of mismatched items must be from 0 to 1, got {share:g}")
    chosen = sorted(rng.permutation(len(rows))[: round(share * len(rows))].tolist())
    made = []
    for i in chosen:
        row = rows[i]
        others = [r["prompt"] for r in rows if r["prompt"] != row["prompt"]]
        if not others:
            raise UserError("all items have the same caption: there is none to mismatch them with")
        caption = others[int(rng.integers(len(others)))]
        labels = {**row["labels"], ALIGNMENT: 1.0}
        made.append({**row, **_texts(caption, labels), "id": f"{row['id']}-mismatched", "source": "mismatched"})
    return made


def caption_of(text: str) -> str:
    """The caption inside VideoFeedback's prompt, between the template's own words before and after it.

    The template begins with its words and ends with them, so the first beginning and the last end are its own, whatever
    the caption holds.

    Raises:
        NoScore: the template's words are not there.
    """
    begin, end = text.find(CAPTION_BEGINS), text.rfind(CAPTION_ENDS)
    if begin < 0 or end < begin + len(CAPTION_BEGINS):
        raise NoScore("its text is not VideoFeedback's prompt: the words around the caption are missing")
    caption = text[begin + len(CAPTION_BEGINS) : end].strip()
    if not caption:
        raise NoScore("its caption is empty")
    return caption


def labels_of(text: str) -> dict[str, float]:
    """Scores of the conversation form, a line `name: score` each.

    Raises:
        NoScore: a line has another form, or a name comes twice.
    """
    labels: dict[str, float] = {}
    for line in filter(str.strip, text.split("\n")):
        match = re.fullmatch(r"\s*([^:]+?)\s*: *(\d+(?:\.\d+)?)\s*", line)
        if match is None or match[1] in labels:
            raise NoScore(f"not a line `name: score` of its own: {line[:60]!r}")
        labels[match[1]] = float(match[2])
    return labels


def _items(source: Path) -> Iterator[tuple[str, Path, Any]]:
    """(where, file, item) of all files."""
    files = sorted(f for p in ("*.json", "*.jsonl") for f in source.rglob(p)) if source.is_dir() else [source]
    if not files:
        raise UserError(f"{source} holds no *.json or *.jsonl file of items")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
            items = (
                json.loads(text)
                if text.lstrip().startswith("[")
                else [json.loads(x) for x in text.split("\n") if x.strip()]
            )
        except (OSError, ValueError) as e:
            raise UserError(f"{file} cannot be read as a JSON list or JSON lines: {e}") from e
        yield from ((f"{file}: item {i}", file, item) for i, item in enumerate(items))


def _name(item: Any) -> str:
    """An item's id as text; "" where it has none."""
    value = item.get("id") if isinstance(item, dict) else None
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""


def _row(item: Any, folder: Path, out: Path, which: SourceName) -> dict[str, Any] | None:
    """The manifest row of one item; None if it is of the other source.

    Raises:
        NoScore: the item is refused.
    """
    if not (name := _name(item)):
        raise NoScore("expected an object with an id")
    # Items do not say where they are from; ids of real videos begin with p (p005353), those of Panda-70M.
    source = item.get("source") or ("real" if re.fullmatch(r"p\d+", name) else "annotated")
    if which not in ("both", source):
        return None
    talk = item.get("conversations")
    try:
        text = talk[0]["value"] if talk else item.get("prompt")
        labels = item["labels"] if "labels" in item else labels_of(talk[1]["value"]) if talk else None
    except (LookupError, TypeError, AttributeError):
        raise NoScore("conversations must be a human turn and a gpt turn, each with a value") from None
    if isinstance(item.get("text_prompt"), str) and item["text_prompt"].strip():
        caption = item["text_prompt"].strip()
    elif isinstance(text, str):
        caption = caption_of(text)
    else:
        raise NoScore("it has no prompt")
    scores = dict(zip(DIMS, RUBRIC.scores(labels), strict=True))
    video = _clip(item, name, folder, out)
    return {"id": name, "video": video, **_texts(caption, scores), "source": source}


def _texts(caption: str, labels: Mapping[str, float]) -> dict[str, Any]:
    lines = "\n".join(f"{name}: {labels[name]:g}" for name in DIMS)
    return {"question": RUBRIC.question(caption), "answer": lines, "prompt": caption, "labels": dict(labels)}


def _clip(item: Mapping[str, Any], name: str, folder: Path, out: Path) -> str:
    """Put the item's video under `out/clips`; returns its path relative to `out`. One that is there is kept."""
    stem = name if re.fullmatch(r"[\w-]{1,100}", name) else hashlib.sha256(name.encode()).hexdigest()
    if isinstance(video := item.get("video", item.get("file")), str):
        file = _inside(folder, video)
        target = Path("clips") / f"{stem}{file.suffix}"
        if not (out / target).exists():
            _place(lambda part: shutil.copyfile(file, part), out / target)
        return str(target)
    images = item.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(i, str) for i in images):
        raise NoScore("it has neither images, a list of files, nor a video")
    files = [
        _inside(folder, image, Path("images") / Path(image).name.split("_")[0] / Path(image).name) for image in images
    ]
    target = Path("clips") / f"{stem}.mkv"
    if not (out / target).exists():
        frames = [_picture(file) for file in files]
        if len({f.shape for f in frames}) > 1:
            raise NoScore("its frames differ in size")
        _place(lambda part: write_lossless(part, np.stack(frames), FPS), out / target)
    return str(target)


def _inside(folder: Path, name: str, otherwise: Path | None = None) -> Path:
    """A file under `folder`, at `name` or `otherwise` (VideoFeedback writes <id>_00.jpg for images/<id>/<id>_00.jpg).

    Raises:
        NoScore: there is none.
    """
    for path in (Path(name), otherwise):
        if path is None:
            continue
        absolute = Path(os.path.normpath(folder.absolute() / path))
        if folder.absolute() not in absolute.parents:
            raise NoScore(f"{name} is not under {folder}")
        if absolute.is_file():
            return absolute
    raise NoScore(f"there is no file {name}")


def _picture(file: Path) -> npt.NDArray[np.uint8]:
    """[H, W, 3] uint8 RGB."""
    try:
        with av.open(str(file)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    except (av.error.FFmpegError, StopIteration, IndexError) as e:
        raise NoScore(f"frame {file.name} cannot be read: {e}") from None


def write_lossless(path: Path, frames: npt.NDArray[np.uint8], fps: int) -> None:
    """Write [T, H, W, 3] uint8 RGB frames as FFV1 in Matroska, without loss in RGB."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _place(write: Any, target: Path) -> None:
    """Whole or not at all."""
    part = target.with_name(target.name + ".part")
    write(part)
    part.replace(target)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(path)
