"""`python -m benchmarks.traces_learn`: checks that reasoning traces are learned, and that they are about the image.

Rows in LLaVA-CoT's format ask for the colour or the shape in a synthetic picture; answers are in four tagged stages. A
tiny Qwen2-VL and a tiny Cobra (Mamba behind two towers) are tuned on them. On other pictures, greedily: `tags` is the
share of answers with all four tags in their order, `accuracy` that of right conclusions, `blank_drop` by how many
points accuracy falls where every picture is blank. Each is the worse of the two models.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.harness import finish, machine
from benchmarks.runs import run, seconds_of
from rlvid.synthetic.moving_shapes import COLOURS, SHAPES, Figure, render

SIDE = 56  # pixels of a picture, which a tower cuts into 4 x 4 patches
TRACE = re.compile(
    r"\s*<SUMMARY>.*</SUMMARY>\s*<CAPTION>.*</CAPTION>\s*<REASONING>.*</REASONING>\s*"
    r"<CONCLUSION>(?P<conclusion>.*)</CONCLUSION>\s*",
    re.DOTALL,
)
MODELS = {"qwen2_vl": "train.lr=1.0e-3", "cobra": "train.lr=2.0e-3"}

CONFIG = """
data: {{{split}: {manifest}, dialect: llava, root: {tmp}, cache_dir: {tmp}/cache}}
video: {{height: 56, width: 56}}
run: {{wandb: disabled, checkpoint_every: 10000}}
evaluate: {{every: 10000}}
rollout: {{max_tokens: 80, max_model_len: 256}}
placement: {{threads: 2}}
train: {{batch_size: 32, schedule: cosine, warmup_steps: 20, steps: {steps}}}
"""


def make_rows(tmp: Path, name: str, n: int, seed: int, is_blank: bool = False) -> Path:
    """Write pictures and their rows; returns the manifest."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
        start = (rng.uniform(0.4, 0.6) * SIDE, rng.uniform(0.4, 0.6) * SIDE)
        radius = rng.uniform(0.28, 0.38) * SIDE
        figure = Figure(shape, colour, radius, start, (0.0, 0.0))
        (frame, _) = render([] if is_blank else [figure], SIDE, 2, background=25)
        Image.fromarray(frame).save(tmp / f"{name}-{i}.png")
        asked, answer = (("colour", colour), ("shape", shape))[i % 2]
        trace = (
            f"<SUMMARY>I look for the {asked}.</SUMMARY> <CAPTION>There is a {colour} {shape}.</CAPTION> "
            f"<REASONING>A {colour} {shape} has the {asked} {answer}.</REASONING> <CONCLUSION>{answer}</CONCLUSION>"
        )
        turns = [
            {"from": "human", "value": f"<image>\nWhat {asked} do you see?"},
            {"from": "gpt", "value": trace},
        ]
        rows.append({"id": f"{name}-{i}", "image": f"{name}-{i}.png", "conversations": turns})
    path = tmp / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


def measured(folder: Path, manifest: Path) -> tuple[float, float]:
    """Share of predictions with all tags in order, and of those with the right conclusion."""
    (file,) = (folder / "predictions").glob("*.jsonl")
    said = {row["id"]: row["text"] for row in map(json.loads, file.read_text().splitlines())}
    tagged, right = 0, 0
    rows = json.loads(manifest.read_text())
    for row in rows:
        expected, found = (TRACE.fullmatch(text) for text in (row["conversations"][-1]["value"], said[row["id"]]))
        assert expected is not None
        tagged += found is not None
        right += found is not None and found["conclusion"].strip() == expected["conclusion"]
    return tagged / len(rows), right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=512, help="to train on")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--dir", type=Path, help="keep the run folders here")
    args = parser.parse_args()
    print(f"{machine()}; {args.rows} rows, {args.steps} steps\n")
    tags, accuracies, drops = [], [], []
    with TemporaryDirectory() as temporary:
        tmp = args.dir or Path(temporary)
        tmp.mkdir(exist_ok=True)
        train = make_rows(tmp, "train", args.rows, seed=0)
        tests = {name: make_rows(tmp, name, 96, seed=1, is_blank=name == "blank") for name in ("seen", "blank")}
        for model in args.models.split(","):
            config = tmp / "train.yaml"
            config.write_text(CONFIG.format(split="train", manifest=train, tmp=tmp, steps=args.steps))
            run("sft", config, tmp / model, [f"model.tiny.family={model}", MODELS[model]])
            found = {}
            for name, manifest in tests.items():
                config = tmp / f"{name}.yaml"
                config.write_text(CONFIG.format(split="eval", manifest=manifest, tmp=tmp, steps=args.steps))
                folder = tmp / f"{model}_{name}"
                run("eval", config, folder, [f"model.path={tmp / model / 'policy'}"])
                found[name] = measured(folder, manifest)
            (tagged, right), (_, blind) = found["seen"], found["blank"]
            shown = f"tags {tagged:.3f}, accuracy {right:.3f}, blank {blind:.3f}"
            print(f"{model:<10}{seconds_of(tmp / model):6.0f} s; {shown}", flush=True)
            tags.append(tagged)
            accuracies.append(right)
            drops.append(100 * (right - blind))
    finish({"tags": min(tags), "accuracy": min(accuracies), "blank_drop": min(drops)})


if __name__ == "__main__":
    main()
