"""`rlvid score`: scores of videos by a trained reward model, ranked (best of n). One process, no Ray."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvid.errors import BadClip, UserError
from rlvid.files import naming_write_errors, write_rows
from rlvid.reporting.console import Console
from rlvid.types import Medium

CACHE_BYTES = 2**30


def score(
    model: Path, videos: Sequence[Path], prompt: str, responses: Sequence[str], cache_dir: Path
) -> list[dict[str, Any]]:
    """One row per video (and response), best first; those without a score come last, with the reason.

    Raises:
        UserError: `model` is no reward model, or it scores responses and there are none.
    """
    import torch

    from rlvid.rewards.reward_model import ask, load_reward_model
    from rlvid.video.cache import FrameCache
    from rlvid.video.clip_reader import ClipReader

    model = model / "policy" if (model / "policy").is_dir() else model
    judge = load_reward_model(model, on_gpu=torch.cuda.is_available())
    rubric = judge.rubric
    if (rubric.kind == "bradley_terry") != bool(responses):
        needs = "scores responses: give --response" if not responses else "scores videos: leave out --response"
        raise UserError(f"{model} is a {rubric.kind} model, which {needs}")
    reader = ClipReader(rubric.video, judge.family.frame_multiple, FrameCache(cache_dir, CACHE_BYTES))
    rows: list[dict[str, Any]] = []
    prompts, read = [], []
    for video in videos:
        path = str(video.absolute())
        try:
            clip, _ = reader.read(Medium(path))
        except BadClip as e:
            rows.append({"video": str(video), "reason": e.reason})
            continue
        prompts.append(judge.family.encode(ask(rubric, str(video), [path], prompt), [clip]))
        read.append(video)
    for video, scored in zip(read, judge(prompts, [responses] * len(prompts) if responses else ()), strict=True):
        for one, response in zip(scored, responses or (None,), strict=True):
            row: dict[str, Any] = {"video": str(video)} | ({} if response is None else {"response": response})
            if one.scores is None:
                row["reason"] = one.reason
            else:
                ranked_by = one.soft or one.scores
                mean = sum(ranked_by.values()) / len(ranked_by)  # over dimensions, as upstream ranks
                row |= {"mean": mean, "scores": one.scores} | ({"soft": one.soft} if one.soft else {})
            rows.append(row)
    rows.sort(key=lambda row: -row.get("mean", float("-inf")))
    return [{"rank": i if "mean" in row else None, **row} for i, row in enumerate(rows, start=1)]


def main(arguments: argparse.Namespace) -> None:
    """Write the ranking to a file and print it; the best is the last line.

    Raises:
        UserError: nothing can be written, or some videos have no score, which the file names with the reason.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # otherwise its log hides the table
    out: Path = arguments.out
    with naming_write_errors(f"--out {out}", "name another file"):  # before the model is loaded
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a").close()
        if not out.stat().st_size:  # a score that fails leaves no file behind
            out.unlink()
    rows = score(arguments.model, arguments.videos, arguments.prompt, arguments.response, arguments.cache_dir)
    with naming_write_errors(f"--out {out}", "name another file"):
        write_rows(out, ({"prompt": arguments.prompt, **row} for row in rows))
    shown = ("video", "response") if arguments.response else ("video",)
    dims = list(next((row["scores"] for row in rows if "scores" in row), {}))
    console = Console()
    console.table(["rank", *shown, "mean", *dims], [_cells(row, shown) for row in rows])
    scored = [row for row in rows if "mean" in row]
    if scored:
        best = {"best": scored[0]["video"]} | {key: scored[0][key] for key in shown[1:]}
        console.result({**best, "mean": scored[0]["mean"], "n": len(scored), "scores": str(out)})
    if missing := [row for row in rows if "mean" not in row]:
        first = f"{missing[0]['video']}: {missing[0]['reason']}"
        raise UserError(f"{len(missing)} of {len(rows)} rows have no score, see {out}; the first: {first}")


def _cells(row: dict[str, Any], shown: Sequence[str]) -> list[str]:
    named = [row.get(key, "") for key in shown]
    if "scores" not in row:
        return ["-", *named, row["reason"]]
    return [str(row["rank"]), *named, *(f"{x:.3f}" for x in (row["mean"], *row["scores"].values()))]
