"""`rlvid score`: scores of videos by a trained reward model, ranked (best of n). One process, no Ray."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvid.errors import BadClip, UserError
from rlvid.reporting import safe_json
from rlvid.reporting.console import Console
from rlvid.rewards.videoscore import mean_score

CACHE_BYTES = 2**30


def score(
    model: Path, videos: Sequence[Path], prompt: str, responses: Sequence[str], cache_dir: Path
) -> list[dict[str, Any]]:
    """One row per video (and response), best first; those without a score last, with the reason.

    Raises:
        UserError: `model` is no reward model, or it scores responses and there are none.
    """
    import torch

    from rlvid.rewards.reward_model import ask, load_reward_model, video_config
    from rlvid.video.cache import FrameCache
    from rlvid.video.clip_reader import ClipReader

    model = model / "policy" if (model / "policy").is_dir() else model
    judge = load_reward_model(model, on_gpu=torch.cuda.is_available())
    rubric = judge.rubric
    if (rubric.kind == "bradley_terry") != bool(responses):
        needs = "scores responses: give --response" if not responses else "scores videos: leave out --response"
        raise UserError(f"{model} is a {rubric.kind} model, which {needs}")
    reader = ClipReader(video_config(rubric), judge.family.frame_multiple, FrameCache(cache_dir, CACHE_BYTES))
    rows: list[dict[str, Any]] = []
    prompts, read = [], []
    for video in videos:
        try:
            clip, _ = reader.read(str(video.absolute()))
        except BadClip as e:
            rows.append({"video": str(video), "reason": e.reason})
            continue
        prompts.append(judge.family.encode(ask(rubric, str(video), [str(video)], prompt), [clip]))
        read.append(video)
    for video, scored in zip(read, judge(prompts, [responses] * len(prompts) if responses else ()), strict=True):
        for one, response in zip(scored, responses or (None,), strict=True):
            row: dict[str, Any] = {"video": str(video)}
            if response is not None:
                row["response"] = response
            if one.scores is None:
                rows.append({**row, "reason": one.reason})
                continue
            ranked_by = one.soft or one.scores
            row |= {"mean": mean_score(ranked_by, rubric.dims), "scores": one.scores}
            rows.append(row | ({"soft": one.soft} if one.soft else {}))
    rows.sort(key=lambda row: -row.get("mean", float("-inf")))
    return [{"rank": i if "mean" in row else None, **row} for i, row in enumerate(rows, start=1)]


def main(arguments: argparse.Namespace) -> None:
    """Print the ranking, write it to a file, and give the best as the last line."""
    cache = Path("~/.cache/rlvid/frames").expanduser()
    rows = score(arguments.model, arguments.videos, arguments.prompt, arguments.response, cache)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        "".join(safe_json.dumps({"prompt": arguments.prompt, **row}) + "\n" for row in rows), encoding="utf-8"
    )
    console = Console()
    names = list(next((row["scores"] for row in rows if "scores" in row), {}))
    table = []
    for row in rows:
        numbers = [f"{row['scores'][n]:.3f}" for n in names] if "scores" in row else [row["reason"], *[""] * len(names)]
        mean = [f"{row['mean']:.3f}"] if "mean" in row else []
        cells = [str(row["rank"] or "-"), row["video"], *([row["response"]] if "response" in row else [])]
        table.append([*cells, *mean, *numbers][: 3 + len(names) + bool(arguments.response)])
    console.table(["rank", "video", *(["response"] if arguments.response else []), "mean", *names], table)
    best = rows[0] if "mean" in rows[0] else {}
    if not best:
        raise UserError(f"none of the {len(rows)} videos has a score; the reasons stand in {arguments.out}")
    console.result({"best": best["video"], "mean": best["mean"], "n": len(rows), "scores": str(arguments.out)})
