"""`python -m benchmarks.audit`: checks that `rlvid data audit` finds which rows of a manifest need their video.

Clips of shapes with four kinds of question: the colour that the question names itself (blind), the colour of a moving
shape (still), the two colours that are seen by turns (order-free), and which of two comes first. A tiny model is tuned
on such rows; others are audited, with copies of a tenth in another encoding, their question in other words.
`precision` and `recall` are of the marks blind, still and order-free, and of the copies, each the smallest of the four.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import finish, machine
from benchmarks.runs import run, seconds_of
from rlvid.synthetic.moving_shapes import COLOURS, FPS, SHAPES, Figure, Frames, render, write_mp4

SIZE, FRAMES = 56, 16
KINDS = {"blind": "blind", "still": "still", "order_free": "order_free", "order": "needs_order"}  # kind -> its mark
COPY = "duplicate"
CONFIG = """
data: {{{split}: {manifest}, cache_dir: {tmp}/cache}}
video: {{height: 56, width: 56, frames: 8}}
run: {{wandb: disabled, checkpoint_every: 10000}}
evaluate: {{every: 10000}}
rollout: {{max_tokens: 12, max_model_len: 512}}
rewards: [{{kind: exact}}]
placement: {{threads: 2}}
train: {{batch_size: 32, schedule: cosine, warmup_steps: 20, lr: 1.0e-3, steps: {steps}}}
audit: {{temperature: 0.7}}
"""


def make_row(tmp: Path, name: str, kind: str, rng: np.random.Generator) -> tuple[dict[str, Any], Frames]:
    """A row, and the frames of its clip."""
    one, two = (str(colour) for colour in rng.choice(list(COLOURS), 2, replace=False))
    shape, radius = str(rng.choice(SHAPES)), rng.uniform(0.16, 0.26) * SIZE
    start = (float(rng.uniform(0.3, 0.7) * SIZE), float(rng.uniform(0.3, 0.7) * SIZE))
    travel = (float(rng.uniform(-0.3, 0.3) * SIZE), float(rng.uniform(-0.3, 0.3) * SIZE))
    if kind in ("blind", "still"):
        parts = [(one, 0, FRAMES)]
    elif kind == "order":
        parts = [(one, 0, FRAMES // 2), (two, FRAMES // 2, FRAMES)]
    else:  # both, in any order
        colours = rng.permutation([one, two, *rng.choice([one, two], FRAMES // 4 - 2)])
        parts = [(str(colour), 4 * i, 4 * i + 4) for i, colour in enumerate(colours)]
    figures = [Figure(shape, colour, radius, start, travel, first, last) for colour, first, last in parts]
    asked = {
        "blind": (f"Somebody likes {two}. Which colour does somebody like?", two),
        "still": ("What colour is the moving shape?", one),
        "order_free": ("Which two colours are seen?", " and ".join(sorted((one, two)))),
        "order": ("Which colour comes first?", one),
    }
    question, answer = asked[kind]
    row = {"id": name, "video": f"{name}.mp4", "question": question, "answer": answer, "problem_type": kind}
    return row, render(figures, SIZE, FRAMES, background=int(rng.integers(8, 40)))


def make_manifest(tmp: Path, name: str, n: int, seed: int, copies: int = 0) -> Path:
    """Write clips and their manifest; the last `copies` rows are near copies of others."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        row, frames = make_row(tmp, f"{name}-{i}", list(KINDS)[i % len(KINDS)], rng)
        write_mp4(tmp / row["video"], frames, FPS)
        rows.append(row)
        if i < copies:
            copy = row | {"id": f"{name}-copy-{i}", "video": f"{name}-copy-{i}.mp4", "copy": True}
            write_mp4(tmp / copy["video"], frames, FPS, options={"preset": "fast", "crf": "19"})
            rows.append(copy | {"question": f"Say: {row['question']}"})
    path = tmp / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(folder: Path, manifest: Path) -> dict[str, tuple[float, float]]:
    """Precision and recall of each mark."""
    planted = {row["id"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    audited = {row["id"]: row for row in map(json.loads, (folder / "audit.jsonl").read_text().splitlines())}
    found = {}
    for mark in ("blind", "still", "order_free", COPY):
        if mark == COPY:
            true = {name for name, row in planted.items() if row.get("copy")}
            said = {name for name, row in audited.items() if row["duplicate_of"]}
        else:
            true = {name for name, row in planted.items() if KINDS[row["problem_type"]] == mark}
            said = {name for name, row in audited.items() if row["mark"] == mark}
        found[mark] = (len(true & said) / max(1, len(said)), len(true & said) / len(true))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=1536, help="to train on")
    parser.add_argument("--audited", type=int, default=200)
    parser.add_argument("--dir", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    print(f"{machine()}; {args.rows} rows, {args.steps} steps, {args.audited} rows audited\n")
    with TemporaryDirectory() as temporary:
        tmp = args.dir or Path(temporary)
        tmp.mkdir(exist_ok=True)
        manifests = {
            "train": make_manifest(tmp, "train", args.rows, seed=0),
            "eval": make_manifest(tmp, "eval", args.audited, seed=1, copies=args.audited // 10),
        }
        for split, manifest in manifests.items():
            config = CONFIG.format(split=split, manifest=manifest, tmp=tmp, steps=args.steps)
            (tmp / f"{split}.yaml").write_text(config)
        run("sft", tmp / "train.yaml", tmp / "sft", ["model.tiny={}"])
        run("audit", tmp / "eval.yaml", tmp / "audit", [f"model.path={tmp / 'sft' / 'policy'}"])
        found = measured(tmp / "audit", manifests["eval"])
        for mark, (precision, recall) in found.items():
            print(f"{mark:<12}precision {precision:.3f}, recall {recall:.3f}")
        print(f"tuned in {seconds_of(tmp / 'sft'):.0f} s, audited in {seconds_of(tmp / 'audit'):.0f} s", flush=True)
    finish({"precision": min(p for p, _ in found.values()), "recall": min(r for _, r in found.values())})


if __name__ == "__main__":
    main()
