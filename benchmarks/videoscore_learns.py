"""`python -m benchmarks.videoscore_learns`: checks that reward models learn the five scores.

Clips are generated with known qualities: noise (visual quality), flicker (temporal consistency), way travelled (dynamic
degree), the colour that the prompt names (text-to-video alignment), jumps across the picture (factual consistency). A
tiny model is first trained to name what is seen and to say whether a given thing is seen, as the base models of
VideoScore can. It is then trained by `rlvid reward-model`, once as regression and once as text, each clip with its own
prompt and with another clip's. Figures are the rank correlations on held-out clips, and the share of them whose
alignment score falls when the prompt is swapped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import finish
from rlvid.config import TinyModelConfig
from rlvid.data.dialects.videofeedback import mismatch
from rlvid.models.tiny import make_tiny
from rlvid.rewards.videoscore import ALIGNMENT, DIMS
from rlvid.synthetic.moving_shapes import FPS, Figure, Frames, render, write_mp4
from rlvid.types import Medium

SIZE, FRAMES = 56, 8
GRAIN = 7  # pixels of a grain of noise
QUESTION, IS_SEEN = "What is seen?", "Is {} seen?"
COLOURS = ("red", "blue")  # such a small model needs 700 steps to learn the match for four colours, 100 for two
NOISE = (50.0, 26.0, 12.0, 0.0)  # standard deviation, of grey levels; by score 1 to 4, as below
FLICKER = (45.0, 25.0, 12.0, 0.0)  # grey levels by which frames are alternately lighter and darker
WAY = (0.0, 0.2, 0.4, 0.6)  # as a share of the width
JUMPS = ((1, 3, 5, 7), (2, 5), (4,), ())  # frames in which the shape is in the other half of the picture

CONFIG = """
data: {{root: {data}, cache_dir: {data}/cache}}
video: {{frames: {frames}, height: {size}, width: {size}}}
run: {{wandb: disabled, checkpoint_every: 10000}}
evaluate: {{every: 10000}}
rollout: {{max_tokens: 96, max_model_len: 512}}
placement: {{threads: 1}}
"""


def make_clip(rng: np.random.Generator) -> tuple[Frames, str, dict[str, float]]:
    """Frames, the prompt, and the scores of a clip that matches it."""
    level = rng.integers(0, 4, size=4)  # score - 1 of all but the alignment
    colour = str(rng.choice(COLOURS))
    noise, flicker, way = (table[i] for table, i in zip((NOISE, FLICKER, WAY), level[:3], strict=True))
    jumps = list(JUMPS[level[3]])
    side = int(rng.choice([-1, 1]))
    x, y = SIZE / 2 - side * way * SIZE / 2, SIZE * (0.28 if rng.random() < 0.5 else 0.72)
    here, there = (
        render([Figure("circle", colour, 0.17 * SIZE, (x, h), (side * way * SIZE, 0.0))], SIZE, FRAMES, 70)
        for h in (y, SIZE - y)
    )
    frames = here.astype(np.float64)
    frames[jumps] = there[jumps]
    grain = rng.normal(0, noise, size=(FRAMES, SIZE // GRAIN, SIZE // GRAIN, 1))
    frames += grain.repeat(GRAIN, axis=1).repeat(GRAIN, axis=2)
    frames += flicker * np.where(np.arange(FRAMES) % 2, 1, -1)[:, None, None, None]
    scores = dict(zip((DIMS[0], DIMS[1], DIMS[2], DIMS[4]), (level + 1.0).tolist(), strict=True))
    return frames.clip(0, 255).astype(np.uint8), f"a {colour} ball", scores | {ALIGNMENT: 4.0}


def make_data(folder: Path, split: str, n: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Write `n` clips and two manifests.

    `<split>.jsonl` has every clip twice, with its own prompt and with that of another clip;
    `<split>_seen.jsonl` asks what is seen, and whether a given thing is seen."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        frames, prompt, labels = make_clip(rng)
        video = f"clips/{split}-{i}.mp4"
        write_mp4(folder / video, frames, FPS)
        rows.append({"id": f"{split}-{i}", "video": video, "prompt": prompt, "labels": labels, "source": "annotated"})
    both = [{**row, "question": row["prompt"], "answer": ""} for row in (*rows, *mismatch(rows, 1.0, rng))]
    asked = [(row, QUESTION, row["prompt"]) for row in rows]
    asked += [(r, IS_SEEN.format(r["prompt"]), "yes" if r["labels"][ALIGNMENT] == 4 else "no") for r in both]
    seen = [{"id": f"{r['id']} {q}", "video": r["video"], "question": q, "answer": a} for r, q, a in asked]
    for name, manifest in ((split, both), (f"{split}_seen", seen)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    return both


def make_base(folder: Path) -> Path:
    """Make a tiny random model whose tokenizer knows the words of prompts and scores."""
    words = [f"a {colour} ball" for colour in COLOURS] + [f"{name}: {i}" for name in DIMS for i in range(1, 5)]
    make_tiny(folder / "model", TinyModelConfig(), [QUESTION, IS_SEEN, "yes no", *words * 10], seed=0)
    return folder / "model"


def run(job: str, folder: Path, name: str, model: Path, steps: int, *overrides: str) -> dict[str, Any]:
    """Run a job in a process of its own and return its result."""
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(data=folder, size=SIZE, frames=FRAMES))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    keys = (f"run.dir={folder / name}", f"model.path={model}", f"train.steps={steps}", "train.lr=1.0e-3")
    command = [sys.executable, "-m", "jobs.cli", job, str(config), *keys, "train.warmup_steps=30", *overrides]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(name, *(line for line in done.stdout.splitlines() if "evaluation" in line), sep="\n", flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def train(folder: Path, kind: str, model: Path, steps: int, seed: str) -> dict[str, Any]:
    """Train a reward model of this kind and return its result on the held-out clips."""
    data = (f"data.train={folder / 'train.jsonl'}", f"data.eval={folder / 'eval.jsonl'}")
    how = [f"reward_model={{kind: {kind}, template: question}}", "train.batch_size=32", "train.schedule=cosine"]
    how += ["train.warmup_steps=150"]  # with 30, some seeds forget what they see while they learn to write scores
    return run("reward-model", folder, kind, model, steps, seed, *data, *how)


def swapped_share(folder: Path, model: Path, rows: list[dict[str, Any]]) -> float:
    """Share of the held-out clips whose alignment score falls with another clip's prompt."""
    from rlvid.rewards.reward_model import HeadModel, ask
    from rlvid.video.cache import FrameCache
    from rlvid.video.clip_reader import ClipReader

    judge = HeadModel(model)
    cache = FrameCache(folder / "cache", 2**30)
    reader = ClipReader(judge.rubric.video, judge.family.frame_multiple, cache)
    prompts = []
    for row in rows:
        clip, _ = reader.read(Medium(str(folder / row["video"])))
        prompts.append(judge.family.encode(ask(judge.rubric, row["id"], [row["video"]], row["prompt"]), [clip]))
    scores = {r["id"]: own[0].scores or {} for r, own in zip(rows, judge(prompts), strict=True)}
    own = [name for name in scores if not name.endswith("-mismatched")]
    return float(np.mean([scores[f"{n}-mismatched"][ALIGNMENT] < scores[n][ALIGNMENT] for n in own]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1500, help="training clips")
    parser.add_argument("--eval", type=int, default=150, help="held-out clips")
    parser.add_argument("--captions", type=int, default=100, help="steps of the first training, on what is seen")
    parser.add_argument("--steps", type=int, default=550, help="optimizer steps of the regression")
    parser.add_argument("--text-steps", type=int, default=650, help="optimizer steps of the generation")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    begin = time.monotonic()
    with TemporaryDirectory(prefix="rlvid-videoscore-") as name:
        folder = Path(name)
        rng = np.random.default_rng(options.seed)
        make_data(folder, "train", options.train, rng)
        held_out = make_data(folder, "eval", options.eval, rng)
        seed = f"seed={options.seed}"
        asked = (seed, f"data.train={folder / 'train_seen.jsonl'}", "train.batch_size=32")
        base = make_base(folder)
        if options.captions:
            run("sft", folder, "captions", base, options.captions, *asked)
            base = folder / "captions" / "policy"
        regression = train(folder, "regression", base, options.steps, seed)
        share = swapped_share(folder, folder / "regression" / "policy", held_out)
        generation = train(folder, "generation", base, options.text_steps, seed)
    finish(
        {
            "spearman_regression": (regression["spearman"] or 0.0) / 100,  # null if all scores are equal
            "spearman_generation": (generation["spearman"] or 0.0) / 100,
            "prompt_swap_share": share,
            "unparsed_generation": generation["unparsed"],
            "n": regression["n"],
            "seconds_regression": regression["seconds"],
            "seconds_generation": generation["seconds"],
            "seconds": time.monotonic() - begin,
        }
    )


if __name__ == "__main__":
    main()
